package assembly

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"

	"kedge/agent"
	"kedge/assembly/parts"
	"kedge/datastore"
	"kedge/datastore/external"
	"kedge/dns"
	"kedge/internal/addresspool"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/kernelnet"
	"kedge/internal/logging"
	"kedge/network"
	"kedge/network/backend"
	"kedge/network/cni"
	"kedge/network/loadbalancer"
	"kedge/network/nft/services"
	"kedge/network/policy"
	"kedge/network/proxy"
	"kedge/preflight"
	"kedge/runtime"
	"kedge/server"
	"kedge/server/identity"
	"kedge/server/membership"
	"kedge/server/servicelb"
	"kedge/server/snapshots"
	"kedge/settings"
)

// Config has the configurations of all components of a node. A machine that joins composes it again with the cluster's
// settings; the components' configurations are not changed afterwards.
type Config struct {
	DataDir, RunDir string
	NodeName        string
	NodeIPs         []netip.Addr
	findIPs         func() ([]netip.Addr, error) // nil if the administrator has set --node-ip
	fixedAPI        bool                         // the administrator has set --advertise-address
	role            parts.Role
	parts           parts.Parts     // which of those below are used
	cluster         joining.Cluster // settings that are equal on all nodes
	log             logging.Config
	logFile         string   // empty for the standard error output
	flags           []string // for commands of kedge about this node
	warnings        []string // about settings without effect
	Preflight       preflight.Config

	datastore datastore.Config
	etcd      *external.Config // the external datastore, in place of datastore; nil for none
	// joined means that this server has joined other servers, and joinedExternal that their datastore is an external one.
	joined, joinedExternal bool

	server  server.Config
	runtime runtime.Config
	network network.Config
	backend backend.Config
	agent   agent.Config

	snapshots snapshots.Config

	// Configurations of components that can be disabled.
	proxy     proxy.Config
	policy    policy.Config
	dns       dns.Config
	balancer  servicelb.Config
	announcer loadbalancer.Config
}

// Input is the input from which a configuration is composed.
type Input struct {
	Values settings.Values
	Host   Host
	Build  Build
	// Token is the text of --token, or of the file that --token-file names.
	Token string
	// Warnings are about settings without effect.
	Warnings []string
	// Role is the role in which the node will run, for [Check]; 0 for that of the data directory.
	Role settings.Role
}

// composer composes one configuration and collects the errors.
type composer struct {
	Input
	Config

	errs     []error
	badPools bool // errs has the error of --lb-pool already
}

func (c *composer) fail(errs ...error) {
	if err := errors.Join(errs...); err != nil {
		c.errs = append(c.errs, err)
	}
}

// composeServer composes the configuration of a server, reports all errors at once, and changes nothing. answer
// is the answer of the other servers when this server joined them, nil for the first server of a cluster.
func composeServer(in Input, answer *membership.Joined) (Config, error) {
	c := newComposer(in)
	if settings.DisableAgent.In(c.Values) {
		c.role = parts.ServerOnly
	}
	c.datastore, c.server = datastore.DefaultConfig(), server.DefaultConfig()
	c.cluster = c.Values.Cluster()
	if answer != nil {
		c.fail(c.Values.Contradictions(answer.Cluster)...)
		c.cluster, c.joined = answer.Cluster, true
		if c.joinedExternal = answer.Admission != nil && answer.Admission.External; !c.joinedExternal {
			c.datastore.Join = answer.Admission
		}
	}
	c.externalStore()
	c.parts = parts.Of(c.role, c.cluster)
	if absent := c.Values.Absent(); len(absent) > 0 {
		c.warnings = append(c.warnings, "kedge has no "+strings.Join(absent, ", ")+"; nothing to disable")
	}
	c.addresses()
	c.controlPlane()
	c.snapshots()
	c.node()
	c.differentPorts()
	return c.finish()
}

// composeAgent composes the configuration of a machine without a control plane. cluster comes from a server.
// address is the machine's source address for connections to that server.
func composeAgent(in Input, cluster joining.Cluster, address netip.Addr) (Config, error) {
	c := newComposer(in)
	c.role, c.cluster = parts.Agent, cluster
	c.parts = parts.Of(c.role, c.cluster)
	c.addresses()
	if c.findIPs != nil && kernelnet.HasAddress(address) { // the machine may have moved since then
		c.NodeIPs = prefer(c.NodeIPs, address)
	}
	c.node()
	return c.finish()
}

