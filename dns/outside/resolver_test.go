package outside

import (
	"fmt"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/internal/test/await"

	"github.com/miekg/dns"
)

const soaText = "example. 600 IN SOA ns.example. h.example. 1 2 3 4 60"

func TestCacheCountsDown(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, 0, ". 300 IN A 192.0.2.1", ""))
	r, n := newResolver(t, s)
	c := (&clock{}).set(r)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 300, 300)
	c.pass(100 * time.Second)
	m := ask(t, r, "A.eXAMPLE.", dns.TypeA)
	wantA(t, m, "192.0.2.1", 199, 200)
	if m.Answer[0].Header().Name != "A.eXAMPLE." {
		t.Errorf("the case is lost: %s", m.Answer[0])
	}
	if s.asked.Load() != 1 || n.events[Hit].Load() != 1 || n.events[Miss].Load() != 1 {
		t.Errorf("asked %d times, %d hits, %d misses", s.asked.Load(), n.events[Hit].Load(), n.events[Miss].Load())
	}
	c.pass(201 * time.Second)
	s.set(says(t, 0, ". 300 IN A 192.0.2.2", ""))
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.2", 300, 300)
}

func TestDenialsAreKeptAsLongAsTheirZoneSays(t *testing.T) {
	for name, rcode := range map[string]int{"nx.example.": dns.RcodeNameError, "nodata.example.": dns.RcodeSuccess} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, "127.0.0.2", says(t, rcode, "", soaText))
			r, n := newResolver(t, s)
			c := (&clock{}).set(r)
			for range 3 {
				m := ask(t, r, name, dns.TypeA)
				if m.Rcode != rcode || len(m.Ns) != 1 || m.Ns[0].Header().Ttl > 60 {
					t.Fatalf("got %s", m)
				}
			}
			if s.asked.Load() != 1 || n.events[DenialHit].Load() != 2 {
				t.Errorf("asked %d times, %d hits", s.asked.Load(), n.events[DenialHit].Load())
			}
			c.pass(61 * time.Second)
			ask(t, r, name, dns.TypeA)
			if s.asked.Load() != 2 {
				t.Errorf("asked %d times after its time", s.asked.Load())
			}
			// A negative answer without a SOA record must not be cached.
			s.set(says(t, rcode, "", ""))
			before := s.asked.Load()
			for range 2 {
				ask(t, r, "other."+name, dns.TypeA)
			}
			if got := s.asked.Load() - before; got != 2 {
				t.Errorf("asked %d times for what may not be kept", got)
			}
		})
	}
}

// An alias without a record of the requested type is a negative answer, even though it has
// a record.
func TestAliasToNothing(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, 0, ". 3600 IN CNAME other.example.", soaText))
	r, _ := newResolver(t, s)
	c := (&clock{}).set(r)
	ask(t, r, "a.example.", dns.TypeAAAA)
	c.pass(61 * time.Second)
	ask(t, r, "a.example.", dns.TypeAAAA)
	if s.asked.Load() != 2 {
		t.Errorf("asked %d times", s.asked.Load())
	}
}

func TestLongAnswersComeOverTCP(t *testing.T) {
	s := newServer(t, "127.0.0.2", func(m *dns.Msg, tcp bool) *dns.Msg {
		a := new(dns.Msg).SetReply(m)
		if !tcp {
			a.Truncated = true
			return a
		}
		for i := range 200 {
			rr, _ := dns.NewRR(fmt.Sprintf("%s 60 IN A 192.0.2.%d", m.Question[0].Name, i))
			a.Answer = append(a.Answer, rr)
		}
		return a
	})
	r, _ := newResolver(t, s)
	m := ask(t, r, "many.example.", dns.TypeA)
	if !m.Truncated || len(m.Answer) < 60 {
		t.Errorf("over UDP %d records, truncated %v", len(m.Answer), m.Truncated)
	}
}

func TestOneQuestionForAllWhoAsk(t *testing.T) {
	hold := make(chan struct{})
	s := newServer(t, "127.0.0.2", func(m *dns.Msg, _ bool) *dns.Msg {
		<-hold
		return says(t, 0, ". 300 IN A 192.0.2.1", "")(m, false)
	})
	r, _ := newResolver(t, s)
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() { wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 299, 300) })
	}
	await.True(t, "the server is asked", func() bool { return s.asked.Load() > 0 })
	close(hold)
	all.Wait()
	if s.asked.Load() != 1 {
		t.Errorf("asked %d times", s.asked.Load())
	}
}

