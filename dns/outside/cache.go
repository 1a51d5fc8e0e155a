package outside

import (
	"encoding/binary"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"

	"kedge/dns/message"
)

const (
	// shards let queries on several processors look things up at the same time.
	shards = 16

	// entryOverhead is about what an entry costs besides key and message.
	entryOverhead = 200

	// staleFor is how long an answer is kept after its time, for when no server
	// answers. RFC 8767 says one to three days; the bound on memory usually comes first.
	staleFor = 24 * time.Hour

	// staleTTL is what clients may keep an old answer for, in seconds (RFC 8767, 4).
	staleTTL = 30
)

// entry is an answer as it is sent: to a lower-case question, without OPT record.
type entry struct {
	msg     []byte
	ttls    []uint16 // where the TTLs are
	ends    []uint16 // where the records of the answer section end
	stored  time.Time
	ttl     time.Duration // zero when it may be given to those who wait, but not kept
	failure bool
	denial  bool

	hits       atomic.Int32
	refreshing atomic.Bool
	retry      atomic.Int64 // Unix nanoseconds: given without asking until then, however old
}

// fresh says whether an entry may be given without asking anybody.
func (e *entry) fresh(now time.Time) bool {
	return now.Sub(e.stored) < e.ttl || e.retry.Load() > now.UnixNano()
}

// useful says whether an entry may be given when no server answers.
func (e *entry) useful(now time.Time) bool {
	return !e.failure && now.Sub(e.stored) < e.ttl+staleFor
}

// cache keeps answers, those asked for last.
type cache struct {
	seed  maphash.Seed
	limit int // bytes of one shard
	shard [shards]shard

	evicted atomic.Uint64
}

type shard struct {
	mu    sync.Mutex // guards what follows
	nodes map[string]*node
	// head is the end of a ring: its next was used last, its previous longest ago.
	head  node
	bytes int
}

type node struct {
	prev, next *node
	key        string
	entry      *entry
}

func newCache(limit int) *cache {
	c := &cache{seed: maphash.MakeSeed(), limit: limit / shards}
	for i := range c.shard {
		s := &c.shard[i]
		s.nodes = map[string]*node{}
		s.head.prev, s.head.next = &s.head, &s.head
	}
	return c
}

func (c *cache) shardOf(key []byte) *shard { return &c.shard[maphash.Bytes(c.seed, key)%shards] }

// get returns what is kept, however old, or nil.
func (c *cache) get(key []byte) *entry {
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.nodes[string(key)]
	if n == nil {
		return nil
	}
	n.unlink()
	n.linkAfter(&s.head)
	return n.entry
}

// put keeps an entry and drops those used longest ago.
func (c *cache) put(key []byte, e *entry) {
	s := c.shardOf(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := s.nodes[string(key)]; n != nil {
		s.drop(n)
	}
	n := &node{key: string(key), entry: e}
	s.nodes[n.key] = n
	n.linkAfter(&s.head)
	s.bytes += n.cost()
	for s.bytes > c.limit && s.head.prev != n {
		s.drop(s.head.prev)
		c.evicted.Add(1)
	}
}

func (s *shard) drop(n *node) {
	n.unlink()
	delete(s.nodes, n.key)
	s.bytes -= n.cost()
}

func (n *node) cost() int {
	return len(n.key) + len(n.entry.msg) + 2*(len(n.entry.ttls)+len(n.entry.ends)) + entryOverhead
}

func (n *node) unlink() { n.prev.next, n.next.prev = n.next, n.prev }

func (n *node) linkAfter(p *node) {
	n.prev, n.next = p, p.next
	p.next.prev, p.next = n, n
}

// sizes counts answers and denials.
func (c *cache) sizes() (success, denial int) {
	for i := range c.shard {
		s := &c.shard[i]
		s.mu.Lock()
		for _, n := range s.nodes {
			if n.entry.denial || n.entry.failure {
				denial++
			} else {
				success++
			}
		}
		s.mu.Unlock()
	}
	return success, denial
}

// clear drops everything: servers may say something else now.
func (c *cache) clear() {
	for i := range c.shard {
		s := &c.shard[i]
		s.mu.Lock()
		clear(s.nodes)
		s.head.prev, s.head.next = &s.head, &s.head
		s.bytes = 0
		s.mu.Unlock()
	}
}

// write writes the entry as the answer to q.
func (e *entry) write(q *message.Query, buf []byte, limit int, now time.Time) []byte {
	out := message.Copy(q, buf, e.msg, e.ends, limit)
	// The records that were cut off had the last TTLs.
	age, left := now.Sub(e.stored), uint32(staleTTL)
	fresh := age < e.ttl || e.ttl == 0 // which is given once, at once
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
			// No record outlives the shortest, by which the entry is kept.
			ttl = min(ttl, left)
		}
		binary.BigEndian.PutUint32(out[at:], ttl)
	}
	return out
}
