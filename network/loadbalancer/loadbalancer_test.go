package loadbalancer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"kedge/internal/addresspool"
	"kedge/internal/test/host"
)

func addr(s string) netip.Addr     { return netip.MustParseAddr(s) }
func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func TestOwner(t *testing.T) {
	var nodes []member
	for _, name := range []string{"node-1", "node-2", "node-3"} {
		nodes = append(nodes, member{name: name, networks: []netip.Prefix{prefix("192.0.2.0/24")}})
	}
	count, moved := map[string]int{}, 0
	a := addr("192.0.2.0")
	for range 240 {
		before := owner(a, nodes)
		count[before]++
		after := owner(a, nodes[:2])
		if before != "node-3" && after != before {
			t.Errorf("%s moves from %s to %s although neither is gone", a, before, after)
		}
		if after != before {
			moved++
		}
		a = a.Next()
	}
	for name, n := range count {
		if n < 50 || n > 110 {
			t.Errorf("%s has %d of 240 addresses", name, n)
		}
	}
	if moved != count["node-3"] {
		t.Errorf("%d addresses move, and %d must", moved, count["node-3"])
	}
	// Nodes on the address's network have priority; if there are none, any node announces
	// it.
	nodes = append(nodes, member{name: "far", networks: []netip.Prefix{prefix("198.51.100.0/24")}})
	if got := owner(addr("198.51.100.7"), nodes); got != "far" {
		t.Errorf("owner %s", got)
	}
	if got := owner(addr("203.0.113.7"), nodes); got == "" {
		t.Error("an address outside all networks has no owner")
	}
	if got := owner(addr("203.0.113.7"), nil); got != "" {
		t.Errorf("owner %s without nodes", got)
	}
}

func lease(node string, renewed time.Time, networks string) *coordinationv1.Lease {
	at := metav1.NewMicroTime(renewed)
	return &coordinationv1.Lease{
		ObjectMeta: metav1.ObjectMeta{Name: leasePrefix + node, Annotations: map[string]string{annotationNetworks: networks}},
		Spec:       coordinationv1.LeaseSpec{HolderIdentity: &node, RenewTime: &at},
	}
}

func TestMembers(t *testing.T) {
	now := time.Unix(1000, 0)
	m := newMembers("me")
	m.now = func() time.Time { return now }
	names := func() string {
		out := ""
		for _, a := range m.alive() {
			out += a.name + " "
		}
		return out
	}
	far := time.Unix(99, 0) // the other's clock is wrong, which does not matter
	m.set(lease("b", far, "192.0.2.0/24"))
	m.set(lease("me", far, ""))
	m.set(lease("a", far, ""))
	if got := names(); got != "a b " {
		t.Errorf("alive: %s", got)
	}
	if n := m.alive()[1].networks; len(n) != 1 || n[0] != prefix("192.0.2.0/24") {
		t.Errorf("networks: %v", n)
	}
	now = now.Add(deadAfter - time.Millisecond)
	m.set(lease("a", far.Add(time.Second), ""))
	m.set(lease("b", far, "")) // changed, but not renewed
	now = now.Add(time.Millisecond)
	if got := names(); got != "a " {
		t.Errorf("alive: %s", got)
	}
	let := lease("a", far.Add(2*time.Second), "")
	let.Spec.HolderIdentity = new(string)
	m.set(let)
	if got := names(); got != "" {
		t.Errorf("alive after the release: %s", got)
	}
}

