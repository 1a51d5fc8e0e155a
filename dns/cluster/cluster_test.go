package cluster

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"

	"kedge/dns/message"
)

func full() *Index {
	x := newIndex()
	x.SetService(service("web", []string{"10.43.1.1"}, "http/TCP/80", "https/TCP/443", "quic/UDP/443"))
	x.SetSlice(slice("web", "web-a", []string{"http/TCP/8080"}, "10.42.0.5", "!10.42.0.6"))
	x.SetService(service("both", []string{"fd43::1:1", "10.43.1.2"}, "http/TCP/80"))
	x.SetService(service("db", []string{corev1.ClusterIPNone}, "sql/TCP/5432"))
	x.SetSlice(slice("db", "db-a", []string{"sql/TCP/5432"}, "10.42.0.10 db-0", "10.42.0.11 db-1", "!10.42.0.12 db-2"))
	x.SetSlice(slice("db", "db-b", []string{"sql/TCP/5432"}, "fd42::10 db-0"))
	x.SetService(service("plain", []string{corev1.ClusterIPNone}))
	x.SetSlice(slice("plain", "plain-a", nil, "10.42.0.20", "fd42::20", "fd42::"))
	x.SetService(service("none", []string{corev1.ClusterIPNone}, "http/TCP/80"))
	x.SetSlice(slice("none", "none-a", []string{"http/TCP/80"}, "!10.42.0.30"))
	x.SetService(external("out", "Example.COM"))
	x.SetService(external("digits", "192.0.2.1"))
	x.SetService(service("hosts", []string{corev1.ClusterIPNone}, "x/TCP/1"))
	x.SetSlice(slice("hosts", "hosts-a", []string{"x/TCP/1"}, "203.0.113.9"))
	return x
}

const (
	soa    = "ns:SOA cluster.local."
	nx     = "NXDOMAIN; " + soa
	noname = "not ours"
)

