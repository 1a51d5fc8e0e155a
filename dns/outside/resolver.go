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
	"golang.org/x/sync/singleflight"

	"kedge/dns/message"
)

const (
	// CacheBytes is the memory limit of the cache: some ten thousand names.
	CacheBytes = 4 << 20

	maxTTL       = time.Hour       // RFC 8767 advises a limit
	maxDenialTTL = 5 * time.Minute // a new name should resolve soon
	failureTTL   = 2 * time.Second // minimum interval of queries for a failing name

	// clientResponseTimeout is the time for which a client waits for a fresh answer when
	// there is a stale one (RFC 8767, section 5).
	clientResponseTimeout = 1800 * time.Millisecond

	// questionTimeout is the total time limit of one query; clients give up after five
	// seconds.
	questionTimeout = 4 * time.Second

	// retryStale is the time for which a stale answer is served before servers are queried
	// again.
	retryStale = 5 * time.Second

	// maxQuestions is the maximum number of concurrent queries; more are refused, because
	// each has a goroutine, a socket and a waiting client.
	maxQuestions = 1000

	// An answer with this number of hits is refreshed before it expires.
	prefetchHits = 5
)

// Watcher receives events, for metrics. Its methods may be called concurrently and must not
// block.
type Watcher interface {
	// Exchanged reports one exchange with a server; rcode is -1 if it failed.
	Exchanged(server netip.AddrPort, took time.Duration, rcode int)
	// Unhealthy reports that a server is down.
	Unhealthy(server netip.AddrPort)
	// Cache reports the result of a lookup in the cache.
	Cache(Event)
}

// Event is an event of the cache.
type Event int

// Events.
const (
	Hit Event = iota
	DenialHit
	Miss
	Prefetch
	Stale
	Overload // a query was refused because too many are in progress
)

// Resolver resolves names outside the cluster.
type Resolver struct {
	log   *slog.Logger
	watch Watcher
	cache *cache
	now   func() time.Time

	slots chan struct{} // has one element for each query in progress

	flights singleflight.Group // equal queries of several clients are sent once; the results are *entry

	mu      sync.Mutex // guards servers
	servers servers
}

// Config is the configuration of a resolver.
type Config struct {
	// ResolvConf returns the file with the host's name servers. It is called from time to
	// time while there are queries, because the file may change.
	ResolvConf func() string
	// Own are the addresses of this resolver, which must not be queried.
	Own []netip.Addr
}

// NewResolver returns a resolver. Close ends its background work.
func NewResolver(cfg Config, watch Watcher, log *slog.Logger) *Resolver {
	return &Resolver{
		log: log, watch: watch, cache: newCache(CacheBytes), now: time.Now,
		slots:   make(chan struct{}, maxQuestions),
		servers: servers{cfg: cfg, watch: watch, log: log, known: map[netip.AddrPort]*upstream{}, tokens: map[string]netip.AddrPort{}},
	}
}

// Close releases all servers. Later queries fail.
func (r *Resolver) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.servers.close()
}

// Cached answers q without waiting, if a fresh answer is cached.
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
	// In the last tenth of its TTL, a frequently used answer is refreshed, so that the next
	// client need not wait.
	if e.hits.Add(1) >= prefetchHits && age > e.ttl-e.ttl/10 && !e.failure && e.refreshing.CompareAndSwap(false, true) {
		r.watch.Cache(Prefetch)
		r.start(q, string(key))
	}
	return e.write(q, buf, limit, now), true
}

// maxKey is the longest key: a name, a type, flags.
const maxKey = 255 + 3

// Resolve answers q, querying upstream servers if necessary. It always returns an answer.
func (r *Resolver) Resolve(ctx context.Context, q *message.Query, buf []byte, limit int) []byte {
	if out, ok := r.Cached(q, buf, limit); ok {
		return out
	}
	r.watch.Cache(Miss)
	key := string(q.AppendKey(nil))
	old := r.cache.get([]byte(key))
	if old != nil && !old.usableStale(r.now()) {
		old = nil
	}
	result := r.start(q, key)
	patience := questionTimeout
	if old != nil {
		patience = clientResponseTimeout
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case done := <-result:
		if errors.Is(done.Err, errOverload) {
			r.watch.Cache(Overload)
		}
		if done.Err != nil {
			break
		}
		if e := done.Val.(*entry); !e.failure || old == nil {
			return e.write(q, buf, limit, r.now())
		}
	case <-timer.C:
	case <-ctx.Done():
	}
	return r.fallback(q, buf, limit, old)
}

// fallback returns the stale answer, or a failure.
func (r *Resolver) fallback(q *message.Query, buf []byte, limit int, old *entry) []byte {
	if old != nil {
		old.retry.Store(r.now().Add(retryStale).UnixNano())
		r.watch.Cache(Stale)
		return old.write(q, buf, limit, r.now())
	}
	var reply message.Reply
	reply.Begin(q, buf, limit)
	reply.SetRcode(message.ServFail)
	return reply.Finish()
}

// start queries servers in the background, once for all clients with the same query. The result is an entry, or
// errOverload if too many queries are in progress.
func (r *Resolver) start(q *message.Query, key string) <-chan singleflight.Result {
	question, err := toMsg(q)
	servers := r.route(q)
	return r.flights.DoChan(key, func() (any, error) {
		if err != nil {
			return nil, err
		}
		select {
		case r.slots <- struct{}{}:
			defer func() { <-r.slots }()
		default:
			return nil, errOverload
		}
		return r.ask(servers, question, []byte(key))
	})
}

// route returns the servers for a query. If the host's servers have changed, the cache is cleared: the new servers may have
// other answers.
func (r *Resolver) route(q *message.Query) *group {
	r.mu.Lock()
	defer r.mu.Unlock()
	servers, changed := r.servers.route(q, r.now())
	if changed {
		r.cache.clear()
	}
	return servers
}

// ask queries servers and caches the answer.
func (r *Resolver) ask(servers *group, m *dns.Msg, key []byte) (*entry, error) {
	ctx, cancel := context.WithTimeoutCause(context.Background(), questionTimeout, errSlow)
	defer cancel()
	answer, err := servers.ask(ctx, m)
	if err != nil {
		r.log.Debug("query failed", "name", m.Question[0].Name, "type", dns.TypeToString[m.Question[0].Qtype], "err", err)
		answer = new(dns.Msg)
		answer.SetRcode(m, dns.RcodeServerFailure)
	}
	e, err := newEntry(m, answer, r.now())
	if err != nil {
		r.log.Debug("answer ignored", "name", m.Question[0].Name, "err", err)
		return nil, err
	}
	switch old := r.cache.get(key); {
	case e.failure && old != nil && old.usableStale(r.now()):
		old.retry.Store(r.now().Add(retryStale).UnixNano()) // a stale answer is better than a failure
		old.refreshing.Store(false)
	case e.ttl > 0:
		r.cache.put(key, e)
	}
	return e, nil
}

var (
	errSlow     = errors.New("no name server answered in time")
	errOverload = errors.New("too many queries are in progress")
)

// toMsg returns the query for upstream servers.
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

// newEntry returns the cache entry of an answer.
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
		a.Rcode = dns.RcodeServerFailure // extended codes concern OPT, which is hop-by-hop
	}
	e := &entry{stored: now, failure: isFailure(a)}
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

// lifetime returns the TTL of an answer: the shortest of its records, and for a negative
// answer that of its SOA record (RFC 2308). A negative answer without a SOA record may not
// be cached.
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
