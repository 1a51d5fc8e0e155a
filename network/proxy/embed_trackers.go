package proxy

import (
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/events"
	"k8s.io/component-base/metrics/legacyregistry"
	upstream "k8s.io/kubernetes/pkg/proxy"
	"k8s.io/kubernetes/pkg/proxy/healthcheck"
	"k8s.io/kubernetes/pkg/proxy/metrics"
	proxyutil "k8s.io/kubernetes/pkg/proxy/util"

	"kedge/network/nft/services"
)

// tracker tracks the services and endpoints of one address family.
type tracker struct {
	family   corev1.IPFamily
	nodeName string
	nodeIP   netip.Addr // or the zero Addr

	// The trackers may be updated at any time.
	serviceChanges  *upstream.ServiceChangeTracker
	endpointChanges *upstream.EndpointsChangeTracker

	// The following fields belong to the goroutine that calls update.
	services        upstream.ServicePortMap
	endpoints       upstream.EndpointsMap
	ports           map[types.NamespacedName][]upstream.ServicePortName
	checks          map[types.NamespacedName]uint16 // health-check node ports
	health          healthcheck.ServiceHealthServer
	newHealthServer func(nodeIPs []netip.Addr) healthcheck.ServiceHealthServer // makes health
	listening       bool
}

func newTracker(family corev1.IPFamily, cfg Config, recorder events.EventRecorder, healthy func() bool) *tracker {
	t := &tracker{
		family: family, nodeName: cfg.NodeName,
		services: upstream.ServicePortMap{}, endpoints: upstream.EndpointsMap{},
		ports:  map[types.NamespacedName][]upstream.ServicePortName{},
		checks: map[types.NamespacedName]uint16{},
	}
	t.serviceChanges = upstream.NewServiceChangeTracker(family, nil, t.portsChanged)
	t.endpointChanges = upstream.NewEndpointsChangeTracker(family, cfg.NodeName, nil, nil)
	t.newHealthServer = func(nodeIPs []netip.Addr) healthcheck.ServiceHealthServer {
		var ranges []string
		for _, p := range cfg.nodePortsOn(nodeIPs) {
			ranges = append(ranges, p.String())
		}
		return healthcheck.NewServiceHealthServer(cfg.NodeName, recorder, proxyutil.NewNodePortAddresses(family, ranges), healthFunc(healthy), family)
	}
	t.health = t.newHealthServer(cfg.NodeIPs)
	t.nodeIP = ofFamily(cfg.NodeIPs, family)
	return t
}

// setNodeIPs sets the addresses of the node. Health checks are served there after the next
// update; the error means that they are still served at the old addresses.
func (t *tracker) setNodeIPs(addrs []netip.Addr) error {
	t.nodeIP = ofFamily(addrs, t.family)
	err := t.health.SyncServices(nil)
	t.health = t.newHealthServer(addrs)
	return err
}

func ofFamily(addrs []netip.Addr, family corev1.IPFamily) netip.Addr {
	for _, a := range addrs {
		if familyOf(a) == family {
			return a
		}
	}
	return netip.Addr{}
}

// healthFunc reports to the health checks of services whether this proxy works.
type healthFunc func() bool

// Health is called for every check of a load balancer.
func (f healthFunc) Health() healthcheck.ProxyHealth {
	return healthcheck.ProxyHealth{Healthy: f(), CurrentTime: time.Now()}
}

// portsChanged records the ports of a service; update calls it.
func (t *tracker) portsChanged(previous, current upstream.ServicePortMap) {
	for name := range previous {
		delete(t.ports, name.NamespacedName)
		delete(t.checks, name.NamespacedName)
	}
	for name, port := range current {
		t.ports[name.NamespacedName] = append(t.ports[name.NamespacedName], name)
		if n := port.HealthCheckNodePort(); n != 0 {
			t.checks[name.NamespacedName] = uint16(n)
		}
	}
}