// newComposer returns a composer with the parts that are common to servers and agents.
func newComposer(in Input) *composer {
	v := in.Values
	c := &composer{Input: in, Config: Config{
		DataDir:   absolute(settings.DataDir.In(v)),
		RunDir:    absolute(settings.RunDir.In(v)),
		log:       logging.Config{Level: settings.LogLevel.In(v), Format: logging.Format(settings.LogFormat.In(v))},
		logFile:   absolute(settings.Log.In(v)),
		warnings:  in.Warnings,
		runtime:   runtime.DefaultConfig(),
		network:   network.DefaultConfig(),
		backend:   backend.DefaultConfig(),
		agent:     agent.DefaultConfig(),
		Preflight: preflight.DefaultConfig(),
	}}
	if settings.Debug.In(v) {
		c.log.Level = min(c.log.Level, slog.LevelDebug)
	}
	c.flags = []string{"--data-dir=" + c.DataDir, "--run-dir=" + c.RunDir}
	if file := settings.Kubeconfig.In(v); file != "" { // of a server
		c.flags = append(c.flags, "--write-kubeconfig="+absolute(file))
	}
	if settings.Config.IsSet(v) { // a file that is named must exist
		c.flags = append(c.flags, "--config="+absolute(settings.Config.In(v)))
	}
	var err error
	if c.NodeName, err = in.Host.nodeName(v); err != nil {
		c.fail(errorkind.Permanent(err))
	}
	return c
}

// absolute returns path as an absolute path. If the working directory does not exist any more, the path stays
// relative, and Validate refuses it.
func absolute(path string) string {
	if path == "" {
		return ""
	}
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}

// addresses sets the node's addresses: those of --node-ip, or the machine's own addresses of the families that pods
// have, which may change.
func (c *composer) addresses() {
	if c.NodeIPs = settings.NodeIPs.In(c.Values); len(c.NodeIPs) > 0 {
		return
	}
	pods, all := c.cluster.ClusterCIDRs, slices.Concat(c.cluster.ClusterCIDRs, c.cluster.ServiceCIDRs)
	ipv4 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is4() })
	ipv6 := slices.ContainsFunc(pods, func(r netip.Prefix) bool { return r.Addr().Is6() })
	link := settings.FlannelIface.In(c.Values)
	c.findIPs = func() ([]netip.Addr, error) {
		if link == "" {
			return c.Host.Addresses(ipv4, ipv6, all)
		}
		found, err := c.Host.AddressesOf(link)
		return slices.DeleteFunc(found, func(a netip.Addr) bool { return a.Is4() && !ipv4 || a.Is6() && !ipv6 }), err
	}
	var err error
	if c.NodeIPs, err = c.findIPs(); err != nil && link != "" {
		err = errorkind.BadSetting(settings.FlannelIface.Name, ": %w", err)
	}
	c.fail(err)
}

// prefer replaces the address of the same family by towardsServers. If the route to the servers and the default
// route differ, the other nodes reach this machine by the former.
func prefer(addrs []netip.Addr, towardsServers netip.Addr) []netip.Addr {
	addrs = slices.Clone(addrs)
	for i, a := range addrs {
		if a.Is4() == towardsServers.Is4() {
			addrs[i] = towardsServers
		}
	}
	return addrs
}

