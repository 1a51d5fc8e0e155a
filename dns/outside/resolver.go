package outside

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/miekg/dns"

	"kedge/dns/message"
)

const (
	// CacheBytes is how much memory answers may use: some ten thousand names.
	CacheBytes = 4 << 20

	maxTTL       = time.Hour       // RFC 8767 advises a bound
	maxDenialTTL = 5 * time.Minute // a name that is made now should be seen soon
	failureTTL   = 2 * time.Second // how often a failing name is asked for at most

	// clientPatience is how long a client is kept waiting for a fresh answer when
	// there is an old one (RFC 8767, section 5).
	clientPatience = 1800 * time.Millisecond

	// questionTimeout is how long one question may take in all; clients give up after five.
	questionTimeout = 4 * time.Second

	// retryStale is how long an old answer is given before servers are asked again.
	retryStale = 5 * time.Second

	// maxQuestions is how many questions may be under way; more are refused, because
	// each has a goroutine, a socket and a waiting client.
	maxQuestions = 1000

	// An answer that was asked for this often is refreshed before it gets old.
	hotHits = 5
)

// Watcher is told what happens, for metrics. Its methods may be called at the same time
// and must not block.
type Watcher interface {
	// Exchanged tells of one exchange with a server; rcode is -1 when it failed.
	Exchanged(server netip.AddrPort, took time.Duration, rcode int)
	// Unhealthy tells that a server is left out from now on.
	Unhealthy(server netip.AddrPort)
	// Cache tells what became of a question to the cache.
	Cache(Event)
}

// Event is what happens in the cache.
type Event int

// Events.
const (
	Hit Event = iota
	DenialHit
	Miss
	Prefetch
	Stale
	Overload // a question was refused because too many are under way
)

// Resolver answers questions about outside names.
type Resolver struct {
	log   *slog.Logger
	watch Watcher
	cache *cache
	now   func() time.Time

	slots chan struct{} // one for each question under way

	mu      sync.Mutex // guards what follows
	flights map[string]*flight
	servers servers
}

// flight is a question under way, for all who ask it.
type flight struct {
	done  chan struct{}
	entry *entry // valid after done
}

// Config is what a resolver is told once.
type Config struct {
	// ResolvConf returns the file that names the host's name servers. It is called
	// every now and then while there are questions: another file may be right by then.
	ResolvConf func() string
	// Own are addresses that lead back to us and must not be asked.
	Own []netip.Addr
}

// NewResolver makes a resolver. Close ends what it does in the background.
func NewResolver(cfg Config, watch Watcher, log *slog.Logger) *Resolver {
	return &Resolver{
		log: log, watch: watch, cache: newCache(CacheBytes), now: time.Now,
		flights: map[string]*flight{}, slots: make(chan struct{}, maxQuestions),
		servers: servers{cfg: cfg, watch: watch, log: log, known: map[netip.AddrPort]*upstream{}, tokens: map[string]netip.AddrPort{}},
	}
}

// Close lets go of all servers. Questions asked afterwards fail.
func (r *Resolver) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.servers.close()
}

// Cached answers q without waiting, when a fresh answer is at hand.
func (r *Resolver) Cached(q *message.Query, buf []byte, limit int) ([]byte, bool) {
	var space [maxKey]byte
	key := q.AppendKey(space[:0])
	e := r.cache.get(key)
	if e == nil {
		return nil, false
	}
	now := r.now()
	if !e.fresh(now) {
		return nil, false
	}
	age := now.Sub(e.stored)
	switch {
	case age >= e.ttl:
		r.watch.Cache(Stale)
	case e.denial || e.failure:
		r.watch.Cache(DenialHit)
	default:
		r.watch.Cache(Hit)
	}
	// The last tenth of its time, and often asked for: whoever asks next shall not wait.
	if e.hits.Add(1) >= hotHits && age > e.ttl-e.ttl/10 && !e.failure && e.refreshing.CompareAndSwap(false, true) {
		r.watch.Cache(Prefetch)
		r.start(q, string(key))
	}
	return e.write(q, buf, limit, now), true
}

// maxKey is the longest key: a name, a type, flags.
const maxKey = 255 + 3

// Resolve answers q, asking other servers when it must. It always returns an answer.
func (r *Resolver) Resolve(ctx context.Context, q *message.Query, buf []byte, limit int) []byte {
	if out, ok := r.Cached(q, buf, limit); ok {
		return out
	}
	r.watch.Cache(Miss)
	key := string(q.AppendKey(nil))
	old := r.cache.get([]byte(key))
	if old != nil && !old.useful(r.now()) {
		old = nil
	}
	f := r.start(q, key)
	if f == nil {
		r.watch.Cache(Overload)
		return r.fallback(q, buf, limit, old)
	}
	patience := questionTimeout
	if old != nil {
		patience = clientPatience
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-f.done:
		if f.entry != nil && (!f.entry.failure || old == nil) {
			return f.entry.write(q, buf, limit, r.now())
		}
	case <-timer.C:
	case <-ctx.Done():
	}
	return r.fallback(q, buf, limit, old)
}