// changes is the result of update.
type changes struct {
	services map[types.NamespacedName]bool // changed services
	triggers []time.Time                   // times of the changes in the API
	flows    bool                          // tracked UDP flows may be stale
}

func newChanges() changes { return changes{services: map[types.NamespacedName]bool{}} }

// update applies the changes that the trackers have received since the last update.
func (t *tracker) update(c *changes) {
	services := t.services.Update(t.serviceChanges)
	endpoints := t.endpoints.Update(t.endpointChanges)
	for name := range services.UpdatedServices {
		c.services[name] = true
	}
	for name := range endpoints.UpdatedServices {
		c.services[name] = true
	}
	for _, times := range endpoints.LastChangeTriggerTimes {
		c.triggers = append(c.triggers, times...)
	}
	c.flows = c.flows || endpoints.ConntrackCleanupRequired
}

// markAll marks every service as changed.
func (t *tracker) markAll(c *changes) {
	for name := range t.ports {
		c.services[name] = true
	}
}

// servicePorts returns the ports of a service, with the endpoints that connections from
// this node may use.
func (t *tracker) servicePorts(name types.NamespacedName, labels map[string]string) []services.Port {
	var out []services.Port
	for _, id := range t.ports[name] {
		s := t.services[id]
		cluster, local, all, ready := upstream.CategorizeEndpoints(t.endpoints[id], s, t.nodeName, labels)
		p := services.Port{
			Name: id.Port, Protocol: protocols[s.Protocol()], Port: uint16(s.Port()), NodePort: uint16(s.NodePort()),
			ClusterIP: addr(s.ClusterIP()), ExternalIPs: addrs(s.ExternalIPs()), LoadBalancerIPs: addrs(s.LoadBalancerVIPs()),
			InternalLocal: s.InternalPolicyLocal(), ExternalLocal: s.ExternalPolicyLocal(),
			Ready: ready, Cluster: addrPorts(cluster), Local: addrPorts(local),
		}
		if s.SessionAffinityType() == corev1.ServiceAffinityClientIP {
			p.StickyFor = time.Duration(s.StickyMaxAgeSeconds()) * time.Second
		}
		for _, e := range all {
			if a, err := netip.ParseAddr(e.IP()); err == nil && e.IsLocal() && !slices.Contains(p.OnNode, a) {
				p.OnNode = append(p.OnNode, a)
			}
		}
		p.Sources = t.sources(s)
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b services.Port) int {
		return int(a.Port)<<8 + int(a.Protocol) - int(b.Port)<<8 - int(b.Protocol)
	})
	return out
}