func TestDeadServerCostsOneWait(t *testing.T) {
	dead := newServer(t, "127.0.0.2", func(*dns.Msg, bool) *dns.Msg { return nil })
	alive := newServer(t, "127.0.0.3", says(t, 0, ". 300 IN A 192.0.2.1", ""))
	r, n := newResolver(t, dead, alive)
	began := time.Now()
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 300, 300)
	if took := time.Since(began); took > time.Second {
		t.Errorf("the first question took %s", took)
	}
	dead.stop() // now not even probes are answered
	deadline := time.Now().Add(20 * time.Second)
	for i := 0; n.down.Load() == 0; i++ {
		ask(t, r, fmt.Sprintf("b%d.example.", i), dns.TypeA)
		if time.Now().After(deadline) {
			t.Fatal("the dead server is not noticed")
		}
	}
	began = time.Now()
	for i := range 20 {
		ask(t, r, fmt.Sprintf("c%d.example.", i), dns.TypeA)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("20 questions with a dead first server took %s", took)
	}
	// The server answers again, and is the first choice again.
	dead.start(t)
	dead.set(says(t, 0, ". 300 IN A 192.0.2.9", ""))
	before := alive.asked.Load()
	for i := 0; ; i++ {
		if m := ask(t, r, fmt.Sprintf("d%d.example.", i), dns.TypeA); m.Answer[0].(*dns.A).A.String() == "192.0.2.9" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the server that came back is not asked; the other was %d times", alive.asked.Load()-before)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// If a server fails for a name, the next one is queried.
func TestFailuresAreOneServersOpinion(t *testing.T) {
	for _, rcode := range []int{dns.RcodeServerFailure, dns.RcodeRefused, dns.RcodeNotImplemented} {
		bad := newServer(t, "127.0.0.2", says(t, rcode, "", ""))
		good := newServer(t, "127.0.0.3", says(t, 0, ". 300 IN A 192.0.2.1", ""))
		r, _ := newResolver(t, bad, good)
		wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 300, 300)
		good.set(says(t, dns.RcodeServerFailure, "", ""))
		if m := ask(t, r, "b.example.", dns.TypeA); m.Rcode == dns.RcodeSuccess {
			t.Errorf("got %s", m)
		}
		bad.stop()
		good.stop()
	}
}

func TestManyServersThatRefuse(t *testing.T) {
	var all []*server
	for i := range maxAttempts + 2 {
		all = append(all, newServer(t, fmt.Sprintf("127.0.0.%d", 2+i), says(t, dns.RcodeRefused, "", "")))
	}
	r, _ := newResolver(t, all...)
	began := time.Now()
	if m := ask(t, r, "a.example.", dns.TypeA); m.Rcode != dns.RcodeRefused || time.Since(began) > time.Second {
		t.Errorf("after %s: %s", time.Since(began), m)
	}
}

// A failing name is not queried repeatedly, however often clients ask.
func TestFailuresAreAskedForSeldom(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, dns.RcodeServerFailure, "", ""))
	r, _ := newResolver(t, s)
	for range 100 {
		if m := ask(t, r, "a.example.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
			t.Fatalf("got %s", m)
		}
	}
	if got := s.asked.Load(); got > 3 {
		t.Errorf("asked %d times", got)
	}
}

func TestOldAnswersWhileNoServerAnswers(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, 0, ". 60 IN A 192.0.2.1", ""))
	r, n := newResolver(t, s)
	c := (&clock{}).set(r)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 60, 60)
	s.stop()
	c.pass(time.Hour)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", staleTTL, staleTTL)
	began := time.Now()
	for range 10 {
		wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", staleTTL, staleTTL)
	}
	if took := time.Since(began); took > 500*time.Millisecond {
		t.Errorf("ten old answers took %s", took)
	}
	if n.events[Stale].Load() == 0 {
		t.Error("not counted")
	}
	c.pass(staleFor)
	if m := ask(t, r, "a.example.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("an answer of yesterday: %s", m)
	}
}

// With a slow server, clients get a stale answer if there is one.
func TestOldAnswerWhenTheNewOneTakesLong(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, 0, ". 60 IN A 192.0.2.1", ""))
	r, _ := newResolver(t, s)
	c := (&clock{}).set(r)
	ask(t, r, "a.example.", dns.TypeA)
	s.set(func(*dns.Msg, bool) *dns.Msg { return nil })
	c.pass(time.Hour)
	began := time.Now()
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", staleTTL, staleTTL)
	if took := time.Since(began); took > clientResponseTimeout+time.Second {
		t.Errorf("took %s", took)
	}
}