// controlPlane composes the API server and the components that belong to it.
func (c *composer) controlPlane() {
	v, dir := c.Values, serverDir(c.DataDir)
	c.datastore.Dir = filepath.Join(dir, "store")
	c.datastore.MemberName = c.NodeName
	c.datastore.Peer = identity.PeerConfig(dir, settings.PeerPort.In(v), c.NodeIPs)

	s := &c.server
	s.Dir = dir
	s.NodeName, s.HasNode = c.NodeName, c.parts.Node
	s.ClusterCIDRs, s.ServiceCIDRs = c.cluster.ClusterCIDRs, c.cluster.ServiceCIDRs
	s.ForeignPods = c.cluster.Backend == string(backend.None)
	s.ClusterDomain = c.cluster.ClusterDomain
	s.NodePortRange = settings.NodePortRange.In(v)
	s.NodeIPs = c.NodeIPs
	s.BindAddress = settings.BindAddress.In(v)
	s.HTTPSPort = int(settings.HTTPSPort.In(v))
	s.AdvertiseAddress = settings.AdvertiseAddress.In(v)
	c.fixedAPI = s.AdvertiseAddress.IsValid()
	if !c.fixedAPI && len(c.NodeIPs) > 0 {
		s.AdvertiseAddress = c.NodeIPs[0]
	}
	c.cluster.Servers = []string{"https://" + netip.AddrPortFrom(s.AdvertiseAddress, settings.HTTPSPort.In(v)).String()}
	s.Cluster = c.cluster
	s.AgentCertificateLife = settings.AgentCertificateLife.In(v)
	for _, a := range settings.NodeExternalIPs.In(v) {
		s.TLSSANs = append(s.TLSSANs, a.String())
	}
	s.TLSSANs = slices.Concat(settings.TLSSANs.In(v), s.TLSSANs)
	s.Kubeconfig = absolute(settings.Kubeconfig.In(v))
	s.KubeconfigMode = settings.KubeconfigMode.In(v)
	s.KubeconfigName = settings.KubeconfigName.In(v)
	s.Token, s.ServerToken = c.fixedTokens(dir)
	s.APIServerArgs = settings.APIServerArgs.In(v)
	s.ControllerArgs = settings.ControllerArgs.In(v)
	s.SchedulerArgs = settings.SchedulerArgs.In(v)
	if !c.cluster.NoDNS {
		// A Service can only be given an address of the service range.
		s.ClusterDNS = slices.DeleteFunc(slices.Clone(c.cluster.ClusterDNS), func(a netip.Addr) bool {
			return !slices.ContainsFunc(c.cluster.ServiceCIDRs, func(r netip.Prefix) bool { return r.Contains(a) })
		})
	}
	if c.parts.Balancer {
		c.balancer = servicelb.Config{Pools: c.pools(), Reserved: []uint16{settings.HTTPSPort.In(v), settings.KubeletPort.In(v)}}
	}
}

// fixedTokens returns the permanent secrets for joining as agent and as server: those of the settings if --token is not a
// token for joining other servers, and otherwise those of the other servers.
func (c *composer) fixedTokens(serverDir string) (agents, servers joining.Secret) {
	if settings.JoinServer.In(c.Values) == "" {
		return joining.Secret(c.Token), joining.Secret(settings.ServerToken.In(c.Values))
	}
	if settings.ServerToken.IsSet(c.Values) {
		c.fail(errorkind.BadSetting(settings.ServerToken.Name, " is for the first server of a cluster, from which other servers get it; leave it out"))
	}
	agents, servers, err := identity.FixedTokens(serverDir)
	c.fail(err)
	return agents, servers
}

// pools returns the address pools for services of type LoadBalancer.
func (c *composer) pools() []addresspool.Pool {
	pools, err := addresspool.Parse(c.cluster.Pools)
	if err != nil && !c.badPools {
		c.badPools = true
		c.fail(errorkind.BadSetting(settings.LBPools.Name, ": %w", err))
	}
	return pools
}

