package server

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/arguments"
	"kedge/server/identity"
	"kedge/server/join"
)

// Config is the configuration of the control plane. Package assembly composes it once; it is passed by value
// and not changed afterwards.
type Config struct {
	Dir      string // <data-dir>/server: keys, certificates, tokens
	NodeName string // name of the node on this machine, for its credentials
	HasNode  bool   // a kubelet in this process will register it

	BindAddress      netip.Addr   // the zero Addr means all addresses
	HTTPSPort        int          // port of the API
	AdvertiseAddress netip.Addr   // the address by which other machines reach the API
	NodeIPs          []netip.Addr // for the serving certificates
	TLSSANs          []string     // additional names and addresses for the API's serving certificate

	ClusterCIDRs  []netip.Prefix // pod ranges: one, or one of each family
	ServiceCIDRs  []netip.Prefix // service ranges: one, or one of each family
	ForeignPods   bool           // a foreign CNI plugin assigns pod addresses from its own ranges
	ClusterDomain string
	ClusterDNS    []netip.Addr // addresses reserved for the resolver; none if kedge's resolver is disabled

	NodePortRange string // "30000-32767"

	// ExternalDatastore says that the objects are in an etcd outside of kedge.
	ExternalDatastore bool

	Kubeconfig     string // path of the administrator's kubeconfig
	KubeconfigMode uint32
	KubeconfigName string         // of the cluster, the context and the user in it
	Token          joining.Secret // an administrator's own, with which agents may join; empty: none
	ServerToken    joining.Secret // likewise servers

	Cluster joining.Cluster // settings that joining machines receive
	// AgentCertificateLife is the lifetime of certificates for agents.
	AgentCertificateLife time.Duration

	APIServerArgs  []string // the user's arguments, NAME=VALUE
	ControllerArgs []string
	SchedulerArgs  []string
}

// DefaultConfig returns k3s's default ranges and names. The caller sets Dir, NodeName and the addresses.
func DefaultConfig() Config {
	return Config{
		HTTPSPort:      6443,
		ClusterCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
		ServiceCIDRs:   []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
		ClusterDomain:  "cluster.local",
		NodePortRange:  "30000-32767",
		Kubeconfig:     "/etc/kedge/kedge.yaml",
		KubeconfigMode: 0o600,
		KubeconfigName: "default",

		AgentCertificateLife: join.Life,
	}
}

// leastLife is the minimum lifetime of agents' certificates. Agents renew after half of it, and need time to
// try again when no server answers. Lifetimes this short are for tests.
const leastLife = time.Minute

// Validate reports all errors of c, joined.
func (c Config) Validate() error {
	var errs []error
	if !filepath.IsAbs(c.Dir) {
		errs = append(errs, fmt.Errorf("server directory %q is not an absolute path", c.Dir))
	}
	if c.NodeName == "" {
		errs = append(errs, errors.New("the node's name is empty; set --node-name"))
	}
	if c.HTTPSPort < 1 || c.HTTPSPort > 65535 {
		errs = append(errs, errorkind.BadSetting("https-listen-port", " %d is not between 1 and 65535", c.HTTPSPort))
	}
	if !c.AdvertiseAddress.IsValid() {
		errs = append(errs, errors.New("no address to advertise; set --node-ip"))
	}
	for name, secret := range map[string]joining.Secret{"token": c.Token, "server-token": c.ServerToken} {
		if secret == "" {
			continue
		}
		if err := joining.CheckPreshared(secret); err != nil {
			errs = append(errs, errorkind.BadSetting(name, ": %w", err))
		}
	}
	if c.Token != "" && c.Token == c.ServerToken {
		errs = append(errs, errorkind.BadSettings("token", "", "server-token", " are the same; an agent that knows the servers' secret can become one, so choose another"))
	}
	if l := c.AgentCertificateLife; l < leastLife || l > pki.LeafLife {
		errs = append(errs, errorkind.BadSetting("agent-certificate-life", " %s is not between %s and %s", l, leastLife, pki.LeafLife))
	}
	errs = append(errs, arguments.Check(c.APIServerArgs, c.ControllerArgs, c.SchedulerArgs))
	errs = append(errs, validRanges("cluster-cidr", c.ClusterCIDRs), validRanges("service-cidr", c.ServiceCIDRs))
	for _, p := range c.ClusterCIDRs {
		for _, s := range c.ServiceCIDRs {
			if p.Overlaps(s) {
				errs = append(errs, errorkind.BadSettings("cluster-cidr", p.String(), "service-cidr", " %s overlap; choose ranges that do not", s))
			}
		}
	}
	if len(c.ClusterCIDRs) != len(c.ServiceCIDRs) {
		errs = append(errs, errorkind.BadSettings("cluster-cidr", "", "service-cidr", " must have the same address families"))
	}
	return errors.Join(errs...)
}

func validRanges(name string, ranges []netip.Prefix) error {
	switch {
	case len(ranges) == 0:
		return errorkind.BadSetting(name, " is empty")
	case len(ranges) > 2, len(ranges) == 2 && ranges[0].Addr().Is4() == ranges[1].Addr().Is4():
		return errorkind.BadSetting(name, " wants one range, or one of IPv4 and one of IPv6")
	}
	return nil
}

// APIServiceIP is the address of the service "kubernetes": the first of the service range.
func (c Config) APIServiceIP() netip.Addr { return c.ServiceCIDRs[0].Masked().Addr().Next() }

// Identity returns the configuration of the server's credentials.
func (c Config) Identity() identity.Config {
	return identity.Config{
		Dir: c.Dir, NodeName: c.NodeName,
		BindAddress: c.BindAddress, HTTPSPort: c.HTTPSPort, AdvertiseAddress: c.AdvertiseAddress, NodeIPs: c.NodeIPs, TLSSANs: c.TLSSANs,
		ServiceIP: c.APIServiceIP(), ClusterDomain: c.ClusterDomain,
		Kubeconfig: c.Kubeconfig, KubeconfigMode: c.KubeconfigMode, KubeconfigName: c.KubeconfigName, Token: c.Token, ServerToken: c.ServerToken,
	}
}