func TestFrames(t *testing.T) {
	mac, other := net.HardwareAddr{2, 0, 0, 0, 0, 1}, net.HardwareAddr{2, 0, 0, 0, 0, 2}
	q, ok := parseARP(arp(arpRequest, mac, addr("192.0.2.1"), broadcast, addr("192.0.2.2")))
	if !ok || q.target != addr("192.0.2.2") || q.sender != addr("192.0.2.1") || q.mac.String() != mac.String() {
		t.Errorf("ARP: %+v %v", q, ok)
	}
	if _, ok := parseARP(arp(arpReply, mac, addr("192.0.2.1"), other, addr("192.0.2.2"))); ok {
		t.Error("an answer is taken for a question")
	}
	if _, ok := parseARP(arp(arpRequest, mac, addr("192.0.2.1"), broadcast, addr("192.0.2.1"))); ok {
		t.Error("an announcement is taken for a question")
	}
	f := advertise(mac, addr("fd00::1"), addr("fe80::1"), other, addr("fe80::2"), flagOverride)
	if checksum(addr("fe80::1"), addr("fe80::2"), f[ethernetLen+ipv6Len:]) != 0 {
		t.Error("wrong checksum")
	}
	if got := solicitedNode(addr("fd00::1:2345:6789")); got != addr("ff02::1:ff45:6789") {
		t.Errorf("group %s", got)
	}
	if got := groupMAC(allNodes).String(); got != "33:33:00:00:00:01" {
		t.Errorf("hardware address of the group: %s", got)
	}
}

func FuzzFrames(f *testing.F) {
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	f.Add(arp(arpRequest, mac, addr("192.0.2.1"), broadcast, addr("192.0.2.2")))
	f.Add(advertise(mac, addr("fd00::1"), addr("fe80::1"), mac, addr("fe80::2"), 0))
	f.Fuzz(func(t *testing.T, b []byte) {
		if q, ok := parseARP(b); ok && (len(q.mac) != 6 || !q.target.Is4()) {
			t.Fatalf("%+v", q)
		}
		if q, ok := parseSolicitation(b); ok && (len(q.mac) != 6 || !q.target.Is6()) {
			t.Fatalf("%+v", q)
		}
	})
}

// The pools and the API's addresses of them.
const (
	pool4 = "192.0.2.100"
	pool6 = "fd00::100"
)

func balanced(name string, addrs ...string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}, Spec: corev1.ServiceSpec{Type: corev1.ServiceTypeLoadBalancer}}
	for _, a := range addrs {
		s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
	}
	return s
}

func node(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
}

// cluster is an API and the hosts of some nodes, with one more host that is not a node.
type cluster struct {
	t       *testing.T
	client  *fake.Clientset
	lan     *host.LAN
	hosts   map[string]*host.Host
	outside *host.Host
	stops   map[string]func()
	cut     atomic.Pointer[string] // the node that the API does not answer
}

func newCluster(t *testing.T, objects ...runtime.Object) *cluster {
	t.Helper()
	host.RequireRoot(t)
	lan, err := host.NewLAN()
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{t: t, client: fake.NewClientset(objects...), lan: lan, hosts: map[string]*host.Host{}, stops: map[string]func(){}}
	c.client.PrependReactor("*", "leases", func(action k8stesting.Action) (bool, runtime.Object, error) {
		cut := c.cut.Load()
		u, ok := action.(k8stesting.PatchAction)
		if !ok || cut == nil || u.GetName() != leasePrefix+*cut {
			return false, nil, nil
		}
		return true, nil, errors.New("cut off")
	})
	t.Cleanup(func() {
		for _, stop := range c.stops {
			stop()
		}
		if err := lan.Close(); err != nil {
			t.Error(err)
		}
	})
	c.outside = c.host("outside", 9)
	return c
}

func (c *cluster) host(name string, n int) *host.Host {
	c.t.Helper()
	h, err := c.lan.Host(name, prefix(fmt.Sprintf("192.0.2.%d/24", n)), prefix(fmt.Sprintf("fd00::%d/64", n)))
	if err != nil {
		c.t.Fatal(err)
	}
	return h
}

