package outside

import (
	"fmt"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"

	"kedge/dns/message"
	"kedge/internal/test/await"
)

func listenUDP(t *testing.T, addr string) net.PacketConn {
	t.Helper()
	return await.Listener(t, func() (net.PacketConn, error) { return net.ListenPacket("udp", addr) })
}

func query(t testing.TB, m *dns.Msg) *message.Query {
	t.Helper()
	p, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	q := new(message.Query)
	if err := q.Parse(p); err != nil {
		t.Fatal(err)
	}
	return q
}

func TestCacheIsBounded(t *testing.T) {
	const limit = 64 << 10
	c := newCache(limit)
	msg := make([]byte, 100)
	for i := range 10000 {
		c.put(fmt.Appendf(nil, "name-%d", i), &entry{msg: msg, stored: time.Now(), ttl: time.Hour})
		c.put(fmt.Appendf(nil, "name-%d", i%100), &entry{msg: msg[:i%50], stored: time.Now()}) // replaces an entry
	}
	total := 0
	for i := range c.shard {
		s := &c.shard[i]
		counted := 0
		for _, key := range s.lru.Keys() {
			e, _ := s.lru.Peek(key)
			counted += cost(key, e)
		}
		if counted != s.bytes {
			t.Errorf("shard %d counts %d bytes and has %d", i, s.bytes, counted)
		}
		total += s.bytes
	}
	if total > limit || total < limit/2 {
		t.Errorf("%d bytes of %d", total, limit)
	}
	if c.evicted.Load() == 0 {
		t.Error("nothing was evicted")
	}
}

func TestCacheKeepsWhatIsUsed(t *testing.T) {
	c := newCache(64 << 10)
	hot := []byte("hot")
	c.put(hot, &entry{stored: time.Now()})
	for i := range 10000 {
		c.put(fmt.Appendf(nil, "name-%d", i), &entry{stored: time.Now()})
		if c.get(hot) == nil {
			t.Fatalf("lost after %d others", i)
		}
	}
}

func BenchmarkCached(b *testing.B) {
	r := NewResolver(Config{ResolvConf: func() string { return "/nonexistent" }}, &ignoreEvents{}, slog.New(slog.DiscardHandler))
	m := new(dns.Msg).SetQuestion("www.example.com.", dns.TypeA)
	a := new(dns.Msg).SetReply(m)
	rr, err := dns.NewRR("www.example.com. 3600 IN A 192.0.2.1")
	if err != nil {
		b.Fatal(err)
	}
	a.Answer = []dns.RR{rr}
	e, err := newEntry(m, a, time.Now())
	if err != nil {
		b.Fatal(err)
	}
	q := query(b, m)
	r.cache.put(q.AppendKey(nil), e)
	buf := make([]byte, 0, 1232)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok := r.Cached(q, buf, 512); !ok {
			b.Fatal("not cached")
		}
	}
}
