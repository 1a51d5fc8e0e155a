package proxy

import (
	"errors"
	"net/netip"

	"kedge/internal/addresspool"
	"kedge/internal/errorkind"
	"kedge/network/nft/services"
)

// Config is the configuration that does not change while the node runs.
type Config struct {
	NodeName      string
	LinkPrefix    string         // prefix of the names of the host interfaces of this node's pods
	ForeignPrefix string         // prefix of the same names for all nodes on this machine
	ClusterRanges []netip.Prefix // of all pods of the cluster
	ServiceRanges []netip.Prefix // of cluster IPs; services of other families are ignored
	NodeIPs       []netip.Addr   // initial addresses of the node, at most one for each family

	// NodePortsOn are the ranges of node addresses at which node ports are reachable; empty
	// for NodeIPs. Loopback addresses are never included: the kernel does not route packets
	// from there to pods.
	NodePortsOn []netip.Prefix

	// Own are cluster IPs that a resolver on this node serves itself. Services with these
	// addresses are left alone.
	Own []netip.Addr

	Scheduler services.Scheduler
	// Pools are the address pools of load balancers; no machine has their addresses.
	Pools []addresspool.Pool
}

// DefaultConfig returns the configuration of a single IPv4 node, without its name and
// addresses.
func DefaultConfig() Config {
	return Config{
		ClusterRanges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
		Scheduler:     services.Random,
	}
}

// Validate reports all errors of the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("service proxy: the node name is missing"))
	}
	if c.LinkPrefix == "" || c.ForeignPrefix == "" {
		errs = append(errs, errors.New("service proxy: the prefix of pod interfaces is missing"))
	}
	if len(c.ServiceRanges) == 0 {
		errs = append(errs, errors.New("service proxy: the service range is missing"))
	}
	if !c.Scheduler.Valid() {
		errs = append(errs, errorkind.BadSetting("proxy-scheduler", " %q is not %s, %s or %s", c.Scheduler, services.Random, services.RoundRobin, services.SourceHash))
	}
	for _, p := range c.NodePortsOn {
		if p.Addr().IsLoopback() {
			errs = append(errs, errorkind.BadSetting("nodeport-addresses", " %s: node ports do not work on loopback addresses, because the kernel does not route packets from them to pods; use host ports", p))
		}
	}
	return errors.Join(errs...)
}

// nodePortsOn returns the addresses at which node ports are reachable on a node with
// nodeIPs.
func (c Config) nodePortsOn(nodeIPs []netip.Addr) []netip.Prefix {
	if len(c.NodePortsOn) > 0 {
		return c.NodePortsOn
	}
	var out []netip.Prefix
	for _, a := range nodeIPs {
		out = append(out, netip.PrefixFrom(a, a.BitLen()))
	}
	return out
}

func (c Config) rules() services.Config {
	return services.Config{
		LinkPrefix: c.LinkPrefix, ForeignPrefix: c.ForeignPrefix,
		ClusterRanges: c.ClusterRanges, ServiceRanges: c.ServiceRanges,
		NodePortsOn: c.nodePortsOn(c.NodeIPs), Own: c.Own, Pools: c.Pools, Scheduler: c.Scheduler,
	}
}
