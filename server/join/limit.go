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
)

// allow takes one request of the source's allowance, if it has one left.
func (l *limiter) allow(a netip.Addr) bool {
	if !a.IsValid() {
		return false
	}
	// Whoever has one IPv6 address has 2^64 of them.
	bits := a.BitLen()
	if a.Is6() {
		bits = 64
	}
	source, err := a.Prefix(bits)
	if err != nil {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	have, known := l.sources[source]
	if !known {
		if len(l.sources) >= maxSources && !l.forget(now) {
			return false // more sources than there can be machines: somebody floods
		}
		have = allowance{left: burst, at: now}
	}
	have.left = min(burst, have.left+perSecond*now.Sub(have.at).Seconds())
	have.at = now
	ok := have.left >= 1
	if ok {
		have.left--
	}
	l.sources[source] = have
	return ok
}

// forget drops the sources whose allowance is whole again, and reports whether
// there were any.
func (l *limiter) forget(now time.Time) bool {
	before := len(l.sources)
	for s, have := range l.sources {
		if now.Sub(have.at).Seconds()*perSecond >= burst {
			delete(l.sources, s)
		}
	}
	return len(l.sources) < before
}