// node composes the kubelet, the container runtime, the pod network and the data path.
func (c *composer) node() {
	v, n := c.Values, &c.network
	n.DataDir, n.RunDir = c.DataDir, c.RunDir
	n.NodeName = c.NodeName
	n.Plugin = c.Host.Launcher // the launcher starts faster as a CNI plugin
	n.ClusterCIDRs, n.ServiceCIDRs = c.cluster.ClusterCIDRs, c.cluster.ServiceCIDRs

	b := &c.backend
	b.NodeName, b.NodeIPs, b.Interface = c.NodeName, c.NodeIPs, settings.FlannelIface.In(v)
	var err error
	if b.Mode, err = backend.ParseMode(c.cluster.Backend); err != nil {
		c.fail(errorkind.BadSetting(settings.FlannelBackend.Name, " %w", err))
	}
	b.Ranges = c.cluster.ClusterCIDRs
	b.KeyFile = filepath.Join(c.RunDir, "network", "wireguard.key")
	if c.cluster.External {
		b.External = settings.NodeExternalIPs.In(v)
	}
	n.NodeIPs, n.Overhead = b.NodeIPs, b.Overhead()

	r := &c.runtime
	r.DataDir, r.RunDir, r.ImagesDir = c.DataDir, c.RunDir, filepath.Join(c.DataDir, "images")
	r.NodeName = c.NodeName
	r.Snapshotter = settings.Snapshotter.In(v)
	r.CgroupDriver = c.Host.CgroupDriver
	r.CNIConfDir, r.CNIBinDir = n.ConfDir(), n.BinDir()
	if b.Mode == backend.None {
		r.CNIConfDir, r.CNIBinDir = foreignConfDir, foreignBinDir
	}
	r.RegistriesFile = absolute(settings.PrivateRegistry.In(v))

	a := &c.agent
	a.DataDir, a.RunDir = c.DataDir, c.RunDir
	a.NodeName, a.NodeIPs, a.ExternalIPs = c.NodeName, c.NodeIPs, settings.NodeExternalIPs.In(v)
	a.NodeLabels = settings.NodeLabels.In(v)
	a.NodeTaints = settings.NodeTaints.In(v)
	a.ClusterDNS, a.ClusterDomain = c.cluster.ClusterDNS, c.cluster.ClusterDomain
	if a.ResolvConf = settings.ResolvConf.In(v); a.ResolvConf == "" {
		a.ResolvConf = c.Host.ResolvConf
	}
	a.RuntimeEndpoint = r.Socket()
	a.CgroupRoot = "/kedge-" + c.NodeName
	a.SystemdCgroups = r.CgroupDriver == runtime.CgroupDriverSystemd
	a.KubeletPort = int(settings.KubeletPort.In(v))
	a.HostPaths = settings.HostPaths.In(v)
	a.KubeletArgs = settings.KubeletArgs.In(v)
	c.dataPath()
}

// dataPath composes services, policies and DNS, unless they are disabled.
func (c *composer) dataPath() {
	v, k := c.Values, c.cluster
	if !k.NoDNS {
		c.network.Resolver = k.ClusterDNS
		d := dns.DefaultConfig()
		d.Addresses, d.Domain = k.ClusterDNS, k.ClusterDomain
		d.Ranges = slices.Concat(k.ClusterCIDRs, k.ServiceCIDRs)
		d.ResolvConf = settings.ResolvConf.In(v)
		c.dns = d
	}
	if !k.NoProxy {
		p := proxy.DefaultConfig()
		p.NodeName, p.NodeIPs = c.NodeName, c.NodeIPs
		p.LinkPrefix, p.ForeignPrefix = cni.LinkPrefix(c.NodeName), cni.LinkTag
		p.ClusterRanges, p.ServiceRanges = k.ClusterCIDRs, k.ServiceCIDRs
		p.NodePortsOn = c.nodePortAddresses()
		if !k.NoBalancer {
			p.Pools = c.pools()
		}
		p.Scheduler = services.Scheduler(settings.ProxyScheduler.In(v))
		if !k.NoDNS {
			p.Own = k.ClusterDNS
		}
		c.proxy = p
	}
	c.announcer = loadbalancer.Config{NodeName: c.NodeName, Pools: c.pools(), PodLinks: cni.LinkTag}
	c.policy = policy.Config{NodeName: c.NodeName}
	if !k.NoDNS {
		c.policy.DNS = k.ClusterDNS
	}
}

// nodePortAddresses returns the ranges of the setting, or nil for the node's own addresses.
func (c *composer) nodePortAddresses() []netip.Prefix {
	given := settings.NodePortAddresses.In(c.Values)
	if len(given) == 1 && !given[0].IsValid() {
		return nil
	}
	if slices.ContainsFunc(given, func(r netip.Prefix) bool { return !r.IsValid() }) {
		c.fail(errorkind.BadItem(settings.NodePortAddresses.Name, "primary", " \"primary\" cannot be combined with ranges; leave the ranges out, or list the node's addresses"))
	}
	return given
}

// Folders in which foreign CNI plugins put their configuration and programs.
const (
	foreignConfDir = "/etc/cni/net.d"
	foreignBinDir  = "/opt/cni/bin"
)

