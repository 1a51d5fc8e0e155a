package datastore

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/metadata"
)

// gate stands before every call and stream. It keeps clients out once the store stops, and it does what
// etcd's gRPC interceptors do for those who asked for a leader.
//
//	open ──close──► closed    (for ever)
//
// etcd's server must not be stopped under a call: it would read from a closed database file. Over gRPC the
// listener sees to that; here close does, which turns newcomers away, cancels who is inside and waits for them.
type gate struct {
	hasLeader func() bool

	mu     sync.RWMutex // guards closed, and wg.Add against wg.Wait
	closed bool
	wg     sync.WaitGroup

	ctx    context.Context // ends when the gate closes
	cancel context.CancelCauseFunc

	streamsMu sync.Mutex
	streams   map[*admission]struct{} // those that end when there is no leader
}

func newGate(hasLeader func() bool) *gate {
	ctx, cancel := context.WithCancelCause(context.Background())
	return &gate{hasLeader: hasLeader, ctx: ctx, cancel: cancel, streams: map[*admission]struct{}{}}
}

// admission is one call or stream inside the gate. leave must be called when it is over.
type admission struct {
	gate   *gate
	ctx    context.Context // for the server side; its cause says why the gate ended it
	cancel context.CancelCauseFunc
	detach func() bool // stops ctx from following gate.ctx
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
	case rpctypes.ErrGRPCStopped, rpctypes.ErrGRPCNoLeader:
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

// leaderlessIntervals is for how many election timeouts in a row there must be no leader before streams end. New
// streams are refused at once, but to open one again costs much, so those that are open are kept through an
// ordinary election. It is etcd's own number.
const leaderlessIntervals = 3

// watchLeader ends the streams that asked for a leader when there has been none for some time. It returns
// when the gate closes.
func (g *gate) watchLeader(interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for missed := 0; ; {
		select {
		case <-g.ctx.Done():
			return
		case <-ticker.C:
		}
		if g.hasLeader() {
			missed = 0
			continue
		}
		if missed++; missed >= leaderlessIntervals {
			g.endLeaderless()
		}
	}
}

func (g *gate) endLeaderless() {
	g.streamsMu.Lock()
	defer g.streamsMu.Unlock()
	for a := range g.streams {
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