// fallback is an old answer, or a failure.
func (r *Resolver) fallback(q *message.Query, buf []byte, limit int, old *entry) []byte {
	if old != nil {
		old.retry.Store(r.now().Add(retryStale).UnixNano())
		r.watch.Cache(Stale)
		return old.write(q, buf, limit, r.now())
	}
	var reply message.Reply
	reply.Begin(q, buf, limit)
	reply.Fail(message.ServFail)
	return reply.Finish()
}

// start asks q in the background, once for all who ask the same, and returns nil when
// too many questions are under way.
func (r *Resolver) start(q *message.Query, key string) *flight {
	r.mu.Lock()
	defer r.mu.Unlock()
	if f := r.flights[key]; f != nil {
		return f
	}
	select {
	case r.slots <- struct{}{}:
	default:
		return nil
	}
	f := &flight{done: make(chan struct{})}
	r.flights[key] = f
	question, err := toMsg(q)
	servers, changed := r.servers.route(q, r.now())
	if changed {
		r.cache.clear() // names may mean something else there
	}
	go func() {
		defer func() { <-r.slots }()
		if err == nil {
			f.entry = r.ask(servers, question, []byte(key))
		}
		r.mu.Lock()
		delete(r.flights, key)
		r.mu.Unlock()
		close(f.done)
	}()
	return f
}

// ask asks servers and keeps what they say.
func (r *Resolver) ask(servers *group, m *dns.Msg, key []byte) *entry {
	ctx, cancel := context.WithTimeoutCause(context.Background(), questionTimeout, errSlow)
	defer cancel()
	answer, err := servers.ask(ctx, m)
	if err != nil {
		r.log.Debug("no answer", "name", m.Question[0].Name, "type", dns.TypeToString[m.Question[0].Qtype], "cause", err)
		answer = new(dns.Msg)
		answer.SetRcode(m, dns.RcodeServerFailure)
	}
	e, err := newEntry(m, answer, r.now())
	if err != nil {
		r.log.Debug("answer left out", "name", m.Question[0].Name, "cause", err)
		return nil
	}
	switch old := r.cache.get(key); {
	case e.failure && old != nil && old.useful(r.now()):
		old.retry.Store(r.now().Add(retryStale).UnixNano()) // better an old answer than none
		old.refreshing.Store(false)
	case e.ttl > 0:
		r.cache.put(key, e)
	}
	return e
}

var errSlow = errors.New("no name server answered in time")

// toMsg is the question that is sent to other servers.
func toMsg(q *message.Query) (*dns.Msg, error) {
	name, _, err := dns.UnpackDomainName(q.Name(), 0)
	if err != nil {
		return nil, fmt.Errorf("read the name: %w", err)
	}
	m := new(dns.Msg)
	m.SetQuestion(name, q.Type)
	m.CheckingDisabled = q.CD
	m.SetEdns0(udpSize, q.DO)
	return m, nil
}

// newEntry makes an answer ready to be sent and kept.
func newEntry(m, answer *dns.Msg, now time.Time) (*entry, error) {
	a := &dns.Msg{MsgHdr: dns.MsgHdr{
		Response: true, Rcode: answer.Rcode, AuthenticatedData: answer.AuthenticatedData, RecursionAvailable: true,
	}, Question: m.Question, Answer: answer.Answer, Ns: answer.Ns, Compress: true}
	for _, rr := range answer.Extra {
		if rr.Header().Rrtype != dns.TypeOPT && rr.Header().Rrtype != dns.TypeTSIG {
			a.Extra = append(a.Extra, rr)
		}
	}
	if a.Rcode > 0xF {
		a.Rcode = dns.RcodeServerFailure // extended codes speak of OPT, which is between two servers
	}
	e := &entry{stored: now, failure: bad(a)}
	e.ttl, e.denial = lifetime(a)
	if e.failure {
		e.ttl, a.Answer, a.Ns, a.Extra = failureTTL, nil, nil, nil
	}
	var err error
	if e.msg, err = a.Pack(); err != nil {
		return nil, fmt.Errorf("pack the answer: %w", err)
	}
	var ok bool
	if e.ttls, e.ends, ok = message.Layout(e.msg); !ok {
		return nil, errMalformed
	}
	return e, nil
}

// lifetime is how long an answer may be kept: as long as its shortest record, and a
// denial as long as its SOA record says (RFC 2308). Without one it may not be kept.
func lifetime(a *dns.Msg) (ttl time.Duration, denial bool) {
	wanted := a.Question[0].Qtype
	denial = true
	shortest := uint32(maxTTL / time.Second)
	for _, rr := range a.Answer {
		h := rr.Header()
		shortest = min(shortest, h.Ttl)
		if h.Rrtype == wanted || wanted == dns.TypeANY {
			denial = false
		}
	}
	if a.Rcode == dns.RcodeNameError {
		denial = true
	}
	if !denial {
		return time.Duration(shortest) * time.Second, false
	}
	for _, rr := range a.Ns {
		if soa, ok := rr.(*dns.SOA); ok {
			s := min(shortest, soa.Hdr.Ttl, soa.Minttl, uint32(maxDenialTTL/time.Second))
			return time.Duration(s) * time.Second, true
		}
	}
	return 0, true
}
