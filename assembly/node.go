package assembly

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"time"

	"kedge/agent"
	"kedge/dns"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/joining"
	"kedge/internal/logging"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cni"
	"kedge/network/proxy"
	"kedge/preflight"
	"kedge/runtime"
	"kedge/server/identity"
	"kedge/server/membership"
	"kedge/server/witness"
	"kedge/settings"
)

// Build identifies this build of kedge.
type Build struct {
	Version string
	// Time is the commit time of this executable's source, which a correct clock cannot precede. It is zero in
	// a build without the Makefile.
	Time time.Time
}

// composeAny composes the configuration for commands about the node that this machine has, or would have.
func composeAny(in Input) (Config, error) {
	dataDir := absolute(settings.DataDir.In(in.Values))
	member, joined, err := joining.ReadState(joining.Agent, agentDir(dataDir))
	if err != nil {
		return Config{}, err
	}
	if joined {
		return composeAgent(in, member.Cluster, member.Address)
	}
	if witness.Joined(witnessDir(dataDir)) {
		state, _, err := joining.ReadState(joining.Witness, witnessDir(dataDir))
		if err != nil {
			return Config{}, err
		}
		return composeWitness(in, state.Cluster)
	}
	dir := serverDir(dataDir)
	others, joinedBefore, err := membership.JoinedBefore(dir)
	switch {
	case err != nil:
		return Config{}, err
	case joinedBefore:
		return composeServer(in, &others)
	case identity.Exists(dir):
		return composeServer(in, nil)
	}
	return composeNew(in)
}

// composeNew composes the configuration of the node that this machine would have.
func composeNew(in Input) (Config, error) {
	if in.Values.IsSet(settings.Witness.Name) && settings.Witness.In(in.Values) {
		return composeWitness(in, settings.DefaultCluster())
	}
	if settings.JoinServer.In(in.Values) != "" {
		return composeAgent(in, settings.DefaultCluster(), netip.Addr{})
	}
	return composeServer(in, nil)
}

// composeStart composes the configuration with which the node of in.Role would start.
func composeStart(in Input) (s Config, err error) {
	if in.Role == settings.Agent {
		s, _, err = composeAgentStart(in)
		return s, err
	}
	if settings.Witness.In(in.Values) {
		s, _, err = composeWitnessStart(in)
		return s, err
	}
	s, _, _, err = composeServerStart(in)
	return s, err
}

// Check checks whether this machine can run the node that it has or would have, and changes nothing. The error
// is that of [preflight.Required]; findings means that results are valid beside the error. Without root
// permission the node's files cannot be read, so that the machine is checked as one without a node.
func Check(ctx context.Context, in Input) (results []preflight.Result, findings bool, err error) {
	compose := composeAny
	switch {
	case in.Role != 0:
		compose = composeStart
	case os.Geteuid() != 0:
		compose = composeNew
	}
	s, err := compose(in)
	if err != nil {
		return nil, false, err
	}
	if err := errors.Join(s.checkArgs(), s.sameDatastore()); err != nil {
		return nil, false, err
	}
	// The ports and routes of a running kedge are not findings.
	if r, err := control.GetReport(ctx, s.RunDir); err == nil && r.Node == s.NodeName {
		s.Preflight.Running = r.PID
	}
	if name, err := datadir.NodeName(s.DataDir); err == nil {
		s.Preflight.Exists = name != ""
	}
	results, err = preflight.Required(ctx, s.Preflight)
	return results, true, err
}

// LinkPrefixes returns the prefixes of the names of a node's network interfaces.
func LinkPrefixes(node string) []string {
	return append(backend.LinkNames(node), cni.LinkPrefix(node))
}

// KillAll kills the containers of this machine's node, and removes their kernel objects.
func KillAll(ctx context.Context, in Input) error {
	// Addresses are not needed here, and the machine may have none.
	in.Values = in.Values.WithDefault(settings.NodeIPs.Name, "127.0.0.1")
	// The containers belong to the node of the data directory, whose name may differ from this machine's.
	name, err := datadir.NodeName(absolute(settings.DataDir.In(in.Values)))
	if err != nil {
		return err
	}
	if name != "" {
		in.Values = in.Values.WithDefault(settings.NodeName.Name, name)
	}
	s, err := composeAny(in)
	if err != nil {
		return err
	}
	log := logging.New(os.Stderr, s.log)
	logging.Setup(log)
	if _, err := os.Stat(s.DataDir); errors.Is(err, os.ErrNotExist) {
		// There is nothing to remove, and the path is probably mistyped.
		return fmt.Errorf("data directory %s does not exist; give the node's with --data-dir", s.DataDir)
	}
	dir, err := openDirs(in.Build, s)
	if err != nil {
		return err
	}
	defer dir.Close()
	if !s.parts.Node && !s.parts.ControlPlane {
		return nil // a witness has no containers
	}
	if err := runtime.KillAll(ctx, s.runtime, log); err != nil {
		return err
	}
	var services error
	if !s.cluster.NoProxy {
		services = proxy.Cleanup(s.proxy)
	}
	return errors.Join(agent.Cleanup(ctx, s.agent), network.Cleanup(s.network), backend.Cleanup(s.NodeName), services, dns.Cleanup(s.agent.ClusterDNS))
}
