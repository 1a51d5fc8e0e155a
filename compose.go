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
	"kedge/internal/hostaddr"
	"kedge/internal/joining"
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
	"kedge/server/identity"
	"kedge/server/servicelb"
)

// settings are the configurations of all parts. They are composed once, in
// compose or composeAgent, and not changed afterwards.
type settings struct {
	dataDir, runDir string
	nodeName        string
	nodeIPs         []netip.Addr
	findIPs         func() ([]netip.Addr, error) // nil where the administrator has fixed them
	fixedAPI        bool                         // likewise where others reach the API
	disableAgent    bool
	agentOnly       bool            // no control plane: datastore and server say nothing
	cluster         joining.Cluster // what all nodes have in common
	log             logging.Config
	warnings        []string // of settings that have no effect
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

// compose turns the flags of a server into configurations and derives what depends
// on several. It reports all mistakes at once and touches nothing but the host's
// name and addresses. others is what a server was told that has joined others, nil for
// the first of a cluster.
func compose(c *cli.Context, others *server.Entered) (settings, error) {
	p := &flagParser{c: c}
	s := basics(p)
	s.disableAgent = c.Bool("disable-agent")
	s.datastore, s.server = datastore.DefaultConfig(), server.DefaultConfig()
	if others == nil {
		s.cluster = p.cluster()
	} else {
		p.sameCluster(others.Cluster)
		s.cluster, s.datastore.Join = others.Cluster, others.Admission
	}
	s.nodeIPs, s.findIPs = p.nodeIPs(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs)
	s.controlPlane(p)
	s.node(p)
	p.differentPorts()
	return s, s.finish(p)
}

// composeAgent is compose for a machine that has no control plane: what is about the
// cluster comes from a server. address is the machine's own towards that server.
func composeAgent(c *cli.Context, cluster joining.Cluster, address netip.Addr) (settings, error) {
	p := &flagParser{c: c}
	s := basics(p)
	s.agentOnly, s.cluster = true, cluster
	s.nodeIPs, s.findIPs = p.nodeIPs(cluster.ClusterCIDRs, cluster.ServiceCIDRs)
	if s.findIPs != nil && hostaddr.Has(address) { // it may have moved since
		s.nodeIPs = prefer(s.nodeIPs, address)
	}
	s.node(p)
	return s, s.finish(p)
}

// prefer replaces the address of its family. Where the route to the servers and the
// default route differ, the others reach this machine by the former.
func prefer(addrs []netip.Addr, towardsServers netip.Addr) []netip.Addr {
	addrs = slices.Clone(addrs)
	for i, a := range addrs {
		if a.Is4() == towardsServers.Is4() {
			addrs[i] = towardsServers
		}
	}
	return addrs
}

// composeAny is for commands about the node that this machine has or may get.
func composeAny(c *cli.Context) (settings, error) {
	cluster, address, joined, err := joining.Known(agentDir(c.String("data-dir")))
	if err != nil {
		return settings{}, err
	}
	if joined {
		return composeAgent(c, cluster, address)
	}
	dir := serverDir(c.String("data-dir"))
	others, entered, err := server.EnteredBefore(dir)
	switch {
	case err != nil:
		return settings{}, err
	case entered:
		return compose(c, &others)
	case c.String("server") != "" && !identity.Exists(dir):
		return composeAgent(c, usualCluster(), netip.Addr{})
	}
	return compose(c, nil)
}

// usualCluster stands for the cluster's settings where they are not known yet.
func usualCluster() joining.Cluster {
	usual := server.DefaultConfig()
	return joining.Cluster{
		ClusterCIDRs: usual.ClusterCIDRs, ServiceCIDRs: usual.ServiceCIDRs, ClusterDomain: usual.ClusterDomain,
		ClusterDNS: tenthOf(usual.ServiceCIDRs), Backend: string(backend.DefaultConfig().Mode),
	}
}

// agentDir is where an agent keeps its key and certificates.
func agentDir(dataDir string) string { return filepath.Join(dataDir, "agent") }

// serverDir is where a server keeps its keys, certificates and store.
func serverDir(dataDir string) string { return filepath.Join(dataDir, "server") }

// basics are what a machine has with and without a control plane.
func basics(p *flagParser) settings {
	return settings{
		dataDir:   p.dir("data-dir"),
		runDir:    p.dir("run-dir"),
		nodeName:  p.nodeName(),
		log:       p.logging(),
		runtime:   runtime.DefaultConfig(),
		network:   network.DefaultConfig(),
		backend:   backend.DefaultConfig(),
		agent:     agent.DefaultConfig(),
		preflight: preflight.DefaultConfig(),
	}
}

// finish composes what rests on all the rest, and validates.
func (s *settings) finish(p *flagParser) error {
	pf := &s.preflight
	pf.DataDir, pf.RunDir, pf.NodeName = s.dataDir, s.runDir, s.nodeName
	pf.IPv6 = slices.ContainsFunc(s.cluster.ClusterCIDRs, func(r netip.Prefix) bool { return r.Addr().Is6() })
	pf.Ranges, pf.OwnLinks = slices.Concat(s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs), cni.LinkPrefix(s.nodeName)
	pf.VXLAN = s.agentOnly && s.backend.Mode == backend.VXLAN // a server may stay alone
	pf.Snapshotter, pf.SnapshotterFile = s.runtime.Snapshotter, s.runtime.SnapshotterFile()
	pf.BuildDate = buildTime()
	pf.Ports = nil
	if !s.agentOnly {
		pf.Ports = append(pf.Ports, preflight.Port{Number: s.server.HTTPSPort, Protocol: "tcp", Purpose: "API server"})
	}
	pf.Ports = append(pf.Ports, preflight.Port{Number: s.agent.KubeletPort, Protocol: "tcp", Purpose: "kubelet"})
	if p.err() == nil { // what follows from a mistake is not worth a line of its own
		p.fail(s.validate())
	}
	s.warnings = p.warnings
	return p.err()
}

// validate asks every part that will run.
func (s *settings) validate() error {
	var errs []error
	if !s.agentOnly {
		errs = append(errs, s.server.Validate(), s.datastore.Validate())
	}
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
	dir := serverDir(s.dataDir)
	s.datastore.Dir = filepath.Join(dir, "store")
	s.datastore.MemberName = s.nodeName
	s.datastore.Peer = identity.PeerConfig(dir, p.port("peer-port"), s.nodeIPs)

	sv := &s.server
	sv.Dir = dir
	sv.NodeName, sv.HasNode = s.nodeName, !s.disableAgent
	sv.ClusterCIDRs, sv.ServiceCIDRs = s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs
	sv.ForeignPods = s.cluster.Backend == string(backend.None)
	sv.ClusterDomain = s.cluster.ClusterDomain
	sv.NodePortRange = p.nodePorts("service-node-port-range")
	sv.NodeIPs = s.nodeIPs
	sv.BindAddress = p.addr("bind-address")
	sv.HTTPSPort = int(p.port("https-listen-port"))
	sv.AdvertiseAddress = p.addr("advertise-address")
	s.fixedAPI = sv.AdvertiseAddress.IsValid()
	if !sv.AdvertiseAddress.IsValid() && len(s.nodeIPs) > 0 {
		sv.AdvertiseAddress = s.nodeIPs[0]
	}
	s.cluster.Servers = []string{"https://" + netip.AddrPortFrom(sv.AdvertiseAddress, uint16(sv.HTTPSPort)).String()}
	sv.Cluster = s.cluster
	sv.AgentCertificateLife = p.c.Duration("agent-certificate-life")
	sv.TLSSANs = slices.Concat(splitList(p.c.StringSlice("tls-san")), splitList(p.c.StringSlice("node-external-ip")))
	sv.Kubeconfig = p.dir("write-kubeconfig")
	sv.KubeconfigMode = p.mode("write-kubeconfig-mode")
	sv.Token, sv.ServerToken = p.fixedTokens(dir)
	sv.APIServerArgs = p.c.StringSlice("kube-apiserver-arg")
	sv.ControllerArgs = p.c.StringSlice("kube-controller-manager-arg")
	sv.SchedulerArgs = p.c.StringSlice("kube-scheduler-arg")
	if !s.cluster.NoDNS {
		// One that is not of the service range nobody else can get.
		sv.ClusterDNS = slices.DeleteFunc(slices.Clone(s.cluster.ClusterDNS), func(a netip.Addr) bool {
			return !slices.ContainsFunc(s.cluster.ServiceCIDRs, func(r netip.Prefix) bool { return r.Contains(a) })
		})
	}
	if !s.cluster.NoBalancer {
		s.balancer = &servicelb.Config{Pools: p.pools(s.cluster.Pools), Reserved: []uint16{uint16(sv.HTTPSPort), uint16(p.c.Int("kubelet-port"))}}
	}
}

// peers is where the stores of other servers find this machine's.
func (s *settings) peers() []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range s.nodeIPs {
		out = append(out, netip.AddrPortFrom(a, s.datastore.Peer.Port))
	}
	return out
}