func TestNames(t *testing.T) {
	x := full()
	for _, c := range []struct{ qtype, name, want string }{
		// 2.2: the version.
		{"TXT", "dns-version.cluster.local", `TXT "1.1.0"`},
		{"A", "dns-version.cluster.local", soa},
		{"TXT", "x.dns-version.cluster.local", nx},

		// 2.3: services with an address.
		{"A", "web.default.svc.cluster.local", "A 10.43.1.1"},
		{"A", "WEB.Default.SVC.cluster.LOCAL", "A 10.43.1.1"},
		{"AAAA", "web.default.svc.cluster.local", soa},
		{"MX", "web.default.svc.cluster.local", soa},
		{"A", "both.default.svc.cluster.local", "A 10.43.1.2"},
		{"AAAA", "both.default.svc.cluster.local", "AAAA fd43::1:1"},
		{"ANY", "both.default.svc.cluster.local", "A 10.43.1.2; AAAA fd43::1:1"},
		{"SRV", "_http._tcp.web.default.svc.cluster.local", "+A web.default.svc.cluster.local. 10.43.1.1; SRV 0 100 80 web.default.svc.cluster.local."},
		{"SRV", "_quic._udp.web.default.svc.cluster.local", "+A web.default.svc.cluster.local. 10.43.1.1; SRV 0 100 443 web.default.svc.cluster.local."},
		{"SRV", "_HTTP._TCP.web.default.svc.cluster.local", "+A web.default.svc.cluster.local. 10.43.1.1; SRV 0 100 80 web.default.svc.cluster.local."},
		{"SRV", "_http._udp.web.default.svc.cluster.local", nx},
		{"SRV", "http.tcp.web.default.svc.cluster.local", nx},
		{"A", "_http._tcp.web.default.svc.cluster.local", soa},
		{"A", "_tcp.web.default.svc.cluster.local", soa},
		{"A", "_sctp.web.default.svc.cluster.local", nx},
		{"A", "_x._http._tcp.web.default.svc.cluster.local", nx},
		{"SRV", "_http._tcp.both.default.svc.cluster.local", "+A both.default.svc.cluster.local. 10.43.1.2; +AAAA both.default.svc.cluster.local. fd43::1:1; SRV 0 100 80 both.default.svc.cluster.local."},
		{"PTR", "1.1.43.10.in-addr.arpa", "PTR web.default.svc.cluster.local."},

		// CoreDNS's additions: endpoints of such services, and SRV without a port.
		{"A", "10-42-0-5.web.default.svc.cluster.local", "A 10.42.0.5"},
		{"A", "10-42-0-6.web.default.svc.cluster.local", nx},
		{"PTR", "5.0.42.10.in-addr.arpa", "PTR 10-42-0-5.web.default.svc.cluster.local."},
		{"SRV", "db-1.db.default.svc.cluster.local", "+A db-1.db.default.svc.cluster.local. 10.42.0.11; SRV 0 100 5432 db-1.db.default.svc.cluster.local."},

		// 2.4: headless services.
		{"A", "db.default.svc.cluster.local", "A 10.42.0.10; A 10.42.0.11"},
		{"AAAA", "db.default.svc.cluster.local", "AAAA fd42::10"},
		{"A", "db-0.db.default.svc.cluster.local", "A 10.42.0.10"},
		{"AAAA", "db-0.db.default.svc.cluster.local", "AAAA fd42::10"},
		{"AAAA", "db-1.db.default.svc.cluster.local", soa},
		{"A", "db-2.db.default.svc.cluster.local", nx},
		{"A", "x.db-0.db.default.svc.cluster.local", nx},
		{"SRV", "_sql._tcp.db.default.svc.cluster.local", "+A db-0.db.default.svc.cluster.local. 10.42.0.10; +A db-1.db.default.svc.cluster.local. 10.42.0.11; +AAAA db-0.db.default.svc.cluster.local. fd42::10; SRV 0 50 5432 db-0.db.default.svc.cluster.local.; SRV 0 50 5432 db-1.db.default.svc.cluster.local."},
		{"PTR", "10.0.42.10.in-addr.arpa", "PTR db-0.db.default.svc.cluster.local."},
		{"PTR", "0.1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.2.4.d.f.ip6.arpa", "PTR db-0.db.default.svc.cluster.local."},
		{"A", "10-42-0-20.plain.default.svc.cluster.local", "A 10.42.0.20"},
		{"AAAA", "fd42--20.plain.default.svc.cluster.local", "AAAA fd42::20"},
		{"AAAA", "fd42--0.plain.default.svc.cluster.local", "AAAA fd42::"},
		{"SRV", "plain.default.svc.cluster.local", soa},
		{"A", "none.default.svc.cluster.local", nx},

		// 2.5: ExternalName services.
		{"CNAME", "out.default.svc.cluster.local", "CNAME example.com."},
		{"A", "x.out.default.svc.cluster.local", nx},
		{"A", "digits.default.svc.cluster.local", nx},

		// Pods, as with CoreDNS's "pods insecure".
		{"A", "10-42-0-99.default.pod.cluster.local", "A 10.42.0.99"},
		{"AAAA", "fd42--99.default.pod.cluster.local", "AAAA fd42::99"},
		{"AAAA", "10-42-0-99.default.pod.cluster.local", soa},
		{"A", "10-42-0-99.missing.pod.cluster.local", nx},
		{"A", "10-42-0-999.default.pod.cluster.local", nx},
		{"A", "web.default.pod.cluster.local", nx},
		{"A", "x.10-42-0-99.default.pod.cluster.local", nx},

		// Names without records that have names below them.
		{"A", "cluster.local", soa},
		{"A", "svc.cluster.local", soa},
		{"A", "pod.cluster.local", soa},
		{"A", "default.svc.cluster.local", soa},
		{"A", "empty.svc.cluster.local", soa},
		{"A", "empty.pod.cluster.local", soa},
		{"A", "missing.svc.cluster.local", nx},
		{"A", "web.missing.svc.cluster.local", nx},
		{"A", "x.cluster.local", nx},
		{"SOA", "cluster.local", "SOA cluster.local."},
		{"NS", "cluster.local", "+A ns.dns.cluster.local. 10.43.0.10; +AAAA ns.dns.cluster.local. fd43::a; NS ns.dns.cluster.local."},
		{"A", "ns.dns.cluster.local", "A 10.43.0.10"},
		{"AAAA", "ns.dns.cluster.local", "AAAA fd43::a"},
		{"A", "dns.cluster.local", soa},
		{"NS", "web.default.svc.cluster.local", soa},

		// Reverse names: unused addresses of the ranges are denied here, other addresses
		// are forwarded.
		{"PTR", "77.0.42.10.in-addr.arpa", "NXDOMAIN; ns:SOA 42.10.in-addr.arpa."},
		{"A", "1.1.43.10.in-addr.arpa", "ns:SOA 43.10.in-addr.arpa."},
		{"PTR", "0.42.10.in-addr.arpa", "ns:SOA 42.10.in-addr.arpa."},
		{"PTR", "10.in-addr.arpa", noname},
		{"PTR", "9.113.0.203.in-addr.arpa", "PTR 203-0-113-9.hosts.default.svc.cluster.local."},
		{"PTR", "8.113.0.203.in-addr.arpa", noname},
		{"A", "9.113.0.203.in-addr.arpa", noname},
		{"PTR", "01.1.43.10.in-addr.arpa", noname},
		{"PTR", "x.0.42.10.in-addr.arpa", noname},

		// Outside names with a suffix of the search list, and names outside the zone.
		{"A", "example.com.default.svc.cluster.local", nx},
		{"A", "kubernetes.default.svc.cluster.local.default.svc.cluster.local", nx},
		{"A", "example.com", noname},
		{"A", "xcluster.local", noname},
		{"A", "local", noname},
		{"A", ".", noname},
	} {
		m, v, _ := ask(t, x, c.name, c.qtype, 1232)
		got := told(m)
		if v == NotFound {
			got = noname
		}
		if got != c.want {
			t.Errorf("%s %s:\n got %s\nwant %s", c.qtype, c.name, got, c.want)
		}
		if v == Answered && !m.Authoritative {
			t.Errorf("%s %s: not authoritative", c.qtype, c.name)
		}
	}
}

