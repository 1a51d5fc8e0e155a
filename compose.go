package main

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/urfave/cli/v2"

	"kedge/agent"
	"kedge/datastore"
	"kedge/dns"
	"kedge/internal/logging"
	"kedge/internal/preflight"
	"kedge/internal/resolvconf"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cni"
	"kedge/network/loadbalancer"
	"kedge/network/nft"
	"kedge/network/policy"
	"kedge/network/proxy"
	"kedge/runtime"
	"kedge/server"
	"kedge/server/servicelb"
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
	backend   backend.Config
	agent     agent.Config

	// Parts that can be left to somebody else; nil when they are.
	proxy     *proxy.Config
	policy    *policy.Config
	dns       *dns.Config
	balancer  *servicelb.Config
	announcer *loadbalancer.Config
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
		backend:      backend.DefaultConfig(),
		agent:        agent.DefaultConfig(),
		preflight:    preflight.DefaultConfig(),
	}
	s.controlPlane(p)
	s.node(p)
	s.dataPath(p, p.disabled())

	pf := &s.preflight
	pf.DataDir, pf.RunDir, pf.NodeName = s.dataDir, s.runDir, s.nodeName
	pf.IPv6 = slices.ContainsFunc(s.server.ClusterCIDRs, func(r netip.Prefix) bool { return r.Addr().Is6() })
	pf.Ranges, pf.OwnLinks = slices.Concat(s.server.ClusterCIDRs, s.server.ServiceCIDRs), cni.LinkPrefix(s.nodeName)
	pf.VXLAN = false // there is one machine
	pf.BuildDate = buildTime()
	pf.Ports = []preflight.Port{{Number: s.server.HTTPSPort, Protocol: "tcp", Purpose: "API server"}, {Number: s.agent.KubeletPort, Protocol: "tcp", Purpose: "kubelet"}}

	if p.err() == nil { // what follows from a mistake is not worth a line of its own
		p.fail(s.validate())
	}
	return s, p.err()
}

// validate asks every part that will run.
func (s *settings) validate() error {
	errs := []error{s.server.Validate(), s.datastore.Validate()}
	if s.disableAgent {
		return errors.Join(errs...)
	}
	errs = append(errs, s.agent.Validate(), s.runtime.Validate(), s.network.Validate(), s.backend.Validate())
	if s.proxy != nil {
		errs = append(errs, s.proxy.Validate())
	}
	if s.dns != nil {
		errs = append(errs, s.dns.Validate())
	}
	return errors.Join(errs...)
}

// controlPlane composes the API server and what is around it.
func (s *settings) controlPlane(p *flagParser) {
	dir := filepath.Join(s.dataDir, "server")
	s.datastore.Dir = filepath.Join(dir, "store")
	s.datastore.MemberName = s.nodeName

	sv := &s.server
	sv.Dir = dir
	sv.NodeName, sv.HasNode = s.nodeName, !s.disableAgent
	if v := p.prefixes("cluster-cidr"); v != nil {
		sv.ClusterCIDRs = v
	}
	if v := p.prefixes("service-cidr"); v != nil {
		sv.ServiceCIDRs = v
	}
	sv.ClusterDomain = p.c.String("cluster-domain")
	sv.NodePortRange = p.c.String("service-node-port-range")
	sv.NodeIPs = p.nodeIPs(sv.ClusterCIDRs)
	sv.BindAddress = p.addr("bind-address")
	sv.HTTPSPort = p.c.Int("https-listen-port")
	sv.AdvertiseAddress = p.addr("advertise-address")
	if !sv.AdvertiseAddress.IsValid() && len(sv.NodeIPs) > 0 {
		sv.AdvertiseAddress = sv.NodeIPs[0]
	}
	sv.TLSSANs = splitList(p.c.StringSlice("tls-san"))
	sv.Kubeconfig = p.dir("write-kubeconfig")
	sv.KubeconfigMode = p.mode("write-kubeconfig-mode")
	sv.Token = server.Secret(p.c.String("token"))
	sv.APIServerArgs = p.c.StringSlice("kube-apiserver-arg")
	sv.ControllerArgs = p.c.StringSlice("kube-controller-manager-arg")
	sv.SchedulerArgs = p.c.StringSlice("kube-scheduler-arg")
}

