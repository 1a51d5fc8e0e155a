package datastore

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"google.golang.org/grpc/metadata"
)

// gate admits every call and stream. It keeps clients out when the store stops, it replaces etcd's gRPC interceptors for
// clients that require a leader, and it ends calls that wait for a leader in vain.
//
//	open ──close──► closed    (for ever)
//
// etcd's server must not be stopped during a call: the call would read from a closed database file. Over gRPC the listener
// prevents that. Here close does: it refuses new calls, cancels those in flight, and waits for their end.
type gate struct {
	// leader returns the ID of the leader in raft's own state, or raft.None.
	leader func() uint64

	mu     sync.RWMutex // guards closed, and wg.Add against wg.Wait
	closed bool
	wg     sync.WaitGroup

	ctx    context.Context // ends when the gate closes
	cancel context.CancelCauseFunc

	streamsMu sync.Mutex
	streams   map[*inflightCall]struct{} // in flight and requiring a leader

	callsMu    sync.Mutex                 // guards the fields below
	calls      map[*inflightCall]struct{} // in flight and requiring a majority
	term       uint64                     // number of elections that the gate has seen
	leaderless bool                       // for so long that new calls fail at once
}

func newGate(leader func() uint64) *gate {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &gate{
		leader: leader, ctx: ctx, cancel: cancel,
		streams: map[*inflightCall]struct{}{}, calls: map[*inflightCall]struct{}{},
	}
}

func (g *gate) hasLeader() bool { return g.leader() != raft.None }

// inflightCall is a call or stream that the gate has admitted. Its leave must be called when it is over.
type inflightCall struct {
	gate   *gate
	ctx    context.Context // for the server side; its cause says why the gate ended the call
	cancel context.CancelCauseFunc
	detach func() bool // stops ctx from following gate.ctx
	term   uint64      // in which a call that requires a majority began
}

// enter admits one call. Its errors are those that etcd sends over the wire.
func (g *gate) enter(ctx context.Context) (inflightCall, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.closed {
		return inflightCall{}, rpctypes.ErrGRPCStopped
	}
	if requiresLeader(ctx) && !g.hasLeader() {
		return inflightCall{}, rpctypes.ErrGRPCNoLeader
	}
	g.wg.Add(1)
	c := inflightCall{gate: g}
	c.ctx, c.cancel = context.WithCancelCause(ctx)
	cancel := c.cancel
	c.detach = context.AfterFunc(g.ctx, func() { cancel(rpctypes.ErrGRPCStopped) })
	return c, nil
}

// enterStream admits one stream. If the stream requires a leader, it also ends when there is none any more.
func (g *gate) enterStream(ctx context.Context) (*inflightCall, error) {
	c, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	if requiresLeader(ctx) {
		g.streamsMu.Lock()
		g.streams[&c] = struct{}{}
		g.streamsMu.Unlock()
	}
	return &c, nil
}

// enterCall admits one call that requires a majority. etcd would let it wait for 7 s, in which the leader may have gone
// and come back. Here the call ends as soon as its answer is known never to come.
func (g *gate) enterCall(ctx context.Context) (*inflightCall, error) {
	c, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	if g.leaderless {
		c.leave()
		return nil, rpctypes.ErrGRPCNoLeader
	}
	c.term = g.term
	g.calls[&c] = struct{}{}
	return &c, nil
}

func (c *inflightCall) leaveCall() {
	c.gate.callsMu.Lock()
	delete(c.gate.calls, c)
	c.gate.callsMu.Unlock()
	c.leave()
}

func (c *inflightCall) leave() {
	c.detach()
	c.cancel(nil)
	c.gate.wg.Done()
}

func (c *inflightCall) leaveStream() {
	c.gate.streamsMu.Lock()
	delete(c.gate.streams, c)
	c.gate.streamsMu.Unlock()
	c.leave()
}

// reason returns the error with which the gate ended the call, or err if the gate did not end it.
func (c *inflightCall) reason(err error) error {
	switch cause := context.Cause(c.ctx); cause {
	case rpctypes.ErrGRPCStopped, rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCTimeoutDueToLeaderFail:
		return cause
	default:
		return err
	}
}

// shut refuses new calls and cancels those in flight, without waiting for their end.
func (g *gate) shut() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel(rpctypes.ErrGRPCStopped)
}

// close shuts the gate and waits for the end of all calls in flight.
func (g *gate) close() {
	g.shut()
	g.wg.Wait()
}

const (
	// leaderlessTimeouts is the number of election timeouts without a leader after which streams and calls end. New
	// streams are refused at once; open ones survive an ordinary election, even a repeated one, because to open them
	// again is expensive. Raft itself takes up to two timeouts to notice that it is cut off, so the sum is less than five.
	leaderlessTimeouts = 2
	// checksPerTimeout is the number of times per election timeout that the gate checks the leader.
	checksPerTimeout = 4
	// graceDivisor divides the election timeout to give the time in which calls from before an election may still be
	// answered. Requests on their way to the old leader may be lost, and etcd does not report that.
	graceDivisor = 2
)

// watchLeader ends streams that require a leader when there has been none for some time, and calls that wait for a
// leader or were sent to a former one. It returns when the gate closes.
func (g *gate) watchLeader(election time.Duration) {
	ticker := time.NewTicker(election / checksPerTimeout)
	defer ticker.Stop()
	last := g.leader()
	var lostAt, electedAt time.Time // lostAt is zero while there is a leader
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-ticker.C:
		}
		now := time.Now()
		id := g.leader()
		switch {
		case id == raft.None:
			if lostAt.IsZero() {
				lostAt = now
			}
			if now.Sub(lostAt) >= leaderlessTimeouts*election {
				g.endLeaderless()
			}
			continue
		case id != last || !lostAt.IsZero():
			last, lostAt, electedAt = id, time.Time{}, now
			g.elected()
		case now.Sub(electedAt) >= election/graceDivisor && now.Sub(electedAt) < 2*election:
			g.endEarlierTerms()
		}
		g.setLeaderless(false)
	}
}

// elected records that a leader was elected, which begins a new term.
func (g *gate) elected() {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.term++
}

func (g *gate) setLeaderless(is bool) {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.leaderless = is
}

// endEarlierTerms ends the calls that began before this term.
func (g *gate) endEarlierTerms() {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	for c := range g.calls {
		if c.term < g.term {
			c.cancel(rpctypes.ErrGRPCTimeoutDueToLeaderFail)
		}
	}
}

// endLeaderless ends all streams and calls that require a leader, and makes new calls fail at once.
func (g *gate) endLeaderless() {
	g.streamsMu.Lock()
	defer g.streamsMu.Unlock()
	for c := range g.streams {
		c.cancel(rpctypes.ErrGRPCNoLeader)
	}
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.leaderless = true
	for c := range g.calls {
		c.cancel(rpctypes.ErrGRPCNoLeader)
	}
}

func requiresLeader(ctx context.Context) bool {
	// Client and server share a process, so the client's outgoing metadata is the server's incoming metadata.
	md, ok := metadata.FromOutgoingContext(ctx)
	if !ok {
		return false
	}
	values := md[rpctypes.MetadataRequireLeaderKey]
	return len(values) > 0 && values[0] == rpctypes.MetadataHasLeader
}
