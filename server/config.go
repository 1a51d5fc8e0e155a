package server

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/token"
	"kedge/server/arguments"
	"kedge/server/identity"
	"kedge/server/join"
)

// Config is everything the control plane is told. Package main composes it once;
// it is passed by value and not changed afterwards.
type Config struct {
	Dir      string // <data-dir>/server: keys, certificates, tokens
	NodeName string // of the node on this machine, for its credentials
	HasNode  bool   // a kubelet in this process will register it

	BindAddress      netip.Addr   // the zero Addr means all addresses
	HTTPSPort        int          // of the API
	AdvertiseAddress netip.Addr   // the address by which other machines reach the API
	NodeIPs          []netip.Addr // go into the serving certificates
	TLSSANs          []string     // further names and addresses for the API's serving certificate

	ClusterCIDRs  []netip.Prefix // of pods: one, or one of each family
	ServiceCIDRs  []netip.Prefix // of services: one, or one of each family
	ForeignPods   bool           // another network plug-in gives pods their addresses, of ranges of its own
	ClusterDomain string
	ClusterDNS    []netip.Addr // addresses of the resolver, kept for it; none means: no resolver of ours

	NodePortRange string // "30000-32767"

	Kubeconfig     string // where the administrator's kubeconfig is written
	KubeconfigMode uint32
	Token          token.Secret // an administrator's own, with which agents may join; empty: none
	ServerToken    token.Secret // likewise servers

	Cluster joining.Cluster // what joining machines are told
	// AgentCertificateLife is how long what is signed for agents is valid.
	AgentCertificateLife time.Duration

	APIServerArgs  []string // user's, NAME=VALUE
	ControllerArgs []string
	SchedulerArgs  []string
}

// DefaultConfig returns k3s's well-known ranges and names. The caller fills in
// Dir, NodeName and the addresses.
func DefaultConfig() Config {
	return Config{
		HTTPSPort:      6443,
		ClusterCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		ServiceCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
		ClusterDomain:  "cluster.local",
		NodePortRange:  "30000-32767",
		Kubeconfig:     "/etc/kedge/kedge.yaml",
		KubeconfigMode: 0o600,

		AgentCertificateLife: join.Life,
	}
}

// leastLife leaves agents time to ask again when no server answers: half of it, and no
// clock is right to the second. So short a life is for tests.
const leastLife = time.Minute

// Validate reports everything that is wrong with c, joined.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("server directory %q is not an absolute path", c.Dir))
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("the node has no name; give one with --node-name"))
	}
	if c.HTTPSPort < 1 || c.HTTPSPort > 65535 {
		errs = append(errs, fmt.Errorf("--https-listen-port %d is not between 1 and 65535", c.HTTPSPort))
	}
	if !c.AdvertiseAddress.IsValid() {
		errs = append(errs, errors.New("no address to advertise; give one with --node-ip"))
	}
	for flag, secret := range map[string]token.Secret{"--token": c.Token, "--server-token": c.ServerToken} {
		if secret == "" {
			continue
		}
		if err := token.CheckPreshared(secret); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", flag, err))
		}
	}
	if c.Token != "" && c.Token == c.ServerToken {
		errs = append(errs, errors.New("--token and --server-token are the same; an agent that knows the servers' secret can become one, so choose another"))
	}
	if l := c.AgentCertificateLife; l < leastLife || l > pki.LeafLife {
		errs = append(errs, fmt.Errorf("--agent-certificate-life %s is not between %s and %s", l, leastLife, pki.LeafLife))
	}
	errs = append(errs, arguments.Check(c.APIServerArgs, c.ControllerArgs, c.SchedulerArgs))
	errs = append(errs, validRanges("--cluster-cidr", c.ClusterCIDRs), validRanges("--service-cidr", c.ServiceCIDRs))
	for _, p := range c.ClusterCIDRs {
		for _, s := range c.ServiceCIDRs {
			if p.Overlaps(s) {
				errs = append(errs, fmt.Errorf("--cluster-cidr %s and --service-cidr %s overlap; choose ranges that do not", p, s))
			}
		}
	}
	if len(c.ClusterCIDRs) != len(c.ServiceCIDRs) {
		errs = append(errs, errors.New("--cluster-cidr and --service-cidr must have the same address families"))
	}
	return errors.Join(errs...)
}

func validRanges(flag string, ranges []netip.Prefix) error {
	switch {
	case len(ranges) == 0:
		return fmt.Errorf("%s is empty", flag)
	case len(ranges) > 2, len(ranges) == 2 && ranges[0].Addr().Is4() == ranges[1].Addr().Is4():
		return fmt.Errorf("%s wants one range, or one of IPv4 and one of IPv6", flag)
	}
	return nil
}

// APIServiceIP is the address of the service "kubernetes": the first of the range.
func (c Config) APIServiceIP() netip.Addr { return c.ServiceCIDRs[0].Masked().Addr().Next() }

// Identity is what the server's credentials are made of.
func (c Config) Identity() identity.Config {
	return identity.Config{
		Dir: c.Dir, NodeName: c.NodeName,
		BindAddress: c.BindAddress, HTTPSPort: c.HTTPSPort, AdvertiseAddress: c.AdvertiseAddress, NodeIPs: c.NodeIPs, TLSSANs: c.TLSSANs,
		ServiceIP: c.APIServiceIP(), ClusterDomain: c.ClusterDomain,
		Kubeconfig: c.Kubeconfig, KubeconfigMode: c.KubeconfigMode, Token: c.Token, ServerToken: c.ServerToken,
	}
}
