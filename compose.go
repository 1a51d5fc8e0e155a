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

	"kedge/agent"
	"kedge/datastore"
	"kedge/dns"
	"kedge/internal/hostaddr"
	"kedge/internal/logging"
	"kedge/internal/preflight"
	"kedge/internal/resolvconf"
	"kedge/network"
	"kedge/network/cni"
	"kedge/network/nft"
	"kedge/network/proxy"
	"kedge/runtime"
	"kedge/server"
)

// settings are the configurations of all parts. They are composed once, in
// compose, and not changed afterwards.
type settings struct {
	dataDir, runDir string
	nodeName        string
	disableAgent    bool
	log             logging.Config
	preflight       preflight.Config

	datastore datastore.Config
	server    server.Config
	runtime   runtime.Config
	network   network.Config
	proxy     *proxy.Config // nil to leave services to somebody else
	dns       dns.Config
	agent     agent.Config
	disabled  map[string]bool // parts that are left out, by their names in --disable
}

// compose turns flags into configurations and derives what depends on several.
// It reports all mistakes at once and touches nothing but the host's name and
// addresses.
func compose(c *cli.Context) (settings, error) {
	p := &flagParser{c: c}
	s := settings{
		dataDir:      p.dir("data-dir"),
		runDir:       p.dir("run-dir"),
		nodeName:     p.nodeName(),
		disableAgent: c.Bool("disable-agent"),
		log:          p.logging(),
		datastore:    datastore.DefaultConfig(),
		server:       server.DefaultConfig(),
		runtime:      runtime.DefaultConfig(),
		network:      network.DefaultConfig(),
		dns:          dns.DefaultConfig(),
		disabled:     p.disabled(),
		agent:        agent.DefaultConfig(),
	}
	serverDir := filepath.Join(s.dataDir, "server")

	s.datastore.Dir = filepath.Join(serverDir, "store")
	s.datastore.MemberName = s.nodeName

	sv := &s.server
	sv.Dir = serverDir
	sv.NodeName, sv.HasNode = s.nodeName, !s.disableAgent
	if v := p.prefixes("cluster-cidr"); v != nil {
		sv.ClusterCIDRs = v
	}
	if v := p.prefixes("service-cidr"); v != nil {
		sv.ServiceCIDRs = v
	}
	sv.ClusterDomain = c.String("cluster-domain")
	sv.NodePortRange = c.String("service-node-port-range")
	sv.NodeIPs = p.nodeIPs(sv.ClusterCIDRs)
	sv.BindAddress = p.addr("bind-address")
	sv.HTTPSPort = c.Int("https-listen-port")
	sv.AdvertiseAddress = p.addr("advertise-address")
	if !sv.AdvertiseAddress.IsValid() && len(sv.NodeIPs) > 0 {
		sv.AdvertiseAddress = sv.NodeIPs[0]
	}
	sv.TLSSANs = splitList(c.StringSlice("tls-san"))
	sv.Kubeconfig = p.dir("write-kubeconfig")
	sv.KubeconfigMode = p.mode("write-kubeconfig-mode")
	sv.Token = server.Secret(c.String("token"))
	sv.APIServerArgs = c.StringSlice("kube-apiserver-arg")
	sv.ControllerArgs = c.StringSlice("kube-controller-manager-arg")
	sv.SchedulerArgs = c.StringSlice("kube-scheduler-arg")

	n := &s.network
	n.DataDir, n.RunDir = s.dataDir, s.runDir
	n.NodeName = s.nodeName
	n.Plugin = launcherPath()
	n.ClusterCIDRs, n.ServiceCIDRs = sv.ClusterCIDRs, sv.ServiceCIDRs

	r := &s.runtime
	r.DataDir, r.RunDir, r.ImagesDir = s.dataDir, s.runDir, filepath.Join(s.dataDir, "images")
	r.NodeName = s.nodeName
	r.Snapshotter = c.String("snapshotter")
	r.CgroupDriver = runtime.DetectCgroupDriver()
	r.CNIConfDir, r.CNIBinDir = n.ConfDir(), n.BinDir()
	r.RegistriesFile = c.String("private-registry")

	a := &s.agent
	a.DataDir, a.RunDir = s.dataDir, s.runDir
	a.NodeName, a.NodeIPs = s.nodeName, sv.NodeIPs
	a.NodeLabels = splitList(c.StringSlice("node-label"))
	a.NodeTaints = splitList(c.StringSlice("node-taint"))
	a.ClusterDNS = p.clusterDNS(sv.ServiceCIDRs)
	a.ClusterDomain = sv.ClusterDomain
	if a.ResolvConf = c.String("resolv-conf"); a.ResolvConf == "" {
		a.ResolvConf = resolvconf.Find()
	}
	a.RuntimeEndpoint = r.Socket()
	a.CgroupRoot = "/kedge-" + s.nodeName
	a.SystemdCgroups = r.CgroupDriver == runtime.CgroupDriverSystemd
	a.KubeletPort = c.Int("kubelet-port")
	a.KubeletArgs = c.StringSlice("kubelet-arg")

	d := &s.dns
	d.Addresses, d.Domain = a.ClusterDNS, sv.ClusterDomain
	d.Ranges = slices.Concat(sv.ClusterCIDRs, sv.ServiceCIDRs)
	d.ResolvConf = c.String("resolv-conf")
	if !s.disabled[partDNS] { // one that is not of the service range nobody else can get
		sv.ClusterDNS = slices.DeleteFunc(slices.Clone(d.Addresses), func(a netip.Addr) bool {
			return !slices.ContainsFunc(sv.ServiceCIDRs, func(r netip.Prefix) bool { return r.Contains(a) })
		})
	}

	if !c.Bool("disable-kube-proxy") {
		px := proxy.DefaultConfig()
		px.NodeName, px.NodeIPs = s.nodeName, sv.NodeIPs
		px.LinkPrefix, px.ForeignPrefix = cni.LinkPrefix(s.nodeName), cni.LinkTag
		px.ClusterRanges, px.ServiceRanges = sv.ClusterCIDRs, sv.ServiceCIDRs
		px.NodePortsOn = p.nodePortAddresses()
		px.Scheduler = nft.Scheduler(c.String("proxy-scheduler"))
		if !s.disabled[partDNS] {
			px.Own = d.Addresses
		}
		s.proxy = &px
	}

	s.preflight = preflight.DefaultConfig()
	pf := &s.preflight
	pf.DataDir, pf.RunDir, pf.NodeName = s.dataDir, s.runDir, s.nodeName
	pf.IPv6 = slices.ContainsFunc(sv.ClusterCIDRs, func(r netip.Prefix) bool { return r.Addr().Is6() })
	pf.Ranges, pf.OwnLinks = slices.Concat(sv.ClusterCIDRs, sv.ServiceCIDRs), cni.LinkPrefix(s.nodeName)
	pf.VXLAN = false // there is one machine
	pf.BuildDate = buildTime()
	pf.Ports = []preflight.Port{{Number: sv.HTTPSPort, Protocol: "tcp", Purpose: "API server"}, {Number: a.KubeletPort, Protocol: "tcp", Purpose: "kubelet"}}

	if p.err() == nil { // what follows from a mistake is not worth a line of its own
		p.fail(sv.Validate(), s.datastore.Validate())
		if !s.disableAgent {
			p.fail(a.Validate(), r.Validate(), n.Validate())
			if s.proxy != nil {
				p.fail(s.proxy.Validate())
			}
			if !s.disabled[partDNS] {
				p.fail(d.Validate())
			}
		}
	}
	return s, p.err()
}