// node composes the kubelet, the container runtime and the pod network.
func (s *settings) node(p *flagParser) {
	n := &s.network
	n.DataDir, n.RunDir = s.dataDir, s.runDir
	n.NodeName = s.nodeName
	n.Plugin = launcherPath()
	n.ClusterCIDRs, n.ServiceCIDRs = s.server.ClusterCIDRs, s.server.ServiceCIDRs

	b := &s.backend
	b.NodeName, b.NodeIPs, b.Interface = s.nodeName, s.server.NodeIPs, p.c.String("flannel-iface")
	b.Mode = p.backend()
	n.NodeIPs, n.Overhead = b.NodeIPs, b.Overhead()

	r := &s.runtime
	r.DataDir, r.RunDir, r.ImagesDir = s.dataDir, s.runDir, filepath.Join(s.dataDir, "images")
	r.NodeName = s.nodeName
	r.Snapshotter = p.c.String("snapshotter")
	r.CgroupDriver = runtime.DetectCgroupDriver()
	r.CNIConfDir, r.CNIBinDir = n.ConfDir(), n.BinDir()
	if b.Mode == backend.None {
		r.CNIConfDir, r.CNIBinDir = foreignConfDir, foreignBinDir
	}
	r.RegistriesFile = p.c.String("private-registry")

	a := &s.agent
	a.DataDir, a.RunDir = s.dataDir, s.runDir
	a.NodeName, a.NodeIPs = s.nodeName, s.server.NodeIPs
	a.NodeLabels = splitList(p.c.StringSlice("node-label"))
	a.NodeTaints = splitList(p.c.StringSlice("node-taint"))
	a.ClusterDNS = p.clusterDNS(s.server.ServiceCIDRs)
	a.ClusterDomain = s.server.ClusterDomain
	if a.ResolvConf = p.c.String("resolv-conf"); a.ResolvConf == "" {
		a.ResolvConf = resolvconf.Find()
	}
	a.RuntimeEndpoint = r.Socket()
	a.CgroupRoot = "/kedge-" + s.nodeName
	a.SystemdCgroups = r.CgroupDriver == runtime.CgroupDriverSystemd
	a.KubeletPort = p.c.Int("kubelet-port")
	a.KubeletArgs = p.c.StringSlice("kubelet-arg")
}

// dataPath composes services, policies and names, as far as they are wanted.
func (s *settings) dataPath(p *flagParser, disabled map[string]bool) {
	resolver := s.agent.ClusterDNS
	if !disabled[partDNS] {
		d := dns.DefaultConfig()
		d.Addresses, d.Domain = resolver, s.server.ClusterDomain
		d.Ranges = slices.Concat(s.server.ClusterCIDRs, s.server.ServiceCIDRs)
		d.ResolvConf = p.c.String("resolv-conf")
		s.dns = &d
		// One that is not of the service range nobody else can get.
		s.server.ClusterDNS = slices.DeleteFunc(slices.Clone(resolver), func(a netip.Addr) bool {
			return !slices.ContainsFunc(s.server.ServiceCIDRs, func(r netip.Prefix) bool { return r.Contains(a) })
		})
	}
	if !p.c.Bool("disable-kube-proxy") {
		px := proxy.DefaultConfig()
		px.NodeName, px.NodeIPs = s.nodeName, s.server.NodeIPs
		px.LinkPrefix, px.ForeignPrefix = cni.LinkPrefix(s.nodeName), cni.LinkTag
		px.ClusterRanges, px.ServiceRanges = s.server.ClusterCIDRs, s.server.ServiceCIDRs
		px.NodePortsOn = p.nodePortAddresses()
		px.Scheduler = nft.Scheduler(p.c.String("proxy-scheduler"))
		if s.dns != nil {
			px.Own = resolver
		}
		s.proxy = &px
	}
	pools := p.pools()
	if !disabled[partBalancer] {
		s.balancer = &servicelb.Config{Pools: pools, Reserved: []uint16{uint16(s.server.HTTPSPort), uint16(s.agent.KubeletPort)}}
		if len(pools) > 0 {
			s.announcer = &loadbalancer.Config{NodeName: s.nodeName, Pools: pools, PodLinks: cni.LinkTag}
		}
	}
	// What attaches pods has to ask before it does, which another's plug-in does not.
	if !p.c.Bool("disable-network-policy") && s.backend.Mode != backend.None {
		s.policy = &policy.Config{NodeName: s.nodeName}
		if s.dns != nil {
			s.policy.DNS = resolver
		}
	}
}

// Where network plug-ins that are not kedge's put their configuration and programs.
const (
	foreignConfDir = "/etc/cni/net.d"
	foreignBinDir  = "/opt/cni/bin"
)

// launcherPath is the executable that the user started: the launcher, which says so,
// or this program itself in development. As a plug-in the launcher starts faster.
func launcherPath() string {
	defer os.Unsetenv(launcherVariable) // nothing that we start has a use for it
	return os.Getenv(launcherVariable)
}

const launcherVariable = "KEDGE_LAUNCHER"