// node composes the kubelet, the container runtime, the pod network and the data path.
func (s *settings) node(p *flagParser) {
	n := &s.network
	n.DataDir, n.RunDir = s.dataDir, s.runDir
	n.NodeName = s.nodeName
	n.Plugin = launcherPath()
	n.ClusterCIDRs, n.ServiceCIDRs = s.cluster.ClusterCIDRs, s.cluster.ServiceCIDRs

	b := &s.backend
	b.NodeName, b.NodeIPs, b.Interface = s.nodeName, s.nodeIPs, p.c.String("flannel-iface")
	b.Mode, b.Ranges = p.backend(s.cluster.Backend), s.cluster.ClusterCIDRs
	b.KeyFile = filepath.Join(s.runDir, "network", "wireguard.key")
	if s.cluster.External {
		b.External = p.addrs("node-external-ip")
	}
	n.NodeIPs, n.Overhead = b.NodeIPs, b.Overhead()

	r := &s.runtime
	r.DataDir, r.RunDir, r.ImagesDir = s.dataDir, s.runDir, filepath.Join(s.dataDir, "images")
	r.NodeName = s.nodeName
	r.Snapshotter = p.oneOf("snapshotter", runtime.SnapshotterOverlayFS, runtime.SnapshotterNative)
	r.CgroupDriver = runtime.DetectCgroupDriver()
	r.CNIConfDir, r.CNIBinDir = n.ConfDir(), n.BinDir()
	if b.Mode == backend.None {
		r.CNIConfDir, r.CNIBinDir = foreignConfDir, foreignBinDir
	}
	r.RegistriesFile = p.path("private-registry")

	a := &s.agent
	a.DataDir, a.RunDir = s.dataDir, s.runDir
	a.NodeName, a.NodeIPs, a.ExternalIPs = s.nodeName, s.nodeIPs, p.addrs("node-external-ip")
	a.NodeLabels = splitList(p.c.StringSlice("node-label"))
	a.NodeTaints = splitList(p.c.StringSlice("node-taint"))
	a.ClusterDNS, a.ClusterDomain = s.cluster.ClusterDNS, s.cluster.ClusterDomain
	if a.ResolvConf = p.c.String("resolv-conf"); a.ResolvConf == "" {
		a.ResolvConf = resolvconf.Find()
	}
	a.RuntimeEndpoint = r.Socket()
	a.CgroupRoot = "/kedge-" + s.nodeName
	a.SystemdCgroups = r.CgroupDriver == runtime.CgroupDriverSystemd
	a.KubeletPort = int(p.port("kubelet-port"))
	a.KubeletArgs = p.c.StringSlice("kubelet-arg")
	s.dataPath(p)
}