// launcherPath is the executable that the user started: the launcher, which says so,
// or this program itself in development. As a plug-in the launcher starts faster.
func launcherPath() string {
	defer os.Unsetenv(launcherVariable) // nothing that we start has a use for it
	return os.Getenv(launcherVariable)
}

const launcherVariable = "KEDGE_LAUNCHER"

// flagParser reads typed values of flags and collects what is wrong with them.
type flagParser struct {
	c    *cli.Context
	errs []error
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

// nodeName is the flag's, or the host's name in the form that Kubernetes wants.
func (p *flagParser) nodeName() string {
	name := p.c.String("node-name")
	if name == "" {
		host, err := os.Hostname()
		p.fail(err)
		name = host
	}
	name = strings.ToLower(strings.TrimSpace(name))
	valid := name != "" && len(name) <= 63 && !strings.HasPrefix(name, "-") && !strings.HasSuffix(name, "-")
	for _, r := range name {
		valid = valid && (r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '.')
	}
	if !valid {
		p.fail(fmt.Errorf("node name %q: want at most 63 letters, digits, dots and dashes; choose one with --node-name", name))
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
	format := logging.Format(p.c.String("log-format"))
	if format != logging.Text && format != logging.JSON {
		p.fail(fmt.Errorf("--log-format %q is neither text nor json", format))
	}
	return logging.Config{Level: level, Format: format}
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

func (p *flagParser) mode(flag string) uint32 {
	m, err := strconv.ParseUint(p.c.String(flag), 8, 12)
	if err != nil {
		p.fail(fmt.Errorf("--%s %q is not an octal file mode such as 600", flag, p.c.String(flag)))
	}
	return uint32(m)
}

// nodeIPs are the flag's, or the machine's own of the families that pods have.
func (p *flagParser) nodeIPs(pods []netip.Prefix) []netip.Addr {
	if given := p.addrs("node-ip"); len(given) > 0 {
		return given
	}
	ipv4 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is4() })
	ipv6 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is6() })
	found, err := hostaddr.Find(ipv4, ipv6)
	p.fail(err)
	return found
}

// Parts that --disable leaves out.
const partDNS = "dns"

// parts are what --disable takes: our names, and k3s's for the same.
var parts = map[string]string{partDNS: partDNS, "coredns": partDNS}

func (p *flagParser) disabled() map[string]bool {
	out := map[string]bool{}
	for _, name := range splitList(p.c.StringSlice("disable")) {
		part, ok := parts[name]
		if !ok {
			p.fail(fmt.Errorf("--disable: there is no part called %q; there are %s", name, strings.Join(slices.Sorted(maps.Keys(parts)), ", ")))
			continue
		}
		out[part] = true
	}
	return out
}

// clusterDNS is the flag's, or the tenth address of each service range.
func (p *flagParser) clusterDNS(services []netip.Prefix) []netip.Addr {
	if given := p.addrs("cluster-dns"); len(given) > 0 {
		return given
	}
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
