package join

import (
	"net/netip"
	"sync"
	"time"
)

// limiter bounds how often one source may ask. What it holds is bounded too.
type limiter struct {
	now func() time.Time

	mu      sync.Mutex
	sources map[netip.Prefix]allowance
}

// allowance is how many requests a source had left at a time.
type allowance struct {
	left float64
	at   time.Time
}

const (
	perSecond  = 5    // requests of one source, in the long run
	burst      = 30   // and at once: a rack behind one address starts together
	maxSources = 4096 // that are remembered
	// siteFactor is how much more a whole site may ask, which has an IPv6 /48: a site may
	// have many nodes, and without a bound of its own it has 65,536 sources.
	siteFactor = 20
)

// level is a size of source that is counted, and how much more than one source it may ask.
type level struct{ bits, factor int }

// levels are those of an address: one IPv4 address; of IPv6 a network, since a machine that
// has one address of it has 2^64, and a site.
func levels(a netip.Addr) []level {
	if a.Is4() {
		return []level{{32, 1}}
	}
	return []level{{64, 1}, {48, siteFactor}}
}

// allow takes one request of the source's allowance, if it has one left.
func (l *limiter) allow(a netip.Addr) bool { return l.take(a, 1) }

// giveBack returns a request that was allowed and should not have counted.
func (l *limiter) giveBack(a netip.Addr) { l.take(a, -1) }

// take takes requests of the allowances of all levels, or of none.
func (l *limiter) take(a netip.Addr, n float64) bool {
	if !a.IsValid() {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	all := map[netip.Prefix]allowance{}
	for _, v := range levels(a) {
		source, err := a.Prefix(v.bits)
		if err != nil {
			return false
		}
		have, known := l.sources[source]
		if !known {
			have = allowance{left: float64(burst * v.factor), at: now}
		}
		have.left = min(float64(burst*v.factor), have.left+float64(perSecond*v.factor)*now.Sub(have.at).Seconds())
		have.at = now
		if have.left < n {
			return false
		}
		have.left = min(float64(burst*v.factor), have.left-n)
		all[source] = have
	}
	for source, have := range all {
		if _, known := l.sources[source]; !known && len(l.sources) >= maxSources {
			l.forget(now)
		}
		l.sources[source] = have
	}
	return true
}

// forget makes room: it drops the sources whose allowance is whole again, and without any
// the one that has asked nothing for the longest. A source that floods keeps its count, and
// a new one always finds room.
func (l *limiter) forget(now time.Time) {
	var oldest netip.Prefix
	before := len(l.sources)
	for s, have := range l.sources {
		if now.Sub(have.at).Seconds()*perSecond >= burst {
			delete(l.sources, s)
		} else if o, ok := l.sources[oldest]; !ok || have.at.Before(o.at) {
			oldest = s
		}
	}
	if len(l.sources) == before {
		delete(l.sources, oldest)
	}
}