// start runs an announcer on a host of its own.
func (c *cluster) start(name string, n int) {
	c.t.Helper()
	h := c.host(name, n)
	c.hosts[name] = h
	pools, err := addresspool.Parse([]string{"192.0.2.96/28", "fd00::100/120", "203.0.113.0/24"})
	if err != nil {
		c.t.Fatal(err)
	}
	watches := informers.NewSharedInformerFactory(c.client, 0)
	a, err := New(Config{NodeName: name, Pools: pools, PodLinks: "kdg"}, watches, c.client, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	watches.Start(ctx.Done())
	watches.WaitForCacheSync(ctx.Done())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- h.Do(func() error { return a.Run(ctx, func() { close(ready) }) }) }()
	select {
	case <-ready:
	case err := <-done:
		c.t.Fatal(err)
	case <-time.After(10 * time.Second):
		c.t.Fatal("not ready")
	}
	c.stops[name] = func() {
		cancel()
		watches.Shutdown()
		if err := <-done; err != nil {
			c.t.Error(err)
		}
		c.stops[name] = func() {}
	}
}

// mac is the hardware address of a host's uplink.
func mac(t *testing.T, h *host.Host) string {
	t.Helper()
	l, err := h.Netlink().LinkByName(host.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	return l.Attrs().HardwareAddr.String()
}

// neighbour returns the hardware address that the outside host has for an address. With ask
// it resolves the address again; otherwise it is the address from the last announcement.
func (c *cluster) neighbour(address string, ask bool) string {
	c.t.Helper()
	l, err := c.outside.Netlink().LinkByName(host.Uplink)
	if err != nil {
		c.t.Fatal(err)
	}
	family := unix.AF_INET
	if addr(address).Is6() {
		family = unix.AF_INET6
	}
	if ask {
		_ = c.outside.Netlink().NeighDel(&netlink.Neigh{LinkIndex: l.Attrs().Index, Family: family, IP: net.ParseIP(address)})
		// A packet makes the kernel resolve the address; no program needs to receive it.
		conn, err := c.outside.Dial(c.t.Context(), "udp", net.JoinHostPort(address, "9"))
		if err != nil {
			c.t.Fatal(err)
		}
		_, _ = conn.Write([]byte("x"))
		conn.Close()
	}
	found := ""
	for deadline := time.Now().Add(time.Second); ; time.Sleep(5 * time.Millisecond) {
		list, err := c.outside.Netlink().NeighList(l.Attrs().Index, family)
		if err != nil {
			c.t.Fatal(err)
		}
		for _, n := range list {
			if n.IP.Equal(net.ParseIP(address)) && n.State&(unix.NUD_REACHABLE|unix.NUD_STALE|unix.NUD_DELAY|unix.NUD_PROBE) != 0 {
				found = n.HardwareAddr.String()
			}
		}
		if found != "" || !ask || time.Now().After(deadline) {
			return found
		}
	}
}

func (c *cluster) eventually(limit time.Duration, what string, f func() bool) time.Duration {
	c.t.Helper()
	began := time.Now()
	for !f() {
		if time.Since(began) > limit {
			c.t.Fatalf("not within %s: %s", limit, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return time.Since(began)
}

func TestOneNode(t *testing.T) {
	c := newCluster(t, node("a"), balanced("web", pool4, pool6), balanced("far", "203.0.113.5"), balanced("of-nodes", "192.0.2.50"))
	c.start("a", 1)
	want := mac(t, c.hosts["a"])
	for _, address := range []string{pool4, pool6} {
		if got := c.neighbour(address, true); got != want {
			t.Errorf("%s has the hardware address %q, want %q", address, got, want)
		}
	}
	if got := c.neighbour("192.0.2.50", true); got != "" {
		t.Errorf("an address that is of no pool is answered for with %s", got)
	}
	// An address of no network of the node's is announced where it may be asked for.
	if err := c.outside.Route(prefix("203.0.113.0/24"), addr("192.0.2.1")); err != nil {
		t.Fatal(err)
	}
	l, err := c.outside.Netlink().LinkByName(host.Uplink)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.outside.Netlink().RouteReplace(&netlink.Route{LinkIndex: l.Attrs().Index, Dst: &net.IPNet{IP: net.IPv4(203, 0, 113, 0), Mask: net.CIDRMask(24, 32)}, Scope: netlink.SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	if got := c.neighbour("203.0.113.5", true); got != want {
		t.Errorf("an address of no network: %q, want %q", got, want)
	}
	// A service that goes takes its address with it, and a new one is announced.
	services := c.client.CoreV1().Services("default")
	if err := services.Delete(t.Context(), "web", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually(5*time.Second, "the address of a service that is gone is not answered for", func() bool { return c.neighbour(pool4, true) == "" })
	if _, err := services.Create(t.Context(), balanced("next", "192.0.2.101"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually(5*time.Second, "the address of a new service", func() bool { return c.neighbour("192.0.2.101", true) == want })
	leases, err := c.client.CoordinationV1().Leases(metav1.NamespaceSystem).List(t.Context(), metav1.ListOptions{})
	if err != nil || len(leases.Items) != 0 {
		t.Errorf("with one node leases are written: %v %v", leases.Items, err)
	}
	c.stops["a"]()
	if got := c.neighbour("192.0.2.101", true); got != "" {
		t.Errorf("after its stop it is answered for with %s", got)
	}
}

// holder is the node that has an address, by its neighbours' opinion.
func (c *cluster) holder(address string, ask bool) string {
	got := c.neighbour(address, ask)
	for name, h := range c.hosts {
		if mac(c.t, h) == got {
			return name
		}
	}
	return got
}

func TestAddressMovesWhenItsNodeDies(t *testing.T) {
	c := newCluster(t, node("a"), node("b"), balanced("web", pool4, pool6))
	c.start("a", 1)
	c.start("b", 2)
	owners := map[string]string{}
	for _, address := range []string{pool4, pool6} {
		t.Run(address, func(t *testing.T) {
			c.eventually(5*time.Second, "one of the nodes has it", func() bool { h := c.holder(address, true); return h == "a" || h == "b" })
			time.Sleep(3 * time.Second) // both know of each other, and the announcements are over
			first := c.holder(address, true)
			owners[address] = first
			other := map[string]string{"a": "b", "b": "a"}[first]
			// It dies: its cable is out, and it renews nothing.
			c.cut.Store(&first)
			if err := c.hosts[first].Cut(); err != nil {
				t.Fatal(err)
			}
			took := c.eventually(5*time.Second, "neighbours are told of the other node", func() bool { return c.holder(address, false) == other })
			t.Logf("%s moved from %s to %s in %s", address, first, other, took)
			// It comes back, and has its addresses again.
			c.cut.Store(nil)
			if err := c.hosts[first].Restore(); err != nil {
				t.Fatal(err)
			}
			c.eventually(10*time.Second, "the node that is back has it", func() bool { return c.holder(address, true) == first })
		})
	}
	// A node that is stopped hands over at once: not only when it would count as dead,
	// after 2.4 s.
	first := owners[pool4]
	c.eventually(10*time.Second, "its first node has it again", func() bool { return c.holder(pool4, true) == first })
	other := map[string]string{"a": "b", "b": "a"}[first]
	c.stops[first]()
	took := c.eventually(5*time.Second, "the other node has it after the stop", func() bool { return c.holder(pool4, false) == other })
	t.Logf("handed over in %s", took)
	if took > 2300*time.Millisecond {
		t.Errorf("a hand-over took %s", took)
	}
}

// With externalTrafficPolicy Local only nodes with an endpoint may have the address.
func TestLocalEndpointsDecide(t *testing.T) {
	s := balanced("web", pool4)
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
	on := func(name string) *discoveryv1.EndpointSlice {
		return &discoveryv1.EndpointSlice{
			ObjectMeta: metav1.ObjectMeta{Name: "web-1", Namespace: "default", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
			Endpoints:  []discoveryv1.Endpoint{{Addresses: []string{"10.42.0.1"}, NodeName: &name}},
		}
	}
	c := newCluster(t, node("a"), node("b"), s, on("a"))
	c.start("a", 1)
	c.start("b", 2)
	c.eventually(5*time.Second, "the node with the endpoint has it", func() bool { return c.holder(pool4, true) == "a" })
	if _, err := c.client.DiscoveryV1().EndpointSlices("default").Update(t.Context(), on("b"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	c.eventually(5*time.Second, "the node to which the endpoint moved has it", func() bool { return c.holder(pool4, true) == "b" })
}