func TestAlias(t *testing.T) {
	x := full()
	_, v, target := ask(t, x, "out.default.svc.cluster.local", "A", 512)
	if v != Alias || target != message.WireName("example.com") {
		t.Errorf("got %v %q", v, target)
	}
}

// The complete content of an event must be visible at once, and nothing of the previous
// content.
func TestChanges(t *testing.T) {
	x := full()
	want := func(qtype, name, want string) {
		t.Helper()
		m, v, _ := ask(t, x, name, qtype, 1232)
		got := told(m)
		if v == NotFound {
			got = noname
		}
		if got != want {
			t.Errorf("%s %s:\n got %s\nwant %s", qtype, name, got, want)
		}
	}
	x.SetSlice(slice("db", "db-a", []string{"sql/TCP/5433"}, "10.42.0.13 db-0"))
	want("A", "db.default.svc.cluster.local", "A 10.42.0.13")
	want("PTR", "10.0.42.10.in-addr.arpa", "NXDOMAIN; ns:SOA 42.10.in-addr.arpa.")
	want("PTR", "13.0.42.10.in-addr.arpa", "PTR db-0.db.default.svc.cluster.local.")
	x.DeleteSlice(slice("db", "db-a", nil))
	x.DeleteSlice(slice("db", "db-b", nil))
	want("A", "db.default.svc.cluster.local", nx)

	x.DeleteService("default", "web")
	want("A", "web.default.svc.cluster.local", nx)
	want("PTR", "1.1.43.10.in-addr.arpa", "NXDOMAIN; ns:SOA 43.10.in-addr.arpa.")
	want("PTR", "5.0.42.10.in-addr.arpa", "NXDOMAIN; ns:SOA 42.10.in-addr.arpa.")
	x.SetService(service("web", []string{"10.43.1.9"}, "http/TCP/80")) // its endpoints are still there
	want("A", "10-42-0-5.web.default.svc.cluster.local", "A 10.42.0.5")
	x.SetService(external("web", "example.org"))
	want("PTR", "9.1.43.10.in-addr.arpa", "NXDOMAIN; ns:SOA 43.10.in-addr.arpa.")
	want("CNAME", "web.default.svc.cluster.local", "CNAME example.org.")

	x.SetNamespace("empty", false)
	want("A", "empty.svc.cluster.local", nx)

	// An address of two services has two names; one stays when the other is removed.
	x.SetSlice(slice("web2", "web2-a", nil, "10.42.0.50"))
	x.SetService(service("web2", []string{corev1.ClusterIPNone}))
	x.SetSlice(slice("web3", "web3-a", nil, "10.42.0.50"))
	x.SetService(service("web3", []string{corev1.ClusterIPNone}))
	want("PTR", "50.0.42.10.in-addr.arpa", "PTR 10-42-0-50.web2.default.svc.cluster.local.; PTR 10-42-0-50.web3.default.svc.cluster.local.")
	x.DeleteService("default", "web2")
	want("PTR", "50.0.42.10.in-addr.arpa", "PTR 10-42-0-50.web3.default.svc.cluster.local.")
}

