package dns

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"kedge/dns/cluster"
	"kedge/dns/message"
	"kedge/internal/resolvconf"
)

// Config is everything the resolver is told. Package main composes it once; it is
// passed by value and not changed afterwards.
type Config struct {
	Addresses  []netip.Addr   // of the cluster's DNS: one, or one of each family
	Domain     string         // of the cluster: "cluster.local"
	Ranges     []netip.Prefix // of pods and services: their reverse names are answered here
	ResolvConf string         // file with the name servers for all other names; empty means: the host's
	TTL        uint32         // of the cluster's records, in seconds
}

// DefaultConfig returns the settings that do not depend on the machine.
func DefaultConfig() Config {
	return Config{Domain: "cluster.local", TTL: cluster.DefaultTTL}
}

// Validate reports everything that is wrong with c, joined.
func (c Config) Validate() error {
	var errs []error
	if len(c.Addresses) == 0 {
		errs = append(errs, errors.New("the cluster's DNS has no address; give one with --cluster-dns"))
	}
	for i, a := range c.Addresses {
		if a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" {
			errs = append(errs, fmt.Errorf("--cluster-dns %s is not an address that pods can reach; take one of the service range", a))
		}
		if slices.Contains(c.Addresses[:i], a) {
			errs = append(errs, fmt.Errorf("--cluster-dns %s is given twice", a))
		}
	}
	if len(message.WireName(c.Domain)) <= 1 {
		errs = append(errs, fmt.Errorf("--cluster-domain %q is not a domain name", c.Domain))
	}
	return errors.Join(errs...)
}

// resolvConf returns the file with the name servers as it is right now. On hosts that
// have only a server on loopback, pods get none, but this process can ask it.
func (c Config) resolvConf() string {
	if c.ResolvConf != "" {
		return c.ResolvConf
	}
	if f := resolvconf.Find(); f != "" {
		return f
	}
	return "/etc/resolv.conf"
}
