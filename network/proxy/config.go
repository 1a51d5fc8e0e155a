package proxy

import (
	"errors"
	"fmt"
	"net/netip"

	"kedge/internal/addresspool"
	"kedge/network/nft"
)

// Config is what does not change while the node runs.
type Config struct {
	NodeName      string
	LinkPrefix    string         // how the names of this node's pods' host interfaces begin
	ForeignPrefix string         // how those of all nodes of this machine begin
	ClusterRanges []netip.Prefix // of all pods of the cluster
	ServiceRanges []netip.Prefix // of cluster IPs; services of other families are ignored
	NodeIPs       []netip.Addr   // of the node at first, at most one a family

	// NodePortsOn are the ranges of node addresses at which node ports answer;
	// none for NodeIPs. Loopback addresses never do: the kernel does not route
	// packets from there to pods.
	NodePortsOn []netip.Prefix

	// Own are cluster IPs that a resolver on this node answers itself. Services
	// that have them are left alone.
	Own []netip.Addr

	Scheduler nft.Scheduler
	// Pools are where addresses of load balancers come from that no machine has.
	Pools []addresspool.Pool
}

// DefaultConfig returns the configuration of a single IPv4 node, less its name
// and addresses.
func DefaultConfig() Config {
	return Config{
		ClusterRanges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
		Scheduler:     nft.Random,
	}
}

// Validate reports everything that is wrong with the configuration.
func (c Config) Validate() error {
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("service proxy: the node has no name"))
	}
	if c.LinkPrefix == "" || c.ForeignPrefix == "" {
		errs = append(errs, errors.New("service proxy: the interfaces of pods cannot be told from others"))
	}
	if len(c.ServiceRanges) == 0 {
		errs = append(errs, errors.New("service proxy: there is no service range"))
	}
	if !c.Scheduler.Valid() {
		errs = append(errs, fmt.Errorf("--proxy-scheduler %q is none of %s, %s and %s", c.Scheduler, nft.Random, nft.RoundRobin, nft.SourceHash))
	}
	for _, p := range c.NodePortsOn {
		if p.Addr().IsLoopback() {
			errs = append(errs, fmt.Errorf("--nodeport-addresses %s: node ports cannot answer there: the kernel does not route packets from loopback addresses to pods; use host ports for that", p))
		}
	}
	return errors.Join(errs...)
}

// nodePortsOn are the addresses at which node ports answer on a node with these.
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

func (c Config) rules() nft.ServiceConfig {
	return nft.ServiceConfig{
		LinkPrefix: c.LinkPrefix, ForeignPrefix: c.ForeignPrefix,
		ClusterRanges: c.ClusterRanges, ServiceRanges: c.ServiceRanges,
		NodePortsOn: c.nodePortsOn(c.NodeIPs), Own: c.Own, Pools: c.Pools, Scheduler: c.Scheduler,
	}
}