// sources returns the clients that may use the addresses of a load balancer. If the node
// may, so may the addresses themselves: a node that has one of them as its own uses it as
// the source address.
func (t *tracker) sources(s upstream.ServicePort) []netip.Prefix {
	var out []netip.Prefix
	node := false
	for _, r := range s.LoadBalancerSourceRanges() {
		ones, _ := r.Mask.Size()
		p := netip.PrefixFrom(addr(r.IP), ones)
		node = node || p.Contains(t.nodeIP)
		out = append(out, p)
	}
	if node {
		for _, a := range addrs(s.LoadBalancerVIPs()) {
			out = append(out, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	return out
}

// syncHealthChecks opens and closes health check node ports, and sets their answers.
func (t *tracker) syncHealthChecks() error {
	if len(t.checks) == 0 && !t.listening {
		return nil
	}
	t.listening = len(t.checks) > 0
	if err := t.health.SyncServices(t.checks); err != nil {
		return err
	}
	here := upstream.EndpointsMap{}
	for name := range t.checks {
		for _, id := range t.ports[name] {
			here[id] = t.endpoints[id]
		}
	}
	return t.health.SyncEndpoints(here.LocalReadyEndpoints())
}

// close closes the health checks: load balancers should send no new connections to a node
// whose proxy has stopped.
func (t *tracker) close() error { return t.health.SyncServices(nil) }

// checkFlows requests the check of the flows to a service's UDP ports. Flows to any serving
// endpoint stay, whatever the traffic policies are now: as with connections, a change of a
// service does not end existing ones.
func (t *tracker) checkFlows(f *flows, name types.NamespacedName, nodeIPs []netip.Addr) {
	for _, id := range t.ports[name] {
		s := t.services[id]
		if s.Protocol() != corev1.ProtocolUDP {
			continue
		}
		serving := addrPorts(slices.DeleteFunc(slices.Clone(t.endpoints[id]), func(e upstream.Endpoint) bool { return !e.IsServing() }))
		for _, ip := range slices.Concat([]net.IP{s.ClusterIP()}, s.LoadBalancerVIPs(), s.ExternalIPs()) {
			f.enqueue(netip.AddrPortFrom(addr(ip), uint16(s.Port())), serving)
		}
		if s.NodePort() == 0 {
			continue
		}
		for _, a := range nodeIPs {
			if familyOf(a) == t.family {
				f.enqueue(netip.AddrPortFrom(a, uint16(s.NodePort())), serving)
			}
		}
	}
}

// observe records metrics as kube-proxy does.
func (t *tracker) observe(began time.Time, full bool, triggers []time.Time) {
	family, took := string(t.family), time.Since(began).Seconds()
	metrics.SyncProxyRulesLatency.WithLabelValues(family).Observe(took)
	if full {
		metrics.SyncFullProxyRulesLatency.WithLabelValues(family).Observe(took)
	} else {
		metrics.SyncPartialProxyRulesLatency.WithLabelValues(family).Observe(took)
	}
	for _, at := range triggers {
		metrics.NetworkProgrammingLatency.WithLabelValues(family).Observe(time.Since(at).Seconds())
	}
	metrics.SyncProxyRulesLastTimestamp.WithLabelValues(family).SetToCurrentTime()
}

func (t *tracker) observeQueued() {
	metrics.SyncProxyRulesLastQueuedTimestamp.WithLabelValues(string(t.family)).SetToCurrentTime()
}

func (t *tracker) observeFailure() {
	metrics.NFTablesSyncFailuresTotal.WithLabelValues(string(t.family)).Inc()
}

// registerMetrics registers the metrics of kube-proxy that this proxy provides.
var registerMetrics = sync.OnceFunc(func() {
	legacyregistry.MustRegister(
		metrics.SyncProxyRulesLatency, metrics.SyncFullProxyRulesLatency, metrics.SyncPartialProxyRulesLatency,
		metrics.SyncProxyRulesLastQueuedTimestamp, metrics.SyncProxyRulesLastTimestamp,
		metrics.EndpointChangesPending, metrics.EndpointChangesTotal,
		metrics.ServiceChangesPending, metrics.ServiceChangesTotal,
		metrics.NetworkProgrammingLatency, metrics.NFTablesSyncFailuresTotal,
	)
})

var protocols = map[corev1.Protocol]uint8{
	corev1.ProtocolTCP: unix.IPPROTO_TCP, corev1.ProtocolUDP: unix.IPPROTO_UDP, corev1.ProtocolSCTP: unix.IPPROTO_SCTP,
}

// serviceChanged passes on a change; nil means that the service does not exist.
func (t *tracker) serviceChanged(old, now *corev1.Service) { t.serviceChanges.Update(old, now) }

// sliceChanged passes on a change of endpoints.
func (t *tracker) sliceChanged(s *discoveryv1.EndpointSlice, gone bool) bool {
	return t.endpointChanges.EndpointSliceUpdate(s, gone)
}

func addr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func addrs(ips []net.IP) []netip.Addr {
	var out []netip.Addr
	for _, ip := range ips {
		out = append(out, addr(ip))
	}
	return out
}

func addrPorts(list []upstream.Endpoint) []netip.AddrPort {
	out := make([]netip.AddrPort, 0, len(list))
	for _, e := range list {
		if a, err := netip.ParseAddr(e.IP()); err == nil {
			out = append(out, netip.AddrPortFrom(a.Unmap(), uint16(e.Port())))
		}
	}
	return out
}
