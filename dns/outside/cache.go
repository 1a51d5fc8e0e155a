package outside

import (
	"encoding/binary"
	"hash/maphash"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"

	"kedge/dns/message"
)

const (
	// shards allow concurrent lookups on several processors.
	shards = 16

	// entryOverhead is the approximate memory of an entry besides key and message.
	entryOverhead = 200

	// staleFor is the time for which an expired answer is kept, for when no server answers.
	// RFC 8767 suggests one to three days; the memory limit usually applies first.
	staleFor = 24 * time.Hour

	// staleTTL is the TTL of stale answers, in seconds (RFC 8767, 4).
	staleTTL = 30
)

// entry is an answer as it is sent: to a lower-case question, without OPT record.
type entry struct {
	msg     []byte
	ttls    []uint16 // where the TTLs are
	ends    []uint16 // where the records of the answer section end
	stored  time.Time
	ttl     time.Duration // zero if only the waiting clients may get it
	failure bool
	denial  bool

	hits       atomic.Int32
	refreshing atomic.Bool
	retry      atomic.Int64 // Unix nanoseconds: served without an upstream query until then, at any age
}

// fresh reports whether an entry may be served without an upstream query.
func (e *entry) fresh(now time.Time) bool {
	return now.Sub(e.stored) < e.ttl || e.retry.Load() > now.UnixNano()
}

// usableStale reports whether an entry may be served when no server answers.
func (e *entry) usableStale(now time.Time) bool {
	return !e.failure && now.Sub(e.stored) < e.ttl+staleFor
}

// cache keeps the answers that were used last, up to a number of bytes.
type cache struct {
	seed  maphash.Seed
	limit int // bytes of one shard
	shard [shards]shard

	evicted atomic.Uint64
}

type shard struct {
	mu    sync.Mutex // guards what follows
	lru   *simplelru.LRU[string, *entry]
	bytes int
}

func newCache(limit int) *cache {
	c := &cache{seed: maphash.MakeSeed(), limit: limit / shards}
	for i := range c.shard {
		s := &c.shard[i]
		// The limit is in bytes, so the number of entries has none.
		lru, err := simplelru.NewLRU(math.MaxInt, func(key string, e *entry) { s.bytes -= cost(key, e) })
		if err != nil {
			panic(err) // only about a size that is not positive
		}
		s.lru = lru
	}
	return c
}

func (c *cache) shardOf(key []byte) *shard { return &c.shard[maphash.Bytes(c.seed, key)%shards] }

// get returns the entry of a key at any age, or nil.
func (c *cache) get(key []byte) *entry {
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	e, _ := s.lru.Get(string(key))
	return e
}

// put adds an entry and evicts the ones used longest ago.
func (c *cache) put(key []byte, e *entry) {
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	k := string(key)
	s.lru.Remove(k) // Add would not report the replaced entry
	s.lru.Add(k, e)
	s.bytes += cost(k, e)
	for s.bytes > c.limit && s.lru.Len() > 1 {
		s.lru.RemoveOldest()
		c.evicted.Add(1)
	}
}

// cost is the approximate memory of an entry in bytes.
func cost(key string, e *entry) int {
	return len(key) + len(e.msg) + 2*(len(e.ttls)+len(e.ends)) + entryOverhead
}

// sizes returns the numbers of answers and of negative answers.
func (c *cache) sizes() (success, denial int) {
	for i := range c.shard {
		s := &c.shard[i]
		s.mu.Lock()
		for _, e := range s.lru.Values() {
			if e.denial || e.failure {
				denial++
			} else {
				success++
			}
		}
		s.mu.Unlock()
	}
	return success, denial
}

// clear removes all entries: other servers may have other answers.
func (c *cache) clear() {
	for i := range c.shard {
		s := &c.shard[i]
		s.mu.Lock()
		s.lru.Purge()
		s.mu.Unlock()
	}
}

// write returns the entry as the answer to q.
func (e *entry) write(q *message.Query, buf []byte, limit int, now time.Time) []byte {
	out := message.Copy(q, buf, e.msg, e.ends, limit)
	// Truncation removes the records with the last TTLs.
	age, left := now.Sub(e.stored), uint32(staleTTL)
	fresh := age < e.ttl || e.ttl == 0 // an entry without TTL is served once, at once
	if fresh {
		left = uint32((e.ttl - age + time.Second - 1) / time.Second)
	}
	for _, at := range e.ttls {
		if int(at)+4 > len(out) {
			break
		}
		ttl := binary.BigEndian.Uint32(out[at:])
		switch {
		case !fresh:
			ttl = staleTTL
		default:
			// No record outlives the shortest TTL, which is that of the entry.
			ttl = min(ttl, left)
		}
		binary.BigEndian.PutUint32(out[at:], ttl)
	}
	return out
}