func TestHotNamesAreRefreshedBefore(t *testing.T) {
	s := newServer(t, "127.0.0.2", says(t, 0, ". 100 IN A 192.0.2.1", ""))
	r, n := newResolver(t, s)
	c := (&clock{}).set(r)
	for range prefetchHits {
		ask(t, r, "hot.example.", dns.TypeA)
	}
	ask(t, r, "cold.example.", dns.TypeA)
	s.set(says(t, 0, ". 100 IN A 192.0.2.2", ""))
	c.pass(95 * time.Second)
	wantA(t, ask(t, r, "hot.example.", dns.TypeA), "192.0.2.1", 1, 5)
	wantA(t, ask(t, r, "cold.example.", dns.TypeA), "192.0.2.1", 1, 5)
	deadline := time.Now().Add(5 * time.Second)
	for s.asked.Load() < 3 && time.Now().Before(deadline) {
		time.Sleep(time.Millisecond)
	}
	for ask(t, r, "hot.example.", dns.TypeA).Answer[0].(*dns.A).A.String() != "192.0.2.2" {
		if time.Now().After(deadline) {
			t.Fatal("not refreshed")
		}
	}
	if got := s.asked.Load(); got != 3 || n.events[Prefetch].Load() != 1 {
		t.Errorf("asked %d times, %d times beforehand", got, n.events[Prefetch].Load())
	}
}

func TestWithoutServersTheAnswerIsImmediate(t *testing.T) {
	r, _, _ := newResolverOf(t, "# none\nsearch example\n")
	began := time.Now()
	if m := ask(t, r, "a.example.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %s", m)
	}
	if took := time.Since(began); took > 500*time.Millisecond {
		t.Errorf("took %s", took)
	}
}

func TestOfflineIsImmediateAfterTheFirst(t *testing.T) {
	s := newServer(t, "127.0.0.2", func(*dns.Msg, bool) *dns.Msg { return nil })
	r, n := newResolver(t, s)
	s.stop()
	deadline := time.Now().Add(20 * time.Second)
	for i := 0; n.down.Load() == 0 && time.Now().Before(deadline); i++ {
		ask(t, r, fmt.Sprintf("a%d.example.", i), dns.TypeA)
	}
	began := time.Now()
	for i := range 50 {
		if m := ask(t, r, fmt.Sprintf("b%d.example.", i), dns.TypeA); m.Rcode != dns.RcodeServerFailure {
			t.Fatalf("got %s", m)
		}
	}
	if took := time.Since(began); took > 500*time.Millisecond {
		t.Errorf("50 questions took %s", took)
	}
}

func TestForgedAnswersAreIgnored(t *testing.T) {
	s := newServer(t, "127.0.0.2", func(m *dns.Msg, _ bool) *dns.Msg {
		forged := says(t, 0, ". 300 IN A 203.0.113.66", "")(m, false)
		if strings.HasPrefix(m.Question[0].Name, "id") {
			forged.Id++
		} else {
			forged.Question[0].Name = "other.example."
		}
		return forged
	})
	r, _ := newResolver(t, s)
	for _, name := range []string{"id.example.", "name.example."} {
		if m := ask(t, r, name, dns.TypeA); m.Rcode != dns.RcodeServerFailure || len(m.Answer) != 0 {
			t.Errorf("%s: got %s", name, m)
		}
	}
}

// Old forwarders without EDNS are queried without it.
func TestServerWithoutEDNS(t *testing.T) {
	s := newServer(t, "127.0.0.2", func(m *dns.Msg, _ bool) *dns.Msg {
		if m.IsEdns0() != nil {
			return new(dns.Msg).SetRcodeFormatError(m)
		}
		return says(t, 0, ". 300 IN A 192.0.2.1", "")(m, false)
	})
	r, _ := newResolver(t, s)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 300, 300)
}

func TestResolvConfIsReadAgain(t *testing.T) {
	one := newServer(t, "127.0.0.2", says(t, 0, ". 300 IN A 192.0.2.1", ""))
	two := newServer(t, "127.0.0.3", says(t, 0, ". 300 IN A 192.0.2.2", ""))
	r, _, file := newResolverOf(t, "nameserver 127.0.0.2\n")
	c := (&clock{}).set(r)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 300, 300)
	// No servers at all, for a while: the cache stays.
	write(t, file, "")
	c.pass(rereadAfter + time.Second)
	if m := ask(t, r, "b.example.", dns.TypeA); m.Rcode != dns.RcodeServerFailure {
		t.Errorf("got %s", m)
	}
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.1", 290, 300)
	// Another network: cached answers may be wrong there.
	write(t, file, "nameserver 127.0.0.3\nnameserver 10.43.0.10\n")
	c.pass(rereadAfter + time.Second)
	wantA(t, ask(t, r, "c.example.", dns.TypeA), "192.0.2.2", 300, 300)
	wantA(t, ask(t, r, "a.example.", dns.TypeA), "192.0.2.2", 300, 300)
	if one.asked.Load() != 1 || two.asked.Load() != 2 {
		t.Errorf("asked %d and %d times", one.asked.Load(), two.asked.Load())
	}
}

