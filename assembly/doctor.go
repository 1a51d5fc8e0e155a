package assembly

import (
	"context"
	"errors"

	"kedge/appliance/doctor"
	"kedge/internal/cgroup"
	"kedge/internal/datadir"
	"kedge/internal/joining"
	"kedge/network/backend"
	"kedge/preflight"
	"kedge/settings"
)

// Doctor examines this machine and its node, which may be running, stopped, or not be able to start. With fix it repairs
// what can be repaired safely.
func Doctor(ctx context.Context, in Input, fix bool) doctor.Report {
	return doctor.Run(ctx, doctorConfig(in), fix)
}

// doctorConfig composes the configuration of a doctor. Errors in the settings are findings, so that the machine is examined
// nevertheless.
func doctorConfig(in Input) doctor.Config {
	name := settings.NodeName.In(in.Values)
	if owner, err := datadir.NodeName(absolute(settings.DataDir.In(in.Values))); err == nil && owner != "" {
		in.Values, name = in.Values.WithDefault(settings.NodeName.Name, owner), owner
	}
	s, err := composeAny(in)
	if err == nil {
		err = errors.Join(s.checkArgs(), s.sameDatastore())
	}
	c := doctor.Config{
		Version: in.Build.Version, DataDir: absolute(settings.DataDir.In(in.Values)), RunDir: absolute(settings.RunDir.In(in.Values)),
		NodeName: name, ResolvConf: settings.ResolvConf.In(in.Values),
	}
	if err != nil {
		c.SettingsError = in.Values.Explain(err)
		c.Preflight = preflight.DefaultConfig()
		c.Preflight.DataDir, c.Preflight.RunDir, c.Preflight.NodeName, c.Preflight.BuildDate = c.DataDir, c.RunDir, name, in.Build.Time
		return c
	}
	c.NodeName, c.NodeIPs, c.Preflight = s.NodeName, s.NodeIPs, s.Preflight
	c.Overhead, c.ForeignNetwork = s.network.Overhead, s.backend.Mode == backend.None
	flags := map[int]string{s.agent.KubeletPort: "--" + settings.KubeletPort.Name}
	if s.parts.ControlPlane {
		c.Store, c.Kubeconfig = s.etcd == nil, s.server.Kubeconfig
		flags[s.server.HTTPSPort] = "--" + settings.HTTPSPort.Name
	}
	for _, p := range s.Preflight.Ports {
		c.Ports = append(c.Ports, doctor.Port{Port: p, Flag: flags[p.Number]})
	}
	c.Backend = doctor.Port{Port: preflight.Port{Number: backendPort(s.backend), Protocol: "udp", Purpose: "network of pods"}}
	if s.Preflight.VXLAN {
		c.Ports = append(c.Ports, c.Backend)
	}
	if c.Store || s.parts.Witness {
		c.Peer = doctor.Port{Port: preflight.Port{Number: int(s.datastore.Peer.Port), Protocol: "tcp", Purpose: "datastores of the servers"}, Flag: "--" + settings.PeerPort.Name}
	}
	if s.parts.Node {
		c.CgroupRoot = s.agent.CgroupRoot
		if s.agent.SystemdCgroups {
			c.CgroupRoot = "/" + cgroup.Slice(s.agent.CgroupRoot)
		}
	}
	askJoin(&c, in, s)
	return c
}

// backendPort returns the UDP port of packets between nodes, and 0 if the backend does not wrap them.
func backendPort(c backend.Config) int {
	switch c.Mode {
	case backend.VXLAN:
		return c.VXLANPort
	case backend.UDP:
		return c.UDPPort
	case backend.WireGuard:
		return c.WireGuardPort
	}
	return 0
}

// askJoin fills in how an agent that has not joined its cluster would do so.
func askJoin(c *doctor.Config, in Input, s Config) {
	if s.parts.ControlPlane || s.parts.Witness {
		return
	}
	_, joined, err := joining.ReadState(joining.Agent, agentDir(s.DataDir))
	if joined || err != nil {
		return
	}
	c.Joins = true
	if in.Token == "" {
		c.TokenError = "no join token is given"
		return
	}
	token, err := joining.ParseToken(in.Token)
	if err != nil {
		c.TokenError = err.Error()
		return
	}
	c.AskServer = func(ctx context.Context) error {
		_, err := joining.FetchCA(ctx, settings.JoinServer.In(in.Values), token)
		return err
	}
}
