package main

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"
	utilnet "k8s.io/apimachinery/pkg/util/net"

	"kedge/internal/addresspool"
	"kedge/internal/config"
	"kedge/internal/hostaddr"
	"kedge/internal/joining"
	"kedge/internal/logging"
	"kedge/internal/token"
	"kedge/network/backend"
	"kedge/server"
	"kedge/server/identity"
)

// flagParser reads typed values of flags and collects what is wrong with them.
type flagParser struct {
	c        *cli.Context
	errs     []error
	badPools bool // the pools' mistake is among errs
	warnings []string
}

func (p *flagParser) err() error { return errors.Join(p.errs...) }

func (p *flagParser) fail(errs ...error) {
	if err := errors.Join(errs...); err != nil {
		p.errs = append(p.errs, err)
	}
}

func (p *flagParser) dir(flag string) string {
	v := p.c.String(flag)
	abs, err := filepath.Abs(v)
	if v == "" {
		err = fmt.Errorf("--%s is empty", flag)
	}
	p.fail(err)
	return abs
}

// path is the flag's, absolute; empty where it is not given.
func (p *flagParser) path(flag string) string {
	v := p.c.String(flag)
	if v == "" {
		return ""
	}
	abs, err := filepath.Abs(v)
	p.fail(err)
	return abs
}

// nodeName is the flag's, or the host's name in the form that Kubernetes wants.
func (p *flagParser) nodeName() string {
	name, what, remedy := p.c.String("node-name"), "--node-name", ""
	if name == "" {
		host, err := os.Hostname()
		p.fail(err)
		name, what, remedy = host, "the host's name", "; choose another for the node with --node-name"
	}
	name = strings.ToLower(strings.TrimSpace(name))
	valid := name != "" && len(name) <= 63 && !strings.HasPrefix(name, "-") && !strings.HasSuffix(name, "-")
	for _, r := range name {
		valid = valid && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.')
	}
	if !valid {
		p.fail(fmt.Errorf("%s %q: want at most 63 letters, digits, dots and dashes%s", what, name, remedy))
	}
	return name
}

func (p *flagParser) logging() logging.Config {
	level, err := logging.ParseLevel(p.c.String("log-level"))
	if err != nil {
		p.fail(fmt.Errorf("--log-level: %w", err))
	}
	if p.c.Bool("debug") {
		level = min(level, slog.LevelDebug)
	}
	format := p.oneOf("log-format", string(logging.Text), string(logging.JSON))
	return logging.Config{Level: level, Format: logging.Format(format)}
}

// oneOf is the flag's value, which is one of these where it is given.
func (p *flagParser) oneOf(flag string, values ...string) string {
	v := p.c.String(flag)
	if v != "" && !slices.Contains(values, v) {
		p.fail(fmt.Errorf("--%s %q is none of %s%s", flag, v, strings.Join(values, ", "), config.DidYouMean(v, values)))
	}
	return v
}

// port is the flag's, which is one that can be listened on.
func (p *flagParser) port(flag string) uint16 {
	v := p.c.Int(flag)
	if v < 1 || v > 65535 {
		p.fail(fmt.Errorf("--%s %d is not between 1 and 65535", flag, v))
		return 0
	}
	return uint16(v)
}

// differentPorts reports two flags that want the same port of this machine. That of the
// stores counts where it is given: a server that stays alone does not listen on it.
func (p *flagParser) differentPorts() {
	flags := []string{"https-listen-port"}
	if !p.c.Bool("disable-agent") {
		flags = append(flags, "kubelet-port")
	}
	if p.c.IsSet("peer-port") {
		flags = append(flags, "peer-port")
	}
	for i, flag := range flags {
		for _, other := range flags[:i] {
			if v := p.c.Int(flag); v == p.c.Int(other) {
				p.fail(fmt.Errorf("--%s %d and --%s are the same port; choose another for one of them", flag, v, other))
			}
		}
	}
}

// nodePorts is the range of the flag, as the API server reads it: FIRST-LAST, FIRST+MORE
// or one port.
func (p *flagParser) nodePorts(flag string) string {
	v := p.c.String(flag)
	r, err := utilnet.ParsePortRange(v)
	if err != nil || r.Base < 1 || r.Size < 1 {
		p.fail(fmt.Errorf("--%s %q is not a range of ports such as 30000-32767", flag, v))
	}
	return v
}

