package assembly

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"kedge/assembly/parts"
	"kedge/datastore"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/kernelnet"
	"kedge/internal/lifecycle"
	"kedge/server/identity"
	"kedge/server/witness"
	"kedge/settings"
)

// witnessSettings are the settings that have an effect on a witness.
var witnessSettings = []string{
	settings.Config.Name, settings.DataDir.Name, settings.RunDir.Name, settings.LogLevel.Name, settings.LogFormat.Name, settings.Log.Name, settings.Debug.Name,
	settings.NodeName.Name, settings.NodeIPs.Name, settings.FlannelIface.Name, settings.PeerPort.Name,
	settings.JoinServer.Name, settings.Token.Name, settings.TokenFile.Name, settings.Witness.Name,
}

// composeWitness composes the configuration of a witness. cluster comes from a server.
func composeWitness(in Input, cluster joining.Cluster) (Config, error) {
	c := newComposer(in)
	c.role, c.cluster = parts.Witness, cluster
	c.parts = parts.Of(c.role, c.cluster)
	c.network.Plugin = c.Host.Launcher
	c.addresses()
	dir := witnessDir(c.DataDir)
	c.datastore = datastore.DefaultConfig()
	c.datastore.Dir, c.datastore.MemberName, c.datastore.Witness = witness.StoreDir(dir), c.NodeName, true
	c.datastore.Peer = witness.PeerConfig(dir, settings.PeerPort.In(in.Values), c.NodeIPs)
	// Raft keeps these entries in memory. A server that missed more of them while the witness leads gets the whole database.
	c.datastore.Several.SnapshotCount, c.datastore.Several.SnapshotCatchUp = 500, 250
	var idle []string
	for _, w := range in.Values.Written() {
		if in.Values.IsSet(w.Name) && !slices.Contains(witnessSettings, w.Name) {
			idle = append(idle, w.Name)
		}
	}
	if len(idle) > 0 {
		c.warnings = append(c.warnings, "these settings have no effect on a witness: "+strings.Join(idle, ", "))
	}
	return c.finish()
}

// composeWitnessStart composes the configuration with which a witness starts, before it joins. Errors in settings are found
// here, before a token is used.
func composeWitnessStart(in Input) (Config, witness.Config, error) {
	s, err := composeWitness(in, settings.DefaultCluster())
	if err != nil {
		return s, witness.Config{}, err
	}
	_, agent, err := joining.ReadState(joining.Agent, agentDir(s.DataDir))
	if err != nil {
		return s, witness.Config{}, fmt.Errorf("check whether %s belongs to an agent: %w", s.DataDir, err)
	}
	if owner := "server"; agent || identity.Exists(serverDir(s.DataDir)) {
		if agent {
			owner = "agent"
		}
		return s, witness.Config{}, errorkind.Permanent(fmt.Errorf("%s is the data directory of a machine with \"kedge %s\"; leave --witness out, or choose another with --data-dir", s.DataDir, owner))
	}
	w := witness.Config{
		Dir: witnessDir(s.DataDir), Server: settings.JoinServer.In(in.Values), Token: in.Token, NodeName: s.NodeName, Peers: s.peers(),
	}
	if err := w.Validate(); err != nil {
		return s, w, errorkind.BadUsage(err)
	}
	return s, w, nil
}

// runWitness joins the cluster if the machine has not joined before, and runs a member of the datastore.
func runWitness(ctx context.Context, in Input) error {
	s, cfg, err := composeWitnessStart(in)
	if err != nil {
		return err
	}
	var member *witness.Witness
	err = runNode(ctx, in.Build, s, hooks{
		settle: func(ctx context.Context, owned *datadir.Dir, log *slog.Logger) (Config, error) {
			lost, err := storeLost(owned, s.datastore.Dir, true)
			if err = errors.Join(err, lost, datastore.ReleaseReserve(s.datastore.Dir, component(log, "datastore"))); err != nil {
				return s, err
			}
			cfg.Forget = owned.ForgetStore
			if member, err = witness.Prepare(ctx, cfg, component(log, "join")); err != nil {
				return s, err
			}
			composed, err := composeWitness(in, member.Cluster())
			if err == nil {
				composed.datastore.Join, err = member.Admission()
			}
			return composed, err
		},
		wire: func(group *lifecycle.Group, s Config, owned *datadir.Dir, log *slog.Logger) error {
			return wireWitness(in.Build, group, s, member, owned, log)
		},
		ready: func(Config, *slog.Logger) {},
	})
	if errors.Is(err, datastore.ErrRemoved) {
		return errorkind.Permanent(fmt.Errorf("%w; to join it again create a token with \"kedge token create --role witness\" on a server and give it with --server and --token", datastore.ErrRemoved))
	}
	return err
}

// wireWitness is the graph of a witness: the datastore, and what keeps its certificate and its addresses current.
func wireWitness(build Build, group *lifecycle.Group, s Config, w *witness.Witness, owned *datadir.Dir, log *slog.Logger) error {
	store := datastore.New(s.datastore, component(log, "datastore"))
	store.OnCreated(owned.NoteStore)
	w.SetServers(func() (addrs []netip.Addr) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		members, _ := store.Members(ctx) // without a majority those that this one knows
		for _, m := range members {
			if m.Witness {
				continue
			}
			for _, a := range m.Addresses {
				addrs = append(addrs, a.Addr())
			}
		}
		return addrs
	})
	requests := control.NewServer(s.RunDir, reporter(build, group, s.NodeName))
	refuseJoin(requests, "a witness")
	listServers(requests, store.Members)
	requests.HandlePost(control.RotateCertificatesPath, func(ctx context.Context, v url.Values) (any, error) {
		if err := joining.CheckNames(v["name"]); err != nil {
			return nil, err
		}
		return []string{"peer"}, w.Renew(ctx)
	})
	hostAddrs := kernelnet.NewAddressFollower(s.NodeIPs, s.findIPs, component(log, "addresses"))
	hostAddrs.OnChange("the datastore", func(addrs []netip.Addr) error { store.SetAddresses(addrs); return nil })
	group.Add(requests)
	group.AddRestarted(hostAddrs)
	hStore := group.Add(vital{store})
	group.AddRestarted(w)
	group.Add(&leadership{now: store.Leadership, log: component(log, "leadership")}, hStore)
	return nil
}