func TestNothingIsKeptOfWhatIsGone(t *testing.T) {
	x := newIndex()
	s, sl := service("a", []string{"10.43.0.5"}, "p/TCP/1"), slice("a", "a-1", []string{"p/TCP/1"}, "10.42.0.5", "10.42.0.6 h")
	x.SetService(s)
	x.SetSlice(sl)
	x.DeleteService("default", "a")
	x.DeleteSlice(sl)
	if len(x.services)+len(x.sources)+len(x.reverse) != 0 {
		t.Errorf("left: %v %v %v", x.services, x.sources, x.reverse)
	}
}

// Unchanged endpoints must not create new records: slices are updated every time that a
// pod's readiness changes.
func TestRecordStaysWhenNothingChanges(t *testing.T) {
	x := full()
	k := key{"default", "db"}
	before := x.sources[k].record
	s := slice("db", "db-a", []string{"sql/TCP/5432"}, "10.42.0.11 db-1", "10.42.0.10 db-0", "!10.42.0.14 db-4")
	x.SetSlice(s)
	if x.sources[k].record != before {
		t.Error("a new record for the same names")
	}
}

func TestManyAddresses(t *testing.T) {
	x := newIndex()
	var eps []string
	for i := range 200 {
		eps = append(eps, fmt.Sprintf("10.42.1.%d", i+1))
	}
	x.SetService(service("many", []string{corev1.ClusterIPNone}, "p/TCP/1"))
	x.SetSlice(slice("many", "many-a", []string{"p/TCP/1"}, eps...))
	const name = "many.default.svc.cluster.local"
	m, _, _ := ask(t, x, name, "A", message.MaxTCP)
	if len(m.Answer) != 200 || m.Truncated {
		t.Errorf("%d records, truncated %v", len(m.Answer), m.Truncated)
	}
	m, _, _ = ask(t, x, name, "A", 512)
	// 12 + 35+4 for the question, 16 for each record.
	if want := (512 - 12 - 32 - 4) / 16; len(m.Answer) < want-1 || len(m.Answer) > want || !m.Truncated {
		t.Errorf("%d records in 512 bytes, truncated %v", len(m.Answer), m.Truncated)
	}
	m, _, _ = ask(t, x, "_p._tcp."+name, "SRV", message.MaxTCP)
	if len(m.Answer) != 200 || m.Truncated {
		t.Errorf("%d SRV records, truncated %v", len(m.Answer), m.Truncated)
	}
	first := map[string]bool{}
	for range 200 {
		m, _, _ := ask(t, x, name, "A", 512)
		first[m.Answer[0].(*dns.A).A.String()] = true
	}
	if len(first) < 50 {
		t.Errorf("of 200 answers only %d begin with different addresses", len(first))
	}
}