func (p *flagParser) addr(flag string) netip.Addr {
	v := p.c.String(flag)
	if v == "" {
		return netip.Addr{}
	}
	a, err := netip.ParseAddr(v)
	if err != nil {
		p.fail(fmt.Errorf("--%s %q is not an IP address", flag, v))
	}
	return a
}

func (p *flagParser) addrs(flag string) []netip.Addr {
	var out []netip.Addr
	for _, v := range splitList(p.c.StringSlice(flag)) {
		a, err := netip.ParseAddr(v)
		if err != nil {
			p.fail(fmt.Errorf("--%s %q is not an IP address", flag, v))
			continue
		}
		out = append(out, a)
	}
	return out
}

// nodePortAddresses are the ranges of the flag; none for the node's addresses.
func (p *flagParser) nodePortAddresses() []netip.Prefix {
	if v := splitList(p.c.StringSlice("nodeport-addresses")); len(v) == 1 && v[0] == "primary" {
		return nil
	}
	return p.prefixes("nodeport-addresses")
}

func (p *flagParser) prefixes(flag string) []netip.Prefix {
	var out []netip.Prefix
	for _, v := range splitList(p.c.StringSlice(flag)) {
		r, err := netip.ParsePrefix(v)
		if err != nil {
			p.fail(fmt.Errorf("--%s %q is not a range such as 10.42.0.0/16", flag, v))
			continue
		}
		out = append(out, r.Masked())
	}
	return out
}

// backend is how pods of different nodes meet.
func (p *flagParser) backend(name string) backend.Mode {
	m, err := backend.ParseMode(name)
	if err != nil {
		p.fail(fmt.Errorf("--flannel-backend %w", err))
	}
	return m
}

func (p *flagParser) mode(flag string) uint32 {
	m, err := strconv.ParseUint(p.c.String(flag), 8, 12)
	if err != nil {
		p.fail(fmt.Errorf("--%s %q is not an octal file mode such as 600", flag, p.c.String(flag)))
	}
	return uint32(m)
}

// nodeIPs are the flag's, or the machine's own of the families that pods have, which it
// can be asked for again: they may change.
func (p *flagParser) nodeIPs(pods, services []netip.Prefix) (now []netip.Addr, find func() ([]netip.Addr, error)) {
	if given := p.addrs("node-ip"); len(given) > 0 {
		return given, nil
	}
	ipv4 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is4() })
	ipv6 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is6() })
	find = func() ([]netip.Addr, error) { return hostaddr.Find(ipv4, ipv6, slices.Concat(pods, services)) }
	if name := p.c.String("flannel-iface"); name != "" {
		find = func() ([]netip.Addr, error) {
			found, err := backend.AddressesOf(name)
			return slices.DeleteFunc(found, func(a netip.Addr) bool { return a.Is4() && !ipv4 || a.Is6() && !ipv6 }), err
		}
	}
	now, err := find()
	if name := p.c.String("flannel-iface"); name != "" && err != nil {
		err = fmt.Errorf("--flannel-iface: %w", err)
	}
	p.fail(err)
	return now, find
}

// Parts that --disable leaves out.
const (
	partDNS      = "dns"
	partBalancer = "servicelb"
)

// parts are what --disable takes: our names, and k3s's for the same.
var parts = map[string]string{partDNS: partDNS, "coredns": partDNS, partBalancer: partBalancer}

// others are parts that only k3s has. Whoever comes from there has them in --disable.
var others = []string{"local-storage", "metrics-server", "runtimes", "traefik"}

// cluster is what the flags of a server say about all nodes. Its servers follow later.
func (p *flagParser) cluster() joining.Cluster {
	disabled, defaults := p.disabled(), server.DefaultConfig()
	k := joining.Cluster{
		ClusterCIDRs: p.prefixes("cluster-cidr"), ServiceCIDRs: p.prefixes("service-cidr"), ClusterDomain: p.c.String("cluster-domain"),
		Pools: splitList(p.c.StringSlice("lb-pool")), Backend: p.c.String("flannel-backend"), External: p.c.Bool("flannel-external-ip"),
		NoDNS: disabled[partDNS], NoBalancer: disabled[partBalancer],
		NoProxy: p.c.Bool("disable-kube-proxy"), NoPolicy: p.c.Bool("disable-network-policy"),
	}
	if k.ClusterCIDRs == nil {
		k.ClusterCIDRs = defaults.ClusterCIDRs
	}
	if k.ServiceCIDRs == nil {
		k.ServiceCIDRs = defaults.ServiceCIDRs
	}
	k.ClusterDNS = p.clusterDNS(k.ServiceCIDRs)
	if m, err := backend.ParseMode(k.Backend); err == nil { // it is reported where it is used
		k.Backend = string(m)
	}
	return k
}