// dataPath composes services, policies and names, as far as they are wanted.
func (s *settings) dataPath(p *flagParser) {
	k := s.cluster
	if !k.NoDNS {
		d := dns.DefaultConfig()
		d.Addresses, d.Domain = k.ClusterDNS, k.ClusterDomain
		d.Ranges = slices.Concat(k.ClusterCIDRs, k.ServiceCIDRs)
		d.ResolvConf = p.c.String("resolv-conf")
		s.dns = &d
	}
	if !k.NoProxy {
		px := proxy.DefaultConfig()
		px.NodeName, px.NodeIPs = s.nodeName, s.nodeIPs
		px.LinkPrefix, px.ForeignPrefix = cni.LinkPrefix(s.nodeName), cni.LinkTag
		px.ClusterRanges, px.ServiceRanges = k.ClusterCIDRs, k.ServiceCIDRs
		px.NodePortsOn = p.nodePortAddresses()
		if !k.NoBalancer {
			px.Pools = p.pools(k.Pools)
		}
		px.Scheduler = nft.Scheduler(p.c.String("proxy-scheduler"))
		if s.dns != nil {
			px.Own = k.ClusterDNS
		}
		s.proxy = &px
	}
	if pools := p.pools(k.Pools); !k.NoBalancer && len(pools) > 0 {
		s.announcer = &loadbalancer.Config{NodeName: s.nodeName, Pools: pools, PodLinks: cni.LinkTag}
	}
	// What attaches pods has to ask before it does, which another's plug-in does not.
	if !k.NoPolicy && s.backend.Mode != backend.None {
		s.policy = &policy.Config{NodeName: s.nodeName}
		if s.dns != nil {
			s.policy.DNS = k.ClusterDNS
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
func launcherPath() string { return os.Getenv(launcherVariable) }

const launcherVariable = "KEDGE_LAUNCHER"