// With few addresses each must be first about equally often.
func TestShuffle(t *testing.T) {
	x := newIndex()
	x.SetService(service("few", []string{corev1.ClusterIPNone}))
	x.SetSlice(slice("few", "few-a", nil, "10.42.0.1", "10.42.0.2", "10.42.0.3", "10.42.0.4"))
	first := map[string]int{}
	for range 4000 {
		m, _, _ := ask(t, x, "few.default.svc.cluster.local", "A", 512)
		if len(m.Answer) != 4 {
			t.Fatal(m)
		}
		first[m.Answer[0].(*dns.A).A.String()]++
	}
	for a, n := range first {
		if n < 800 || n > 1200 { // six standard deviations
			t.Errorf("%s is first %d times of 4000", a, n)
		}
	}
}

// Concurrent queries and changes, for the race detector; every answer must have been true
// at some moment.
func TestAtTheSameTime(t *testing.T) {
	x := newIndex()
	s := service("s", []string{corev1.ClusterIPNone}, "p/TCP/1")
	a := slice("s", "s-1", []string{"p/TCP/1"}, "10.42.0.1 a")
	b := slice("s", "s-1", []string{"p/TCP/1"}, "10.42.0.2 a", "10.42.0.3 b")
	x.SetService(s)
	x.SetSlice(a)
	var all sync.WaitGroup
	done := make(chan struct{})
	for range 2 {
		all.Go(func() {
			for {
				select {
				case <-done:
					return
				default:
				}
				m, _, _ := ask(t, x, "s.default.svc.cluster.local", "A", 512)
				if got := told(m); got != "A 10.42.0.1" && got != "A 10.42.0.2; A 10.42.0.3" {
					t.Errorf("got %s", got)
				}
				ask(t, x, "2.0.42.10.in-addr.arpa", "PTR", 512)
				ask(t, x, "_p._tcp.s.default.svc.cluster.local", "SRV", 512)
			}
		})
	}
	for i := range 2000 {
		x.SetSlice([]*discoveryv1.EndpointSlice{a, b}[i%2])
	}
	close(done)
	all.Wait()
}

// A service replaces another at its address; the events may come in either order.
func TestReverseNameOfTwoServices(t *testing.T) {
	for _, names := range [][]string{{"a", "b"}, {"b", "a"}} {
		x := newIndex()
		for _, name := range names {
			x.SetService(service(name, []string{"10.43.0.3"}, "p/TCP/1"))
		}
		if m, _, _ := ask(t, x, "3.0.43.10.in-addr.arpa", "PTR", 512); told(m) != "PTR a.default.svc.cluster.local." {
			t.Errorf("after events of %v the name is %s", names, told(m))
		}
	}
}

