package peers

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kedge/internal/lifecycle"
)

// maxHints bounds the candidate addresses that unauthenticated datagrams can add to one peer link.
const maxHints = 4

// Status is the last heartbeat of another member.
type Status struct {
	LastSeen time.Time // zero before the first heartbeat
	Applied  uint64    // index of the last raft entry that the member has applied
}

// Alive reports whether the member answers heartbeats.
func (s Status) Alive(now time.Time) bool {
	return !s.LastSeen.IsZero() && now.Sub(s.LastSeen) < unreachableAfter
}

// peerLink is the link to one other member. It finds the address at which the member answers, sends heartbeats there, and
// runs the loopback proxy that carries raft's connections to it.
type peerLink struct {
	mesh    *Mesh
	id      string
	proxy   *loopbackProxy
	wakeup  lifecycle.Wakeup
	started time.Time

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex       // guards the fields below
	location netip.AddrPort   // address of the last answer; invalid while it is unknown
	stale    bool             // the member did not answer at location since, or no longer announces that address
	located  chan struct{}    // closed when location becomes valid
	probed   bool             // all addresses were tried once, so dial need not wait for the first answer
	hints    []netip.AddrPort // candidate addresses besides those of the address book
	status   Status
}

var errNotFound = errors.New("the member does not answer")

func startPeerLink(m *Mesh, p Peer) *peerLink {
	l := &peerLink{mesh: m, id: p.ID, wakeup: lifecycle.NewWakeup(), located: make(chan struct{}), started: time.Now()}
	l.ctx, l.cancel = context.WithCancel(m.ctx)
	listen := func(a netip.Addr) (net.Listener, error) { return m.net.ListenLoopback(a, m.source) }
	l.proxy = startLoopbackProxy(p.loopbackAddr(), m.log, listen, l.dial)
	l.wg.Go(l.run)
	return l
}

func (l *peerLink) close() {
	l.cancel()
	l.proxy.close()
	l.wg.Wait()
}

// addHint adds a candidate address, from a datagram that anyone could have sent.
func (l *peerLink) addHint(a netip.AddrPort) {
	l.mu.Lock()
	if !slices.Contains(l.hints, a) {
		l.hints = append(l.hints, a)
		if len(l.hints) > maxHints {
			l.hints = l.hints[1:]
		}
	}
	l.mu.Unlock()
	l.wakeup.Wake()
}

func (l *peerLink) currentLocation() netip.AddrPort {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.location
}

func (l *peerLink) currentStatus() Status {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.status
}

// unreachable reports whether the member has been silent for long enough to search for it with discovery.
func (l *peerLink) unreachable(now time.Time) bool {
	seen := l.currentStatus().LastSeen
	if seen.IsZero() {
		seen = l.started
	}
	return now.Sub(seen) > unreachableAfter
}

// dial connects raft to the member's current address. Before the first probe has ended, dial waits for an answer; after
// that it fails at once while the address is unknown, because raft retries by itself.
func (l *peerLink) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, HeartbeatTimeout)
	defer cancel()
	l.mu.Lock()
	location, located, probed := l.location, l.located, l.probed
	l.mu.Unlock()
	if !location.IsValid() {
		if probed {
			return nil, errNotFound
		}
		select {
		case <-located:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		location = l.currentLocation()
	}
	c, err := l.mesh.net.Dial(ctx, location)
	if err != nil {
		l.wakeup.Wake()
		return nil, err
	}
	return c, nil
}

func (l *peerLink) run() {
	wasAlive := false
	for l.ctx.Err() == nil {
		next := heartbeatInterval
		if !l.probe() {
			next = probeInterval
		}
		if alive := l.currentStatus().Alive(time.Now()); alive != wasAlive && l.ctx.Err() == nil {
			wasAlive = alive
			l.logReachability(alive)
		}
		timer := time.NewTimer(next)
		select {
		case <-l.ctx.Done():
		case <-timer.C:
		case <-l.wakeup:
			// The pause gives the cause of the wake-up time to take effect, and bounds the rate of probes.
			sleep(l.ctx, 50*time.Millisecond)
		}
		timer.Stop()
	}
}

func (l *peerLink) logReachability(alive bool) {
	p, _ := l.mesh.book.Other(l.id)
	if alive {
		l.mesh.log.Info("member of the datastore answers", "name", p.Name, "member", l.id, "at", l.currentLocation())
	} else {
		l.mesh.log.Warn("member of the datastore does not answer", "name", p.Name, "member", l.id)
	}
}

// probe sends a heartbeat to the last known address of the member and, if that fails, to all others. It reports whether
// the member answered.
func (l *peerLink) probe() bool {
	p, ok := l.mesh.book.Other(l.id)
	if !ok {
		return false
	}
	l.mu.Lock()
	location, candidates := l.location, append(slices.Clone(p.Addresses), l.hints...)
	l.mu.Unlock()
	// An address that the member no longer announces would only cost a timeout.
	if location.IsValid() && slices.Contains(candidates, location) && l.probeAt(location) {
		return true
	}
	l.mu.Lock()
	l.stale = true
	l.mu.Unlock()
	// The probes run in parallel: most addresses lead nowhere and cost a full timeout each.
	var wg sync.WaitGroup
	for _, a := range candidates {
		if a.IsValid() && a != location {
			wg.Go(func() { l.probeAt(a) })
		}
	}
	wg.Wait()

	l.mu.Lock()
	defer l.mu.Unlock()
	l.probed = true
	if l.location.IsValid() && l.location == location && !l.status.Alive(time.Now()) {
		// The member has left this address, or this machine is cut off. Connections that hang would block raft.
		l.location, l.located = netip.AddrPort{}, make(chan struct{})
		l.proxy.closeConns()
	}
	return l.location.IsValid() && l.location != location
}

// probeAt reports whether the member answers a heartbeat at the address.
func (l *peerLink) probeAt(at netip.AddrPort) bool {
	answer, err := l.mesh.sendHeartbeat(l.ctx, at)
	if err != nil || answer.From.ID != l.id {
		return false
	}
	if l.noteAnswer(at, Status{LastSeen: time.Now(), Applied: answer.Applied}) {
		l.proxy.closeConns()
		l.mesh.log.Info("member of the datastore has moved", "name", answer.From.Name, "member", l.id, "to", at)
	}
	return true
}

// noteAnswer records an answer from the address, and reports whether the member has moved there. A member may answer at
// several addresses, since all are probed in parallel; the first one is kept as long as it answers.
func (l *peerLink) noteAnswer(at netip.AddrPort, now Status) (moved bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.status = now
	switch {
	case !l.location.IsValid():
		close(l.located)
	case l.location == at:
	case !l.stale:
		return false
	default:
		moved = true
	}
	l.location, l.stale = at, false
	return moved
}