func TestParse(t *testing.T) {
	own := []netip.Addr{netip.MustParseAddr("10.43.0.10")}
	got := fmt.Sprint(parse("nameserver 192.0.2.1\n#nameserver 192.0.2.9\nnameserver 10.43.0.10\n nameserver fe80::1%eth0 \nnameserver x\nnameserver\nnameserver 0.0.0.0\nnameserver 192.0.2.1\nsearch a\n", own))
	if want := "[192.0.2.1:53 [fe80::1%eth0]:53 127.0.0.1:53]"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// A server that forwards to this resolver is detected and not used.
func TestLoop(t *testing.T) {
	var r *Resolver
	looped := make(chan struct{})
	s := newServer(t, "127.0.0.2", says(t, 0, ". 300 IN A 192.0.2.1", ""))
	s.stop()
	pc := listenUDP(t, "127.0.0.2:53")
	started := make(chan struct{})
	d := &dns.Server{PacketConn: pc, NotifyStartedFunc: func() { close(started) }, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		if m.Question[0].Qtype == dns.TypeHINFO && r.IsLoopProbe(query(t, m)) {
			close(looped)
		}
		w.WriteMsg(new(dns.Msg).SetReply(m))
	})}
	r, _, _ = newResolverOf(t, "nameserver 127.0.0.2\n")
	go d.ActivateAndServe()
	t.Cleanup(func() { d.Shutdown() })
	<-started
	if r.IsLoopProbe(query(t, new(dns.Msg).SetQuestion("12.34.", dns.TypeHINFO))) {
		t.Error("another query is taken for the loop probe")
	}
	r.ReadHostServers()
	select {
	case <-looped:
	case <-time.After(5 * time.Second):
		t.Fatal("the server was not tried")
	}
	if r.Check() == nil {
		t.Error("Check does not report it")
	}
	began := time.Now()
	if m := ask(t, r, "a.example.", dns.TypeA); m.Rcode != dns.RcodeServerFailure || time.Since(began) > time.Second {
		t.Errorf("after %s: %s", time.Since(began), m)
	}
}

func TestStubZones(t *testing.T) {
	corp := newServer(t, "127.0.0.2", says(t, 0, ". 300 IN A 192.0.2.1", ""))
	lab := newServer(t, "127.0.0.3", says(t, 0, ". 300 IN A 192.0.2.2", ""))
	host := newServer(t, "127.0.0.4", says(t, 0, ". 300 IN A 192.0.2.3", ""))
	r, _ := newResolver(t, host)
	wantA(t, ask(t, r, "a.corp.example.", dns.TypeA), "192.0.2.3", 300, 300)
	r.SetStubs([]Stub{
		{Zone: "\x04corp\x07example\x00", Servers: []netip.AddrPort{corp.addr}},
		{Zone: "\x03lab\x04corp\x07example\x00", Servers: []netip.AddrPort{lab.addr}},
	})
	wantA(t, ask(t, r, "a.corp.example.", dns.TypeA), "192.0.2.1", 300, 300)
	wantA(t, ask(t, r, "CORP.example.", dns.TypeA), "192.0.2.1", 300, 300)
	wantA(t, ask(t, r, "a.lab.corp.example.", dns.TypeA), "192.0.2.2", 300, 300)
	wantA(t, ask(t, r, "xcorp.example.", dns.TypeA), "192.0.2.3", 300, 300)
	r.SetStubs(nil)
	wantA(t, ask(t, r, "a.corp.example.", dns.TypeA), "192.0.2.3", 300, 300)
}

func TestTooManyQuestions(t *testing.T) {
	hold := make(chan struct{})
	s := newServer(t, "127.0.0.2", func(m *dns.Msg, _ bool) *dns.Msg { <-hold; return nil })
	defer close(hold)
	r, n := newResolver(t, s)
	r.slots = make(chan struct{}, 2)
	var all sync.WaitGroup
	for i := range 10 {
		all.Go(func() {
			if m := ask(t, r, fmt.Sprintf("n%d.example.", i), dns.TypeA); m.Rcode != dns.RcodeServerFailure {
				t.Errorf("got %s", m)
			}
		})
	}
	all.Wait()
	if got := n.events[Overload].Load(); got != 8 {
		t.Errorf("%d questions were refused", got)
	}
}