// After any sequence of events the index must answer like an index that received only the
// final objects.
func TestRandomEvents(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	x := newIndex()
	services := map[string]*corev1.Service{}
	byName := map[string]*discoveryv1.EndpointSlice{}
	names := []string{"a", "b", "c"}
	for range 3000 {
		name := names[rng.IntN(len(names))]
		sl := fmt.Sprintf("%s-%d", name, rng.IntN(3))
		switch rng.IntN(6) {
		case 0:
			ip := corev1.ClusterIPNone
			if rng.IntN(2) == 0 {
				ip = fmt.Sprintf("10.43.0.%d", rng.IntN(5))
			}
			services[name] = service(name, []string{ip}, "p/TCP/1")
			x.SetService(services[name])
		case 1:
			services[name] = external(name, "example.com")
			x.SetService(services[name])
		case 2:
			delete(services, name)
			x.DeleteService("default", name)
		case 3, 4:
			var eps []string
			for range rng.IntN(4) {
				eps = append(eps, fmt.Sprintf("10.42.0.%d %s", rng.IntN(5), []string{"", "h", "i"}[rng.IntN(3)]))
			}
			byName[sl] = slice(name, sl, []string{"p/TCP/1"}, eps...)
			byName[sl].AddressType = discoveryv1.AddressTypeIPv4
			x.SetSlice(byName[sl])
		case 5:
			delete(byName, sl)
			x.DeleteSlice(slice(name, sl, nil))
		}
	}
	fresh := newIndex()
	for _, s := range services {
		fresh.SetService(s)
	}
	for _, s := range byName {
		fresh.SetSlice(s)
	}
	var questions []string
	for _, n := range names {
		for _, h := range []string{"", "h.", "i.", "10-42-0-1.", "10-42-0-4.", "_p._tcp.", "_tcp."} {
			questions = append(questions, h+n+".default.svc.cluster.local")
		}
	}
	for i := range 5 {
		questions = append(questions, fmt.Sprintf("%d.0.42.10.in-addr.arpa", i), fmt.Sprintf("%d.0.43.10.in-addr.arpa", i))
	}
	for _, q := range questions {
		for _, qtype := range []string{"A", "SRV", "PTR", "CNAME"} {
			got, v, _ := ask(t, x, q, qtype, message.MaxTCP)
			want, w, _ := ask(t, fresh, q, qtype, message.MaxTCP)
			if v != w || told(got) != told(want) {
				t.Errorf("seed %d: %s %s:\n got %s\nwant %s", seed, qtype, q, told(got), told(want))
			}
		}
	}
	if got, want := len(x.reverse), len(fresh.reverse); got != want {
		t.Errorf("seed %d: %d reverse names, want %d", seed, got, want)
	}
}

func BenchmarkAnswer(b *testing.B) {
	x := newIndex()
	for i := range 5000 {
		name := fmt.Sprintf("svc-%d", i)
		x.SetService(service(name, []string{fmt.Sprintf("10.43.%d.%d", 4+i/250, i%250)}, "http/TCP/80"))
		x.SetSlice(slice(name, name+"-a", []string{"http/TCP/8080"}, fmt.Sprintf("10.42.%d.%d", i/250, i%250)))
	}
	for _, c := range []struct{ name, qtype, question string }{
		{"service", "A", "svc-4711.default.svc.cluster.local."},
		{"denial", "AAAA", "svc-4711.default.svc.cluster.local."},
		{"search", "A", "example.com.default.svc.cluster.local."},
		{"srv", "SRV", "_http._tcp.svc-4711.default.svc.cluster.local."},
		{"reverse", "PTR", "10.1.42.10.in-addr.arpa."},
	} {
		b.Run(c.name, func(b *testing.B) {
			m := new(dns.Msg)
			m.SetQuestion(c.question, dns.StringToType[c.qtype])
			packet, err := m.Pack()
			if err != nil {
				b.Fatal(err)
			}
			var q message.Query
			var r message.Reply
			buf := make([]byte, 0, 1232)
			b.ReportAllocs()
			for b.Loop() {
				if err := q.Parse(packet); err != nil {
					b.Fatal(err)
				}
				r.Begin(&q, buf, 1232)
				if v, _ := x.Answer(&q, &r); v != Answered {
					b.Fatal(v)
				}
				r.Finish()
			}
		})
	}
}

func BenchmarkSetSlice(b *testing.B) {
	x := newIndex()
	x.SetService(service("big", []string{corev1.ClusterIPNone}, "p/TCP/1"))
	for i := range 10 {
		var eps []string
		for j := range 100 {
			eps = append(eps, fmt.Sprintf("10.42.%d.%d", i, j))
		}
		x.SetSlice(slice("big", fmt.Sprint("big-", i), []string{"p/TCP/1"}, eps...))
	}
	some := []*discoveryv1.EndpointSlice{
		slice("big", "big-0", []string{"p/TCP/1"}, "10.42.0.1"), slice("big", "big-0", []string{"p/TCP/1"}, "10.42.0.2"),
	}
	i := 0
	for b.Loop() {
		x.SetSlice(some[i%2])
		i++
	}
}