// sameCluster reports the flags of a server that contradict the cluster it has joined.
// What a flag leaves out comes from the cluster.
func (p *flagParser) sameCluster(k joining.Cluster) {
	given := p.cluster()
	for _, f := range []struct {
		flag        string
		given, have any
	}{
		{"cluster-cidr", given.ClusterCIDRs, k.ClusterCIDRs}, {"service-cidr", given.ServiceCIDRs, k.ServiceCIDRs},
		{"cluster-dns", given.ClusterDNS, k.ClusterDNS}, {"cluster-domain", given.ClusterDomain, k.ClusterDomain},
		{"flannel-backend", given.Backend, k.Backend}, {"lb-pool", given.Pools, k.Pools}, {"flannel-external-ip", given.External, k.External},
		{"disable-kube-proxy", given.NoProxy, k.NoProxy}, {"disable-network-policy", given.NoPolicy, k.NoPolicy},
	} {
		if p.c.IsSet(f.flag) && fmt.Sprint(f.given) != fmt.Sprint(f.have) {
			p.fail(fmt.Errorf("--%s %v is not what the cluster has, %v; leave it out", f.flag, f.given, f.have))
		}
	}
	if p.c.IsSet("disable") && (given.NoDNS != k.NoDNS || given.NoBalancer != k.NoBalancer) {
		p.fail(errors.New("--disable leaves out other parts than the cluster's first server does; leave it out"))
	}
}

// token is the text of --token, or of the file of --token-file.
func (p *flagParser) token() string {
	text, file := p.c.String("token"), p.c.String("token-file")
	switch {
	case file == "":
		return text
	case text != "":
		p.fail(errors.New("--token and --token-file are both given; give one"))
		return ""
	}
	data, err := os.ReadFile(file)
	if err != nil {
		p.fail(fmt.Errorf("--token-file: %w", err))
	}
	return strings.TrimSpace(string(data))
}

// fixedTokens are the secrets with which agents and servers may join for ever: those
// of the flags where --token is not for joining others, or those that the other servers
// have.
func (p *flagParser) fixedTokens(serverDir string) (agents, servers token.Secret) {
	if p.c.String("server") == "" {
		return token.Secret(p.token()), token.Secret(p.c.String("server-token"))
	}
	if p.c.IsSet("server-token") {
		p.fail(errors.New("--server-token is for the first server of a cluster; the others have it from there"))
	}
	agents, servers, err := identity.FixedTokens(serverDir)
	p.fail(err)
	return agents, servers
}

// pools are the addresses that services of type LoadBalancer are given.
func (p *flagParser) pools(texts []string) []addresspool.Pool {
	pools, err := addresspool.Parse(texts)
	if err != nil && !p.badPools {
		p.badPools = true // node and control plane both ask
		p.fail(fmt.Errorf("--lb-pool: %w", err))
	}
	return pools
}

// disabled are the parts that the flag leaves out.
func (p *flagParser) disabled() map[string]bool {
	out := map[string]bool{}
	known := slices.Sorted(maps.Keys(parts))
	var missing []string
	for _, name := range splitList(p.c.StringSlice("disable")) {
		part, ok := parts[name]
		switch {
		case ok:
			out[part] = true
		case slices.Contains(others, name):
			missing = append(missing, name)
		default:
			p.fail(fmt.Errorf("--disable %q: there is no such part, but %s%s", name, strings.Join(known, ", "), config.DidYouMean(name, slices.Concat(known, others))))
		}
	}
	if len(missing) > 0 {
		p.warnings = append(p.warnings, "kedge has no "+strings.Join(missing, ", ")+"; nothing to disable")
	}
	return out
}

// clusterDNS is the flag's, or the tenth address of each service range.
func (p *flagParser) clusterDNS(services []netip.Prefix) []netip.Addr {
	if given := p.addrs("cluster-dns"); len(given) > 0 {
		return given
	}
	return tenthOf(services)
}

func tenthOf(services []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, r := range services {
		a := r.Masked().Addr()
		for range 10 {
			a = a.Next()
		}
		out = append(out, a)
	}
	return out
}
