package outside

import (
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"kedge/dns/message"
	"kedge/internal/test/await"
	"kedge/internal/test/host"
)

// The tests have a network of their own: name servers listen on port 53 of 127.0.0.0/8.
// server is a name server that a test starts.
type server struct {
	addr  netip.AddrPort
	asked atomic.Int64 // queries except health and loop probes

	mu     sync.Mutex // guards what follows
	answer func(m *dns.Msg, tcp bool) *dns.Msg
	udp    *dns.Server
	tcp    *dns.Server
}

// newServer starts a name server at an address of 127.0.0.0/8. Its answer function may
// return nil, for no answer at all.
func newServer(t *testing.T, addr string, answer func(m *dns.Msg, tcp bool) *dns.Msg) *server {
	t.Helper()
	host.RequireIsolation(t)
	s := &server{addr: netip.AddrPortFrom(netip.MustParseAddr(addr), 53), answer: answer}
	s.start(t)
	t.Cleanup(s.stop)
	return s
}

func (s *server) start(t *testing.T) {
	t.Helper()
	pc := listenUDP(t, s.addr.String())
	l := await.Listener(t, func() (net.Listener, error) { return net.Listen("tcp", s.addr.String()) })
	handler := func(tcp bool) dns.Handler {
		return dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
			q := m.Question[0]
			if q.Name == "." || q.Qtype == dns.TypeHINFO {
				w.WriteMsg(new(dns.Msg).SetReply(m))
				return
			}
			s.asked.Add(1)
			s.mu.Lock()
			answer := s.answer
			s.mu.Unlock()
			if a := answer(m, tcp); a != nil {
				w.WriteMsg(a)
			}
		})
	}
	s.udp, s.tcp = &dns.Server{PacketConn: pc, Handler: handler(false)}, &dns.Server{Listener: l, Handler: handler(true)}
	for _, d := range []*dns.Server{s.udp, s.tcp} {
		up := make(chan struct{})
		d.NotifyStartedFunc = func() { close(up) }
		go d.ActivateAndServe()
		<-up
	}
}

func (s *server) stop() {
	s.udp.Shutdown()
	s.tcp.Shutdown()
}

func (s *server) set(answer func(*dns.Msg, bool) *dns.Msg) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

// says answers every query with records; $ stands for the name in the query.
func says(t *testing.T, rcode int, answer, authority string) func(*dns.Msg, bool) *dns.Msg {
	t.Helper()
	return func(m *dns.Msg, _ bool) *dns.Msg {
		a := new(dns.Msg).SetRcode(m, rcode)
		for _, s := range []struct {
			text string
			to   *[]dns.RR
		}{{answer, &a.Answer}, {authority, &a.Ns}} {
			if s.text == "" {
				continue
			}
			rr, err := dns.NewRR(s.text)
			if err != nil {
				panic(err)
			}
			if rr.Header().Name == "." {
				rr.Header().Name = m.Question[0].Name
			}
			*s.to = append(*s.to, rr)
		}
		return a
	}
}

// clock is a time that tests set.
type clock struct{ ahead atomic.Int64 }

func (c *clock) now() time.Time         { return time.Now().Add(time.Duration(c.ahead.Load())) }
func (c *clock) pass(d time.Duration)   { c.ahead.Add(int64(d)) }
func (c *clock) set(r *Resolver) *clock { r.now = c.now; return c }

// ignoreEvents is a Watcher that ignores all events.
type ignoreEvents struct {
	events [Overload + 1]atomic.Int64
	down   atomic.Int64
}

func (n *ignoreEvents) Exchanged(netip.AddrPort, time.Duration, int) {}
func (n *ignoreEvents) Unhealthy(netip.AddrPort)                     { n.down.Add(1) }
func (n *ignoreEvents) Cache(e Event)                                { n.events[e].Add(1) }

// newResolver returns a resolver that queries servers, in this order, for everything.
func newResolver(t *testing.T, servers ...*server) (*Resolver, *ignoreEvents) {
	t.Helper()
	content := ""
	for _, s := range servers {
		content += "nameserver " + s.addr.Addr().String() + "\n"
	}
	r, n, _ := newResolverOf(t, content)
	return r, n
}

// newResolverOf returns a resolver whose resolv.conf has the content, and the path of the
// file.
func newResolverOf(t *testing.T, content string) (*Resolver, *ignoreEvents, string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "resolv.conf")
	write(t, file, content)
	n := &ignoreEvents{}
	r := NewResolver(Config{ResolvConf: func() string { return file }, Own: []netip.Addr{netip.MustParseAddr("10.43.0.10")}}, n, slog.New(slog.DiscardHandler))
	t.Cleanup(r.Close)
	return r, n, file
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// ask sends a query as a client does.
func ask(t testing.TB, r *Resolver, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	m.SetEdns0(1232, false)
	packet, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var q message.Query
	if err := q.Parse(packet); err != nil {
		t.Fatal(err)
	}
	a := new(dns.Msg)
	if err := a.Unpack(r.Resolve(t.Context(), &q, nil, q.UDPLimit())); err != nil {
		t.Fatalf("the answer cannot be read: %v", err)
	}
	if a.Id != m.Id || len(a.Question) != 1 || a.Question[0] != m.Question[0] || !a.RecursionAvailable {
		t.Fatalf("the answer to %s is\n%s", name, a)
	}
	return a
}

// wantA checks that the answer is one address with a TTL between two bounds.
func wantA(t *testing.T, m *dns.Msg, addr string, least, most uint32) {
	t.Helper()
	if m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
		t.Fatalf("got %s", m)
	}
	if a, ok := m.Answer[0].(*dns.A); !ok || a.A.String() != addr || a.Hdr.Ttl < least || a.Hdr.Ttl > most {
		t.Fatalf("got %s, want %s with a TTL of %d to %d", m.Answer[0], addr, least, most)
	}
}
