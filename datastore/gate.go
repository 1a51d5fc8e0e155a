package datastore

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/raft/v3"
	"google.golang.org/grpc/metadata"
)

// gate stands before every call and stream. It keeps clients out once the store stops, it does what etcd's gRPC
// interceptors do for those who asked for a leader, and it ends calls that wait for a leader in vain.
//
//	open ──close──► closed    (for ever)
//
// etcd's server must not be stopped under a call: it would read from a closed database file. Over gRPC the
// listener sees to that; here close does, which turns newcomers away, cancels who is inside and waits for them.
type gate struct {
	// leader is who leads by raft's own state, and raft.None if nobody does.
	leader func() uint64

	mu     sync.RWMutex // guards closed, and wg.Add against wg.Wait
	closed bool
	wg     sync.WaitGroup

	ctx    context.Context // ends when the gate closes
	cancel context.CancelCauseFunc

	streamsMu sync.Mutex
	streams   map[*admission]struct{} // those that end when there is no leader

	callsMu    sync.Mutex              // guards what follows
	calls      map[*admission]struct{} // those that need a majority
	reign      uint64                  // counts the elections that were seen
	leaderless bool                    // for so long that calls need not wait for one
}

func newGate(leader func() uint64) *gate {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &gate{
		leader: leader, ctx: ctx, cancel: cancel,
		streams: map[*admission]struct{}{}, calls: map[*admission]struct{}{},
	}
}

func (g *gate) hasLeader() bool { return g.leader() != raft.None }

// admission is one call or stream inside the gate. leave must be called when it is over.
type admission struct {
	gate   *gate
	ctx    context.Context // for the server side; its cause says why the gate ended it
	cancel context.CancelCauseFunc
	detach func() bool // stops ctx from following gate.ctx
	reign  uint64      // of a call that needs a majority: when it began
}

// enter admits one call. Its errors are those that etcd sends over the wire.
func (g *gate) enter(ctx context.Context) (admission, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	if g.closed {
		return admission{}, rpctypes.ErrGRPCStopped
	}
	if requiresLeader(ctx) && !g.hasLeader() {
		return admission{}, rpctypes.ErrGRPCNoLeader
	}
	g.wg.Add(1)
	a := admission{gate: g}
	a.ctx, a.cancel = context.WithCancelCause(ctx)
	cancel := a.cancel
	a.detach = context.AfterFunc(g.ctx, func() { cancel(rpctypes.ErrGRPCStopped) })
	return a, nil
}

// enterStream admits one stream, which also ends when the leader it asked for is gone.
func (g *gate) enterStream(ctx context.Context) (*admission, error) {
	a, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	if requiresLeader(ctx) {
		g.streamsMu.Lock()
		g.streams[&a] = struct{}{}
		g.streamsMu.Unlock()
	}
	return &a, nil
}

// enterCall admits one call that cannot be answered without a majority. etcd would let it wait for 7 s, in which
// the leader may have gone and come back; here it ends as soon as it is known to be in vain.
func (g *gate) enterCall(ctx context.Context) (*admission, error) {
	a, err := g.enter(ctx)
	if err != nil {
		return nil, err
	}
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	if g.leaderless {
		a.leave()
		return nil, rpctypes.ErrGRPCNoLeader
	}
	a.reign = g.reign
	g.calls[&a] = struct{}{}
	return &a, nil
}

func (a *admission) leaveCall() {
	a.gate.callsMu.Lock()
	delete(a.gate.calls, a)
	a.gate.callsMu.Unlock()
	a.leave()
}

func (a *admission) leave() {
	a.detach()
	a.cancel(nil)
	a.gate.wg.Done()
}

func (a *admission) leaveStream() {
	a.gate.streamsMu.Lock()
	delete(a.gate.streams, a)
	a.gate.streamsMu.Unlock()
	a.leave()
}

// reason is why the gate ended the call, in place of err, or err if it did not.
func (a *admission) reason(err error) error {
	switch cause := context.Cause(a.ctx); cause {
	case rpctypes.ErrGRPCStopped, rpctypes.ErrGRPCNoLeader, rpctypes.ErrGRPCTimeoutDueToLeaderFail:
		return cause
	default:
		return err
	}
}

// shut turns newcomers away and cancels who is inside, without waiting for them.
func (g *gate) shut() {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	g.cancel(rpctypes.ErrGRPCStopped)
}

// close shuts the gate and waits until everybody has left.
func (g *gate) close() {
	g.shut()
	g.wg.Wait()
}

const (
	// patience is for how many election timeouts there must be no leader before streams and calls end. New
	// streams are refused at once, but to open one again costs much, so those that are open are kept through
	// an ordinary election, also one that has to be repeated. With the time in which raft notices that it is
	// cut off, which is up to two timeouts, it makes less than five.
	patience = 2
	// regard is how often in an election timeout the gate looks.
	regard = 4
	// settling is the part of an election timeout in which calls from before a new leader may still be answered.
	// What was on its way to the old one may be lost, and nobody would say so.
	settling = 2
)

// watchLeader ends the streams that asked for a leader when there has been none for some time, and the calls
// that wait for one, or have waited for one that is gone. It returns when the gate closes.
func (g *gate) watchLeader(election time.Duration) {
	ticker := time.NewTicker(election / regard)
	defer ticker.Stop()
	last := g.leader()
	var lost, since time.Time // since when there is no leader, or this one after another
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
			if lost.IsZero() {
				lost = now
			}
			if now.Sub(lost) >= patience*election {
				g.endLeaderless()
			}
			continue
		case id != last || !lost.IsZero():
			last, lost, since = id, time.Time{}, now
			g.crown()
		case now.Sub(since) >= election/settling && now.Sub(since) < 2*election:
			g.endOlder()
		}
		g.setLeaderless(false)
	}
}

// crown begins another reign.
func (g *gate) crown() {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.reign++
}

func (g *gate) setLeaderless(is bool) {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.leaderless = is
}

// endOlder ends the calls from before this reign.
func (g *gate) endOlder() {
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	for a := range g.calls {
		if a.reign < g.reign {
			a.cancel(rpctypes.ErrGRPCTimeoutDueToLeaderFail)
		}
	}
}

func (g *gate) endLeaderless() {
	g.streamsMu.Lock()
	defer g.streamsMu.Unlock()
	for a := range g.streams {
		a.cancel(rpctypes.ErrGRPCNoLeader)
	}
	g.callsMu.Lock()
	defer g.callsMu.Unlock()
	g.leaderless = true
	for a := range g.calls {
		a.cancel(rpctypes.ErrGRPCNoLeader)
	}
}

func requiresLeader(ctx context.Context) bool {
	// In this process the client's outgoing metadata is what the server would find as incoming.
	md, ok := metadata.FromOutgoingContext(ctx)
	if !ok {
		return false
	}
	values := md[rpctypes.MetadataRequireLeaderKey]
	return len(values) > 0 && values[0] == rpctypes.MetadataHasLeader
}