// differentPorts reports settings with the same port. The peer port counts only if it is set explicitly: a
// single server does not listen on it.
func (c *composer) differentPorts() {
	ports := []settings.Of[uint16]{settings.HTTPSPort}
	if c.parts.Node {
		ports = append(ports, settings.KubeletPort)
	}
	if settings.PeerPort.IsSet(c.Values) {
		ports = append(ports, settings.PeerPort)
	}
	for i, p := range ports {
		for _, other := range ports[:i] {
			if n := p.In(c.Values); n == other.In(c.Values) {
				c.fail(errorkind.BadSettings(p.Name, fmt.Sprint(n), other.Name, " are the same port; choose another for one of them"))
			}
		}
	}
}

// finish composes the configurations that depend on the others, and validates all.
func (c *composer) finish() (Config, error) {
	p := &c.Preflight
	p.DataDir, p.RunDir, p.NodeName = c.DataDir, c.RunDir, c.NodeName
	p.IPv6 = slices.ContainsFunc(c.cluster.ClusterCIDRs, func(r netip.Prefix) bool { return r.Addr().Is6() })
	p.PodRanges, p.DNS = c.cluster.ClusterCIDRs, c.cluster.ClusterDNS
	p.Ranges, p.OwnLinks = slices.Concat(c.cluster.ClusterCIDRs, c.cluster.ServiceCIDRs), cni.LinkPrefix(c.NodeName)
	// A first server may stay the only node, which needs no VXLAN.
	p.VXLAN = !c.parts.Witness && c.backend.Mode == backend.VXLAN && (c.role == parts.Agent || settings.JoinServer.In(c.Values) != "" || c.datastore.Join != nil || c.joinedExternal)
	p.Snapshotter, p.SnapshotterFile = c.runtime.Snapshotter, c.runtime.SnapshotterFile()
	p.BuildDate = c.Build.Time
	p.Ports = nil
	if c.parts.ControlPlane {
		p.Ports = append(p.Ports, preflight.Port{Number: c.server.HTTPSPort, Protocol: "tcp", Purpose: "API server"})
	}
	if c.parts.Witness {
		p.Ports = append(p.Ports, preflight.Port{Number: int(c.datastore.Peer.Port), Protocol: "tcp", Purpose: "datastores of the servers"})
	}
	if p.NoNode = !c.parts.Node; !p.NoNode {
		p.Ports = append(p.Ports, preflight.Port{Number: c.agent.KubeletPort, Protocol: "tcp", Purpose: "kubelet"})
	}
	if len(c.errs) == 0 { // errors that follow from an earlier error are not reported
		c.fail(c.validate())
	}
	return c.Config, errors.Join(c.errs...)
}

// validate validates the configurations of the components that will run. Those of policies and load balancers have nothing
// that could be wrong.
func (c *Config) validate() error {
	var errs []error
	if c.parts.Witness {
		return c.datastore.Validate()
	}
	if c.parts.ControlPlane {
		errs = append(errs, c.server.Validate())
		if c.etcd != nil {
			errs = append(errs, c.etcd.Validate())
		} else {
			errs = append(errs, c.datastore.Validate())
		}
	}
	if !c.parts.Node {
		return errors.Join(errs...)
	}
	errs = append(errs, c.agent.Validate(), c.runtime.Validate(), c.network.Validate(), c.backend.Validate())
	if c.parts.Services {
		errs = append(errs, c.proxy.Validate())
	}
	if c.parts.DNS {
		errs = append(errs, c.dns.Validate())
	}
	return errors.Join(errs...)
}

// peers returns the addresses of this machine's datastore for other servers.
func (c *Config) peers() []netip.AddrPort {
	var out []netip.AddrPort
	for _, a := range c.NodeIPs {
		out = append(out, netip.AddrPortFrom(a, c.datastore.Peer.Port))
	}
	return out
}

// agentDir is the directory of an agent's key and certificates.
func agentDir(dataDir string) string { return filepath.Join(dataDir, "agent") }

// witnessDir is the directory of a witness's key, certificates and datastore.
func witnessDir(dataDir string) string { return filepath.Join(dataDir, "witness") }

// serverDir is the directory of a server's keys, certificates and datastore.
func serverDir(dataDir string) string { return filepath.Join(dataDir, "server") }
