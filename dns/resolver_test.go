package dns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/dns/cluster"
	"kedge/dns/custom"
	"kedge/dns/message"
	"kedge/dns/outside"
	"kedge/dns/stats"
	testhost "kedge/internal/test/host"
)

func TestResolver(t *testing.T) {
	w := start(t, "", clusterIP("web", "10.43.1.1"))
	for _, server := range []string{"10.43.0.10", "fd43::a"} {
		for _, network := range []string{"udp", "tcp"} {
			m := w.exchange(network, server, "WEB.default.svc.cluster.local.", dns.TypeA)
			if len(m.Answer) != 1 || m.Answer[0].String() != "WEB.default.svc.cluster.local.\t5\tIN\tA\t10.43.1.1" || !m.Authoritative || !m.RecursionAvailable {
				t.Errorf("%s over %s: %s", server, network, m)
			}
		}
	}
	if err := w.r.Check(t.Context()); err != nil {
		t.Error(err)
	}
	// Changes take effect without a restart.
	ctx := t.Context()
	if _, err := w.client.CoreV1().Services("default").Create(ctx, clusterIP("new", "10.43.1.2"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("new.default.svc.cluster.local.", dns.TypeA, "10.43.1.2")
	if _, err := w.client.DiscoveryV1().EndpointSlices("default").Create(ctx, slice("new", "10.42.0.5"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("5.0.42.10.in-addr.arpa.", dns.TypePTR, "10-42-0-5.new.default.svc.cluster.local.")
	if err := w.client.CoreV1().Services("default").Delete(ctx, "new", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("new.default.svc.cluster.local.", dns.TypeA, "NXDOMAIN")
	if got := w.addresses("example.com.", dns.TypeA); got != "SERVFAIL" {
		t.Errorf("an outside name without name servers: %s", got)
	}
}

func localRoutes(t *testing.T) (n int) {
	t.Helper()
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_LOCAL, Protocol: routeProtocol}, netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			t.Fatal(err)
		}
		n += len(routes)
	}
	return n
}

// The addresses stay during a restart, so that clients are refused at once, and are gone
// after Cleanup.
func TestAddresses(t *testing.T) {
	w := start(t, "")
	w.stop()
	if n := localRoutes(t); n != 2 {
		t.Errorf("%d routes while it is stopped", n)
	}
	began := time.Now()
	_, _, err := (&dns.Client{Timeout: 5 * time.Second}).Exchange(new(dns.Msg).SetQuestion("a.", 1), "10.43.0.10:53")
	if err == nil || time.Since(began) > time.Second {
		t.Errorf("while it is stopped: %v after %s", err, time.Since(began))
	}
	w.run()
	w.exchange("udp", "10.43.0.10", "cluster.local.", dns.TypeSOA)
	w.stop()
	for range 2 { // the second finds nothing
		if err := Cleanup(w.cfg.Addresses); err != nil {
			t.Error(err)
		}
	}
	if n := localRoutes(t); n != 0 {
		t.Errorf("%d routes after the clean-up", n)
	}
}

// Another program flushes the routes, or loopback goes down for a moment.
func TestAddressesComeBack(t *testing.T) {
	w := start(t, "")
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for name, damage := range map[string]func() error{
		"routes removed": func() error { return Cleanup(w.cfg.Addresses) },
		"loopback down":  func() error { return errors.Join(netlink.LinkSetDown(lo), netlink.LinkSetUp(lo)) },
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		deadline := time.Now().Add(10 * time.Second)
		for {
			if err = w.r.Check(t.Context()); err == nil && localRoutes(t) == 2 {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %d routes; Check says %v", name, localRoutes(t), err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// Another program at port 53 must not take the node down: the error is reported, and
// queries are answered as soon as the port is free.
func TestPortIsTaken(t *testing.T) {
	testhost.RequireIsolation(t)
	other, err := net.Listen("tcp", ":53")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	w := start(t, "")
	deadline := time.Now().Add(10 * time.Second)
	for {
		err := w.r.Check(t.Context())
		if err != nil && strings.Contains(err.Error(), "another program listens on 10.43.0.10:53") && strings.Contains(err.Error(), "--service-cidr") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("Check says %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	for {
		if err = w.r.Check(t.Context()); err == nil {
			break
		}
		if time.Now().After(deadline.Add(10 * time.Second)) {
			t.Fatalf("with a free port Check says %v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func TestAliases(t *testing.T) {
	upstream(t, "www.example.com.", "A 192.0.2.1")
	w := start(t, "nameserver 127.0.0.2\n",
		externalName("out", "www.Example.com"), externalName("gone", "nowhere.example.com"), externalName("inside", "web.default.svc.cluster.local"),
		externalName("chain", "out.default.svc.cluster.local"), externalName("self", "self.default.svc.cluster.local"),
		clusterIP("web", "10.43.1.1"))
	for name, want := range map[string]string{
		"out":    "192.0.2.1 www.example.com.",
		"gone":   "nowhere.example.com. NXDOMAIN",
		"inside": "10.43.1.1 web.default.svc.cluster.local.",
		"chain":  "192.0.2.1 out.default.svc.cluster.local. www.example.com.",
	} {
		if got := w.addresses(name+".default.svc.cluster.local.", dns.TypeA); got != want {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if got := w.addresses("out.default.svc.cluster.local.", dns.TypeCNAME); got != "www.example.com." {
		t.Errorf("CNAME: %q", got)
	}
	if got := w.addresses("out.default.svc.cluster.local.", dns.TypeAAAA); got != "www.example.com." {
		t.Errorf("AAAA: %q", got)
	}
	if got := w.addresses("self.default.svc.cluster.local.", dns.TypeA); !strings.HasSuffix(got, "SERVFAIL") {
		t.Errorf("a name that stands for itself: %q", got)
	}
	m := w.exchange("udp", "10.43.0.10", "OUT.default.svc.cluster.local.", dns.TypeA)
	if m.Question[0].Name != "OUT.default.svc.cluster.local." || m.Answer[0].Header().Name != "OUT.default.svc.cluster.local." {
		t.Errorf("the case is lost: %s", m)
	}
}

func TestSettings(t *testing.T) {
	upstream(t, "www.example.com.", "A 192.0.2.1")
	w := start(t, "", clusterIP("web", "10.43.1.1"))
	maps := w.client.CoreV1().ConfigMaps(metav1.NamespaceSystem)
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: ConfigMap, Namespace: metav1.NamespaceSystem}, Data: map[string]string{
		"stub-zones": "example.com 127.0.0.2",
		"hosts":      "192.0.2.7 printer.lan\nfd00::7 printer.lan",
		"rewrites":   "old.lan web.default.svc.cluster.local\n*.svc.lan *.svc.cluster.local\nshop.lan www.example.com",
	}}
	if _, err := maps.Create(t.Context(), m, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("printer.lan.", dns.TypeA, "192.0.2.7")
	inForce := func() {
		t.Helper()
		for _, c := range []struct {
			name  string
			qtype uint16
			want  string
		}{
			{"printer.lan.", dns.TypeAAAA, "fd00::7"},
			{"printer.lan.", dns.TypeMX, ""},
			{"7.2.0.192.in-addr.arpa.", dns.TypePTR, "printer.lan."},
			{"www.example.com.", dns.TypeA, "192.0.2.1"},
			{"old.lan.", dns.TypeA, "10.43.1.1 web.default.svc.cluster.local."},
			{"web.default.svc.lan.", dns.TypeA, "10.43.1.1 web.default.svc.cluster.local."},
			{"nope.default.svc.lan.", dns.TypeA, "nope.default.svc.cluster.local. NXDOMAIN"},
			{"shop.lan.", dns.TypeA, "192.0.2.1 www.example.com."},
		} {
			if got := w.addresses(c.name, c.qtype); got != c.want {
				t.Errorf("%s: %q, want %q", c.name, got, c.want)
			}
		}
	}
	inForce()

	m.Data["hosts"] = "192.0.2.8 scanner.lan\nprinter.lan 192.0.2.9"
	if _, err := maps.Update(t.Context(), m, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		events, err := w.client.CoreV1().Events(metav1.NamespaceSystem).List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if len(events.Items) > 0 {
			e := events.Items[0]
			if e.InvolvedObject.Name != ConfigMap || e.Type != corev1.EventTypeWarning || !strings.Contains(e.Message, `hosts, line 2: "printer.lan" is not an address`) {
				t.Errorf("event: %+v", e)
			}
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no event")
		}
		time.Sleep(10 * time.Millisecond)
	}
	inForce()
	if got := w.addresses("scanner.lan.", dns.TypeA); got == "192.0.2.8" {
		t.Error("half of a ConfigMap with a mistake is in force")
	}
	if err := maps.Delete(t.Context(), ConfigMap, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("printer.lan.", dns.TypeA, "SERVFAIL")
}

func TestMetrics(t *testing.T) {
	w := start(t, "", clusterIP("web", "10.43.1.1"))
	w.addresses("web.default.svc.cluster.local.", dns.TypeA)
	for _, server := range []string{"10.43.0.10", "[fd43::a]"} {
		resp, err := http.Get("http://" + server + ":9153/metrics")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if want := `coredns_dns_requests_total{family="1",proto="udp",server="dns://:53",type="A",view="",zone="cluster.local."} 1`; !strings.Contains(string(body), want) {
			t.Errorf("no %s in\n%s", want, body)
		}
	}
	if _, err := net.DialTimeout("tcp", "127.0.0.1:9153", time.Second); err == nil {
		t.Error("metrics are served at other addresses too")
	}
}

// Clients may send several queries at once over one connection, and in pieces.
func TestTCPConversation(t *testing.T) {
	w := start(t, "", clusterIP("web", "10.43.1.1"))
	conn, err := net.Dial("tcp", "10.43.0.10:53")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	var all []byte
	for range 3 {
		p, err := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		all = append(binary.BigEndian.AppendUint16(all, uint16(len(p))), p...)
	}
	for i, b := range [][]byte{all[:5], all[5:70], all[70:]} {
		if i > 0 {
			time.Sleep(10 * time.Millisecond) // so that they are packets of their own
		}
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	c := &dns.Conn{Conn: conn}
	for range 3 {
		if m, err := c.ReadMsg(); err != nil || len(m.Answer) != 1 {
			t.Fatalf("%v %v", m, err)
		}
	}
	// Data that is not DNS ends the connection and has no other effect.
	if _, err := conn.Write([]byte("\x00\x05GET /")); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Read(make([]byte, 1)); err == nil {
		t.Error("an answer to garbage")
	}
	w.exchange("tcp", "10.43.0.10", "cluster.local.", dns.TypeSOA)
}

// The resolver of a C library sends A and AAAA queries at the same time from one socket,
// and accepts the answers in any order; old versions of musl never use TCP and use the
// records of a truncated answer.
func TestTwoQuestionsFromOneSocket(t *testing.T) {
	var addrs []string
	for i := range 60 {
		addrs = append(addrs, netip.AddrFrom4([4]byte{10, 42, 0, byte(i + 1)}).String())
	}
	headless := clusterIP("many", corev1.ClusterIPNone)
	start(t, "", headless, slice("many", addrs...))
	conn, err := net.Dial("udp", "10.43.0.10:53")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		m := new(dns.Msg).SetQuestion("many.default.svc.cluster.local.", qtype)
		m.Id = qtype
		p, err := m.Pack()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write(p); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[uint16]*dns.Msg{}
	for range 2 {
		buf := make([]byte, 512) // the C library's
		n, err := conn.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(buf[:n]); err != nil {
			t.Fatal(err)
		}
		seen[m.Id] = m
	}
	if a := seen[dns.TypeA]; a == nil || !a.Truncated || len(a.Answer) < 20 {
		t.Errorf("A: %v", a)
	}
	if aaaa := seen[dns.TypeAAAA]; aaaa == nil || aaaa.Rcode != dns.RcodeSuccess || len(aaaa.Answer) != 0 || len(aaaa.Ns) != 1 {
		t.Errorf("AAAA: %v", aaaa)
	}
}

func newAnswerer() *answerer {
	st := stats.New("cluster.local")
	a := &answerer{
		log:     slog.New(slog.DiscardHandler),
		index:   cluster.New(cluster.Config{Domain: "cluster.local", TTL: 5, Servers: []netip.Addr{netip.MustParseAddr("10.43.0.10")}, Ranges: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}}),
		outside: outside.NewResolver(outside.Config{ResolvConf: func() string { return "/nonexistent" }}, st, slog.New(slog.DiscardHandler)),
		nodes:   newNodes(),
		stats:   st,
		waiting: make(chan struct{}, 1),
	}
	a.rules.Store(&custom.Rules{})
	a.index.SetNamespace("default", true)
	a.index.SetService(clusterIP("web", "10.43.1.1"))
	a.index.SetService(externalName("out", "www.example.com"))
	a.index.SetService(clusterIP("db", corev1.ClusterIPNone))
	a.index.SetSlice(slice("db", "10.42.0.1", "10.42.0.2"))
	return a
}

// FuzzPacket passes arbitrary packets through the whole path: no panic, and the output is
// an answer to the input.
func FuzzPacket(f *testing.F) {
	for _, name := range []string{".", "web.default.svc.cluster.local.", "out.default.svc.cluster.local.", "db.default.svc.cluster.local.", "1.1.43.10.in-addr.arpa.", "example.com."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeSRV, dns.TypePTR, dns.TypeANY, dns.TypeHINFO, dns.TypeAXFR} {
			m := new(dns.Msg).SetQuestion(name, qtype)
			for range 2 {
				p, err := m.Pack()
				if err != nil {
					f.Fatal(err)
				}
				f.Add(p, qtype%2 == 0)
				m.SetEdns0(4096, true)
			}
		}
	}
	a := newAnswerer()
	f.Fuzz(func(t *testing.T, p []byte, tcp bool) {
		w := &request{tcp: tcp, began: time.Now()}
		before := bytes.Clone(p)
		answer, done := a.answerLocally(w, p, nil)
		if !done {
			answer = a.answerRemotely(t.Context(), w, nil)
		}
		if !bytes.Equal(p, before) {
			t.Fatal("the packet was changed")
		}
		if answer == nil {
			if len(p) >= 12 && p[2]&0x80 == 0 {
				t.Fatal("a query without an answer")
			}
			return
		}
		m := new(dns.Msg)
		if err := m.Unpack(answer); err != nil {
			t.Fatalf("the answer cannot be read: %v", err)
		}
		if m.Id != binary.BigEndian.Uint16(p) || !m.Response {
			t.Fatalf("an answer to something else: %v", m)
		}
		limit := message.MaxTCP
		if !tcp {
			limit = 1232
		}
		if len(answer) > limit {
			t.Fatalf("%d bytes", len(answer))
		}
	})
}

// A flood of queries for unknown names must not start goroutines without limit.
func TestTooManyWait(t *testing.T) {
	testhost.RequireIsolation(t)
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	a := newAnswerer()
	a.waiting <- struct{}{} // another query is waiting already
	var waiting sync.WaitGroup
	waiting.Go(func() { a.serveUDP(t.Context(), conn, &waiting) })
	defer waiting.Wait()
	defer conn.Close()
	m, err := dns.Exchange(new(dns.Msg).SetQuestion("www.example.com.", dns.TypeA), conn.LocalAddr().String())
	if err != nil || m.Rcode != dns.RcodeServerFailure {
		t.Errorf("%v %v", m, err)
	}
	m, err = dns.Exchange(new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA), conn.LocalAddr().String())
	if err != nil || len(m.Answer) != 1 {
		t.Errorf("a name of the cluster: %v %v", m, err)
	}
}

func BenchmarkPacket(b *testing.B) {
	a := newAnswerer()
	p, err := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	w := &request{}
	buf := make([]byte, 0, 1232)
	b.ReportAllocs()
	for b.Loop() {
		w.began = time.Now()
		if _, done := a.answerLocally(w, p, buf); !done {
			b.Fatal("not answered")
		}
	}
}

// BenchmarkUDP sends queries over sockets, several at a time.
func BenchmarkUDP(b *testing.B) {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		b.Fatal(err)
	}
	a := newAnswerer()
	var waiting sync.WaitGroup
	for range readers() {
		waiting.Go(func() { a.serveUDP(context.Background(), conn, &waiting) })
	}
	defer waiting.Wait()
	defer conn.Close()
	p, err := new(dns.Msg).SetQuestion("web.default.svc.cluster.local.", dns.TypeA).Pack()
	if err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		c, err := net.Dial("udp", conn.LocalAddr().String())
		if err != nil {
			b.Error(err)
			return
		}
		defer c.Close()
		buf := make([]byte, 512)
		for pb.Next() {
			if _, err := c.Write(p); err != nil {
				b.Error(err)
				return
			}
			if _, err := c.Read(buf); err != nil {
				b.Error(err)
				return
			}
		}
	})
}
