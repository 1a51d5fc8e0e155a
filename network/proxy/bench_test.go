package proxy

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
)

// contender is a proxy in the benchmarks.
type contender interface {
	// begin receives all objects, and returns when the rules are written.
	begin([]*corev1.Service, []*discoveryv1.EndpointSlice) error
	change(old, now *discoveryv1.EndpointSlice)
	end()
}

// ourProxy calls the functions that the informers would call.
type ourProxy struct {
	*Proxy
	stop context.CancelFunc
	done chan struct{}
}

func newOurProxy(b *testing.B) contender {
	cfg := DefaultConfig()
	cfg.NodeName, cfg.LinkPrefix, cfg.ForeignPrefix, cfg.NodeIPs = "node1", "kdgtest", "kdg", []netip.Addr{benchNode}
	return &ourProxy{Proxy: proxyOf(b, cfg)}
}

func (p *ourProxy) begin(services []*corev1.Service, slices []*discoveryv1.EndpointSlice) error {
	for _, s := range services {
		p.serviceChanged(nil, s)
	}
	for _, s := range slices {
		p.sliceChanged(nil, s)
	}
	ctx, stop := context.WithCancel(context.Background())
	ready := make(chan struct{})
	p.stop, p.done = stop, make(chan struct{})
	go p.flows.run(ctx)
	go func() {
		p.loop(ctx, func() {
			select {
			case <-ready:
			default:
				close(ready)
			}
		})
		close(p.done)
	}()
	<-ready
	return p.Check(ctx)
}

func (p *ourProxy) change(old, now *discoveryv1.EndpointSlice) { p.sliceChanged(old, now) }

func (p *ourProxy) end() {
	p.stop()
	<-p.done
	p.close()
}

var (
	benchNode = netip.MustParseAddr("192.0.2.1")
	benchPeer = netip.MustParseAddr("192.0.2.2")
)

// benchNet joins the test's namespace, the node, to one with two servers, which
// answer datagrams with their names on the ports 8081 and 8082.
func benchNet(b *testing.B) {
	host.RequireIsolation(b)
	must := func(err error) {
		b.Helper()
		if err != nil {
			b.Fatal(err)
		}
	}
	peer, err := namespaces.NewNetwork()
	must(err)
	cable := netlink.NewVeth(netlink.NewLinkAttrs())
	cable.Name, cable.PeerName, cable.PeerNamespace = "up", "up", netlink.NsFd(peer.FD())
	must(netlink.LinkAdd(cable))
	configure := func(a, gateway netip.Addr) error {
		link, err := netlink.LinkByName("up")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4zero, Mask: net.CIDRMask(0, 32)}, Gw: gateway.AsSlice()})
	}
	must(configure(benchNode, benchPeer))
	must(peer.Do(func() error { return configure(benchPeer, benchNode) }))
	var servers []net.PacketConn
	for _, port := range []int{8081, 8082} {
		var c net.PacketConn
		must(peer.Do(func() (err error) {
			c, err = net.ListenPacket("udp4", fmt.Sprint(benchPeer, ":", port))
			return err
		}))
		servers = append(servers, c)
		go func() {
			buf := make([]byte, 64)
			for {
				_, from, err := c.ReadFrom(buf)
				if err != nil {
					return
				}
				c.WriteTo(fmt.Append(nil, port), from)
			}
		}()
	}
	b.Cleanup(func() {
		for _, s := range servers {
			s.Close()
		}
		netlink.LinkDel(cable)
		peer.Close()
	})
}

// benchObjects are n services of three endpoints each, and first one more, whose
// endpoint is one of the servers.
func benchObjects(n int) ([]*corev1.Service, []*discoveryv1.EndpointSlice) {
	services := []*corev1.Service{benchService("probe", netip.MustParseAddr("10.43.255.1"))}
	slices := []*discoveryv1.EndpointSlice{benchSlice("probe", 8081, benchPeer)}
	for i := range n {
		name := fmt.Sprint("s", i)
		services = append(services, benchService(name, netip.AddrFrom4([4]byte{10, 43, byte(i >> 8), byte(i)})))
		var eps []netip.Addr
		for e := range 3 {
			eps = append(eps, netip.AddrFrom4([4]byte{10, 44 + byte(e), byte(i >> 8), byte(i)}))
		}
		slices = append(slices, benchSlice(name, 8080, eps...))
	}
	return services, slices
}

func benchService(name string, ip netip.Addr) *corev1.Service {
	return &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: ip.String(), ClusterIPs: []string{ip.String()}, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
		SessionAffinity: corev1.ServiceAffinityNone, Ports: []corev1.ServicePort{{Name: "p", Port: 80, Protocol: corev1.ProtocolUDP}},
	}}
}

func benchSlice(service string, port int32, addrs ...netip.Addr) *discoveryv1.EndpointSlice {
	name, protocol, ready, node := "p", corev1.ProtocolUDP, true, "node2"
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: service + "-1", Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4, Ports: []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	for _, a := range addrs {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.String()}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	return s
}

