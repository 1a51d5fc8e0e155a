package dns

import (
	"errors"
	"net/netip"
	"slices"

	"kedge/dns/cluster"
	"kedge/dns/message"
	"kedge/dns/resolvconf"
	"kedge/internal/errorkind"
)

// Config is the configuration of the resolver. It is passed by value and does not change.
type Config struct {
	Addresses  []netip.Addr   // of the cluster DNS: one, or one of each family
	Domain     string         // of the cluster: "cluster.local"
	Ranges     []netip.Prefix // of pods and services, whose reverse names this resolver answers
	ResolvConf string         // file with the upstream name servers; empty for the host's
	TTL        uint32         // of the cluster's records, in seconds
}

// DefaultConfig returns the settings that do not depend on the machine.
func DefaultConfig() Config {
	return Config{Domain: "cluster.local", TTL: cluster.DefaultTTL}
}

// Validate reports all errors of c, joined.
func (c Config) Validate() error {
	var errs []error
	if len(c.Addresses) == 0 {
		errs = append(errs, errors.New("the cluster DNS has no address; set one with --cluster-dns"))
	}
	for i, a := range c.Addresses {
		if a.IsUnspecified() || a.IsMulticast() || a.IsLoopback() || a.Zone() != "" {
			errs = append(errs, errorkind.BadSetting("cluster-dns", " %s is not an address that pods can reach; use one in the service range", a))
		}
		if slices.Contains(c.Addresses[:i], a) {
			errs = append(errs, errorkind.BadSetting("cluster-dns", " %s is given twice", a))
		}
	}
	if len(message.WireName(c.Domain)) <= 1 {
		errs = append(errs, errorkind.BadSetting("cluster-domain", " %q is not a domain name", c.Domain))
	}
	return errors.Join(errs...)
}

// resolvConf returns the current file with the name servers. On hosts whose only server is
// on loopback, pods get none, but this process can query it.
func (c Config) resolvConf() string {
	if c.ResolvConf != "" {
		return c.ResolvConf
	}
	if f := resolvconf.Find(); f != "" {
		return f
	}
	return "/etc/resolv.conf"
}
