package network

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/network/cni"
	"kedge/network/nft/services"
)

// serviceWorld is a table of services in a world, and one service in it.
type serviceWorld struct {
	*world
	table *services.Table
}

var (
	servicesV4 = netip.MustParsePrefix("10.43.0.0/16")
	servicesV6 = netip.MustParsePrefix("fd43::/112")
	webV4      = netip.MustParseAddr("10.43.0.80")
	webV6      = netip.MustParseAddr("fd43::80")
	balancerV4 = netip.MustParseAddr("203.0.113.7") // an address that no machine has
	balancerV6 = netip.MustParseAddr("2001:db8:7::7")
)

func (w *world) serviceConfig() services.Config {
	return services.Config{
		LinkPrefix: cni.LinkPrefix(w.cfg.NodeName), ForeignPrefix: cni.LinkTag,
		ClusterRanges: w.cfg.ClusterCIDRs,
		ServiceRanges: []netip.Prefix{servicesV4, servicesV6},
		NodePortsOn:   []netip.Prefix{hostPrefix(nodeV4), hostPrefix(nodeV6)},
		Scheduler:     services.Random,
	}
}

func hostPrefix(p netip.Prefix) netip.Prefix { return netip.PrefixFrom(p.Addr(), p.Addr().BitLen()) }

// newServices starts a dual-stack world in which the outside and the node have
// routes to services: the outside through the node, the node through the outside.
func newServices(t testing.TB, change func(*services.Config)) *serviceWorld {
	w := newWorld(t, dualStack()...)
	cfg := w.serviceConfig()
	if change != nil {
		change(&cfg)
	}
	w.routes(here, outsideV4.Addr(), outsideV6.Addr())
	w.routes(w.outside.Do, nodeV4.Addr(), nodeV6.Addr())
	return &serviceWorld{w, services.NewTable(w.cfg.NodeName, cfg)}
}

func (s *serviceWorld) apply(name string, ports ...services.Port) {
	s.t.Helper()
	s.must(s.table.Apply(map[string]services.Service{name: {Ports: ports}}))
}

// web is a service port with the given pods behind it, all of this node.
func web(cluster netip.Addr, pods ...*pod) services.Port {
	p := services.Port{Name: "web", ClusterIP: cluster, Protocol: unix.IPPROTO_TCP, Port: 80, Ready: len(pods) > 0}
	for _, pod := range pods {
		a := pod.addr(cluster.Is6())
		p.Cluster = append(p.Cluster, netip.AddrPortFrom(a, 8080))
		p.OnNode = append(p.OnNode, a)
	}
	p.Local = p.Cluster
	return p
}

func (p *pod) addr(is6 bool) netip.Addr {
	for _, a := range p.addrs {
		if a.Is6() == is6 {
			return a
		}
	}
	return netip.Addr{}
}

// both runs a test for each family.
func both(t *testing.T, f func(t *testing.T, is6 bool)) {
	t.Run("IPv4", func(t *testing.T) { f(t, false) })
	t.Run("IPv6", func(t *testing.T) { f(t, true) })
}

func pick[T any](is6 bool, v4, v6 T) T {
	if is6 {
		return v6
	}
	return v4
}

// refused connects and expects an error at once.
func (s *serviceWorld) refused(what string, do func(func() error) error, network, addr string) {
	s.t.Helper()
	begin := time.Now()
	_, err := s.ask(do, network, addr)
	if d := time.Since(begin); !errors.Is(err, syscall.ECONNREFUSED) || d > time.Second {
		s.t.Errorf("%s: %s %s: %v after %v, want to be refused at once", what, network, addr, err, d)
	}
}

// dropped connects and expects no answer.
func (s *serviceWorld) dropped(what string, do func(func() error) error, addr string) {
	s.t.Helper()
	err := do(func() error {
		conn, err := net.DialTimeout("tcp", addr, 300*time.Millisecond)
		if err == nil {
			conn.Close()
		}
		return err
	})
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		s.t.Errorf("%s: %s: %v, want no answer", what, addr, err)
	}
}

func TestServiceIsReached(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client, server := s.pod(), s.pod()
		s.serve(server.ns.Do, "tcp", at(server.addr(is6), 8080))
		p := web(pick(is6, webV4, webV6), server)
		p.NodePort, p.LoadBalancerIPs = 30080, []netip.Addr{pick(is6, balancerV4, balancerV6)}
		s.apply("default/web", p)

		node, outside := pick(is6, nodeV4, nodeV6).Addr(), pick(is6, outsideV4, outsideV6).Addr()
		own := client.addr(is6).String()
		s.wantSeen("pod to cluster IP", client.ns.Do, "tcp", at(p.ClusterIP, 80), own)
		s.wantSeen("pod to load balancer", client.ns.Do, "tcp", at(p.LoadBalancerIPs[0], 80), own)
		s.wantSeen("pod to node port", client.ns.Do, "tcp", at(node, 30080), own)
		s.wantSeen("node to cluster IP", here, "tcp", at(p.ClusterIP, 80), node.String())
		s.wantSeen("node to node port", here, "tcp", at(node, 30080), node.String())
		s.wantSeen("outside to cluster IP", s.outside.Do, "tcp", at(p.ClusterIP, 80), outside.String())
		s.wantSeen("outside to load balancer", s.outside.Do, "tcp", at(p.LoadBalancerIPs[0], 80), outside.String())
		s.wantSeen("outside to node port", s.outside.Do, "tcp", at(node, 30080), outside.String())
		s.refused("another port of the cluster IP", client.ns.Do, "tcp", at(p.ClusterIP, 81))
		s.refused("another port of the cluster IP", here, "tcp", at(p.ClusterIP, 81))
		s.dropped("another cluster IP", client.ns.Do, at(p.ClusterIP.Next(), 80))

		if n, err := s.table.Repair(); n != 0 || err != nil {
			t.Errorf("Repair: %d differences, %v", n, err)
		}
		s.apply("default/web")
		s.dropped("service gone", client.ns.Do, at(p.ClusterIP, 80))
		if n, err := s.table.Repair(); n != 0 || err != nil {
			t.Errorf("Repair: %d differences, %v", n, err)
		}
	})
}

func addLoopbackAddr(a netip.Addr) error { return loopbackAddr(netlink.AddrAdd, a) }
func delLoopbackAddr(a netip.Addr) error { return loopbackAddr(netlink.AddrDel, a) }

func loopbackAddr(do func(netlink.Link, *netlink.Addr) error, a netip.Addr) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return do(lo, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}})
}