// lastPort is the client's of the last flow. Each has its own: the kernel would take
// one with the port of an earlier one for its continuation.
var lastPort = 10000

// flow sends the first datagram of a flow to the probed service, and returns who
// answers and how long that took.
func flow() (string, time.Duration, error) {
	lastPort = max(10000, (lastPort+1)%65000)
	conn, err := net.DialUDP("udp4", &net.UDPAddr{Port: lastPort}, &net.UDPAddr{IP: net.IPv4(10, 43, 255, 1), Port: 80})
	if err != nil {
		return "", 0, err
	}
	defer conn.Close()
	began := time.Now()
	conn.SetDeadline(began.Add(100 * time.Millisecond))
	if _, err := conn.Write([]byte("?")); err != nil {
		return "", 0, err
	}
	buf := make([]byte, 16)
	n, err := conn.Read(buf)
	return string(buf[:n]), time.Since(began), err
}

func contest(b *testing.B, f func(b *testing.B, services int, start func(*testing.B) contender)) {
	benchNet(b)
	for _, n := range []int{1, 1000, 5000, 10000} {
		for name, start := range map[string]func(*testing.B) contender{"kedge": newOurProxy, "kube-proxy": newUpstreamProxy} {
			b.Run(fmt.Sprintf("%d/%s", n, name), func(b *testing.B) { f(b, n, start) })
		}
	}
}

// flushRules begins with no rules at all.
func flushRules(b *testing.B) {
	conn, err := nftables.New()
	if err != nil {
		b.Fatal(err)
	}
	conn.FlushRuleset()
	if err := conn.Flush(); err != nil {
		b.Fatal(err)
	}
}

// cpu is the processor time of the process and of the programs it has run.
func cpu() time.Duration {
	var total time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if syscall.Getrusage(who, &u) == nil {
			total += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return total
}

// BenchmarkBegin writes the rules of all services.
func BenchmarkBegin(b *testing.B) {
	contest(b, func(b *testing.B, n int, start func(*testing.B) contender) {
		services, slices := benchObjects(n)
		var used time.Duration
		var memory uint64
		for b.Loop() {
			b.StopTimer()
			flushRules(b)
			before := heap()
			p := start(b)
			c := cpu()
			b.StartTimer()
			if err := p.begin(services, slices); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			used += cpu() - c
			memory = heap() - min(before, heap())
			p.end()
			b.StartTimer()
		}
		b.ReportMetric(float64(used.Milliseconds())/float64(b.N), "cpu-ms/op")
		b.ReportMetric(float64(memory)/(1<<20), "heap-MiB")
	})
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// BenchmarkEndpointChange changes the endpoint of one service, and waits until
// the first packet reaches the new one.
func BenchmarkEndpointChange(b *testing.B) {
	contest(b, func(b *testing.B, n int, start func(*testing.B) contender) {
		flushRules(b)
		services, all := benchObjects(n)
		p := start(b)
		if err := p.begin(services, all); err != nil {
			b.Fatal(err)
		}
		defer p.end()
		now := all[0]
		c := cpu()
		var took []time.Duration
		for i := 0; b.Loop(); i++ {
			b.StopTimer()
			forgetConnections(b)
			b.StartTimer()
			port := 8081 + int32(1-i%2)
			next := benchSlice("probe", port, benchPeer)
			began := time.Now()
			p.change(now, next)
			now = next
			for {
				who, _, err := flow()
				if err == nil && who == fmt.Sprint(port) {
					break
				}
				time.Sleep(200 * time.Microsecond) // fewer flows than there are ports
				if time.Since(began) > time.Minute {
					b.Fatalf("the new endpoint does not answer, but %q, %v", who, err)
				}
			}
			took = append(took, time.Since(began))
		}
		b.ReportMetric(float64((cpu()-c).Microseconds())/float64(b.N)/1000, "cpu-ms/op")
		report(b, took)
	})
}

// BenchmarkFirstPacket measures how long the first packet of a flow and its answer
// take.
func BenchmarkFirstPacket(b *testing.B) {
	contest(b, func(b *testing.B, n int, start func(*testing.B) contender) {
		flushRules(b)
		services, all := benchObjects(n)
		p := start(b)
		if err := p.begin(services, all); err != nil {
			b.Fatal(err)
		}
		defer p.end()
		var took []time.Duration
		for i := 0; b.Loop(); i++ {
			if i%10000 == 0 {
				b.StopTimer()
				forgetConnections(b)
				b.StartTimer()
			}
			_, d, err := flow()
			if err != nil {
				b.Fatal(err)
			}
			took = append(took, d)
		}
		report(b, took)
	})
}

func forgetConnections(b *testing.B) {
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		b.Fatal(err)
	}
}

func report(b *testing.B, took []time.Duration) {
	slices.Sort(took)
	for _, p := range []int{50, 99} {
		b.ReportMetric(float64(took[len(took)*p/100].Nanoseconds())/1000, fmt.Sprintf("p%d-µs", p))
	}
}
