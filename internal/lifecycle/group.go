package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// DefaultStopTimeout is how long a component has to return from Run after its
// context was cancelled, unless it is a [StopTimeouter].
const DefaultStopTimeout = 5 * time.Second

// ErrUnexpectedReturn is the cause of a failure when Run returned nil although
// nobody had asked the component to stop.
var ErrUnexpectedReturn = errors.New("returned although it was not asked to stop")

// ErrStopTimeout is the cause of a failure when Run did not return within the
// component's time limit.
var ErrStopTimeout = errors.New("did not stop in time")

// ErrInterrupted is the cause of a failure when a second signal ended the wait
// for a component to stop.
var ErrInterrupted = errors.New("was still stopping when a second signal came")

// ErrStopLimit is the cause of a failure when a component was still to be stopped when
// the time for all of them was over.
var ErrStopLimit = errors.New("was not stopped in the time that all have together")

// Error says which component failed. Use errors.As to get at the name.
type Error struct {
	Component string
	Err       error
}

func (e *Error) Error() string { return e.Component + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Handle names a component that was added to a group. The zero Handle names none.
type Handle struct{ m *member }

// Group runs components. Make one with [New], Add the components, then call Run
// once.
type Group struct {
	log     *slog.Logger
	hurry   <-chan struct{}
	onReady func()
	onStop  func()
	limit   time.Duration // for the whole stop; 0 for none
	over    chan struct{} // closed when that has passed

	stopping chan struct{} // closed when onStop has returned
	now      func() time.Time

	members []*member
	started bool // Run was called; guarded by mu
	begun   time.Time

	mu sync.Mutex // guards started and, in every member, the fields below its comment
}

// member is a component and what the group knows of it.
type member struct {
	c       Component
	after   []*member
	before  []*member // those that come after this one: they must be gone before it stops
	timeout time.Duration

	readyc chan struct{} // closed when ready
	gone   chan struct{} // closed when it is stopped or failed, or will never start

	// Guarded by Group.mu.
	state   State
	since   time.Time
	started time.Time
	ready   time.Time
	err     error
}

// Option changes how a group behaves.
type Option func(*Group)

// WithHurry gives a channel whose closing (by a second signal) ends all waits
// for components to stop.
func WithHurry(c <-chan struct{}) Option { return func(g *Group) { g.hurry = c } }

// WithOnReady gives a function that is called once, when all components are ready.
func WithOnReady(f func()) Option { return func(g *Group) { g.onReady = f } }

// WithOnStop gives a function that is called once, when the stop begins, whether it was
// asked for or a component has failed. No component is told to stop before it returns.
func WithOnStop(f func()) Option { return func(g *Group) { g.onStop = f } }

// WithStopLimit bounds the whole stop: the limits of components that come after each
// other add up. What is not stopped by then is named in the log, and left as it is.
func WithStopLimit(d time.Duration) Option { return func(g *Group) { g.limit = d } }

// New makes an empty group that logs to log.
func New(log *slog.Logger, options ...Option) *Group {
	g := &Group{log: log, now: time.Now, over: make(chan struct{}), stopping: make(chan struct{})}
	for _, o := range options {
		o(g)
	}
	return g
}

// Add adds a component that is started when all of after are ready and stopped
// before any of them is. Handles come from this group's Add only, so the graph
// can have no cycle. Add panics on a name used twice and after Run: both are
// errors of the program, not of its user.
func (g *Group) Add(c Component, after ...Handle) Handle {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.started {
		panic("lifecycle: Add after Run")
	}
	m := &member{
		c:       c,
		timeout: DefaultStopTimeout,
		readyc:  make(chan struct{}),
		gone:    make(chan struct{}),
		state:   Waiting,
		since:   g.now(),
	}
	if t, ok := c.(StopTimeouter); ok {
		m.timeout = t.StopTimeout()
	}
	for _, other := range g.members {
		if other.c.Name() == c.Name() {
			panic("lifecycle: component " + c.Name() + " added twice")
		}
	}
	for _, h := range after {
		if h.m == nil {
			continue
		}
		m.after = append(m.after, h.m)
		h.m.before = append(h.m.before, m)
	}
	g.members = append(g.members, m)
	return Handle{m: m}
}

// Run starts the components and blocks until ctx is cancelled or a component
// fails; then it stops those that were started, in reverse dependency order,
// and returns. It returns nil after an orderly stop that ctx asked for, else
// the first failure (an *[Error]), joined with what went wrong while stopping.
func (g *Group) Run(ctx context.Context) error {
	g.mu.Lock()
	if g.started {
		g.mu.Unlock()
		panic("lifecycle: Run called twice")
	}
	g.started = true
	g.begun = g.now()
	g.mu.Unlock()

	// stop ends the start-up and begins the stop. Its cause is why.
	stop, halt := context.WithCancelCause(ctx)
	defer halt(nil)
	context.AfterFunc(stop, func() {
		if g.onStop != nil {
			g.onStop()
		}
		close(g.stopping)
	})

	ended := make(chan struct{})
	if g.limit > 0 {
		context.AfterFunc(stop, func() { g.bound(ended) })
	}

	var wg sync.WaitGroup
	for _, m := range g.members {
		wg.Go(func() { g.live(ctx, stop, halt, m) })
	}
	go g.announce(stop)
	wg.Wait()
	close(ended)

	return g.verdict(stop)
}

// bound ends the stop when its time is over.
func (g *Group) bound(ended <-chan struct{}) {
	limit := time.NewTimer(g.limit)
	defer limit.Stop()
	select {
	case <-ended:
		return
	case <-limit.C:
	}
	var left []string
	for _, s := range g.Status(nil) { //nolint:staticcheck // nil: do not ask checkers
		if s.State != Stopped && s.State != Failed {
			left = append(left, s.Name)
		}
	}
	g.log.Error("the stop takes too long; what is left of kedge ends with the process", "limit", g.limit, "left", strings.Join(left, ", "))
	close(g.over)
}

// live takes one component through its whole life. ctx carries values only: the
// signal must not reach a component before its dependents are gone.
func (g *Group) live(ctx, stop context.Context, halt context.CancelCauseFunc, m *member) {
	defer close(m.gone)
	for _, dep := range m.after {
		select {
		case <-dep.readyc:
		case <-stop.Done():
			g.set(m, Stopped, nil)
			return
		}
	}
	// A dependency can be ready and the stop asked for at the same time.
	if stop.Err() != nil {
		g.set(m, Stopped, nil)
		return
	}

	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	g.set(m, Starting, nil)
	returned := make(chan error, 1)
	go func() { returned <- g.call(own, m) }()

	fail := func(err error) {
		g.set(m, Failed, err)
		halt(&Error{Component: m.c.Name(), Err: err})
	}
	select {
	case err := <-returned:
		if err == nil {
			err = ErrUnexpectedReturn
		}
		fail(err)
		return
	case <-stop.Done():
	}
	<-g.stopping

	// Dependents first. They have time limits of their own, so this ends. A
	// component can die while it waits for them, and that is still a failure.
	// When the time for all is over it is not even begun: it would not be waited for.
	for _, dependent := range m.before {
		select {
		case <-dependent.gone:
		case <-g.over:
			g.set(m, Failed, ErrStopLimit)
			return
		case err := <-returned:
			if err == nil {
				err = ErrUnexpectedReturn
			}
			fail(err)
			return
		}
	}

	g.set(m, Stopping, nil)
	cancel(context.Cause(stop))
	limit := time.NewTimer(m.timeout)
	defer limit.Stop()
	select {
	case err := <-returned:
		if failedToStop(err, g.wasReady(m)) {
			g.set(m, Failed, err)
			return
		}
		if err != nil {
			g.log.Debug("ended because it was told to", "component", m.c.Name(), "err", err)
		}
		g.set(m, Stopped, nil)
	case <-limit.C:
		g.set(m, Failed, fmt.Errorf("%w (%s)", ErrStopTimeout, m.timeout))
	case <-g.hurry:
		g.set(m, Failed, ErrInterrupted)
	case <-g.over:
		g.set(m, Failed, ErrStopLimit)
	}
}

// call runs the component and turns a panic into an error.
func (g *Group) call(ctx context.Context, m *member) (err error) {
	defer func() {
		if p := recover(); p != nil {
			g.log.Error("panic", "component", m.c.Name(), "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	return m.c.Run(ctx, func() { g.markReady(m) })
}

var errPanic = errors.New("panic")

// failedToStop says whether what a component returned after it was told to stop is a
// failure. One that was not ready yet has had its start cut off, and not everything that
// this breaks says so as context.Canceled: gRPC has its own word, and upstream's
// components put either into sentences.
func failedToStop(err error, wasReady bool) bool {
	return err != nil && !errors.Is(err, context.Canceled) && (wasReady || errors.Is(err, errPanic))
}

func (g *Group) wasReady(m *member) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !m.ready.IsZero()
}

// markReady is what a component's ready function does.
func (g *Group) markReady(m *member) {
	g.mu.Lock()
	if m.state != Starting {
		g.mu.Unlock()
		return
	}
	now := g.now()
	m.state, m.since, m.ready = Ready, now, now
	took := now.Sub(m.started)
	close(m.readyc)
	g.mu.Unlock()
	g.log.Info("ready", "component", m.c.Name(), "took", took.Round(time.Millisecond))
}

// set moves m to state and logs the change.
func (g *Group) set(m *member, state State, err error) {
	g.mu.Lock()
	before := m.state
	now := g.now()
	took := now.Sub(m.since)
	m.state, m.since, m.err = state, now, err
	if state == Starting {
		m.started = now
	}
	g.mu.Unlock()
	switch {
	case state == Failed:
		if errors.Is(err, ErrInterrupted) || errors.Is(err, ErrStopLimit) {
			return // said of all of them together
		}
		g.log.Error("failed", "component", m.c.Name(), "was", before, "err", err)
	case state == Stopped && before == Waiting:
		// It never ran; a line about it would only hide why the group stops.
	case state == Starting:
		g.log.Debug("starting", "component", m.c.Name(), "waited", took.Round(time.Millisecond))
	case state == Stopped:
		g.log.Info("stopped", "component", m.c.Name(), "took", took.Round(time.Millisecond))
	default:
		g.log.Debug(string(state), "component", m.c.Name())
	}
}

// announce waits until everything is ready and says so, once.
func (g *Group) announce(stop context.Context) {
	for _, m := range g.members {
		select {
		case <-m.readyc:
		case <-stop.Done():
			return
		}
	}
	g.log.Info("all components are ready", "took", g.now().Sub(g.begun).Round(time.Millisecond))
	if g.onReady != nil {
		g.onReady()
	}
}

// verdict says how the run ended, after all components are gone.
func (g *Group) verdict(stop context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	var first *Error
	cause := context.Cause(stop)
	errors.As(cause, &first)
	var errs []error
	if first != nil {
		errs = append(errs, first)
	}
	var interrupted, late []string
	for _, m := range g.members {
		switch {
		case errors.Is(m.err, ErrInterrupted):
			interrupted = append(interrupted, m.c.Name())
		case errors.Is(m.err, ErrStopLimit):
			late = append(late, m.c.Name())
		case m.err != nil && (first == nil || m.c.Name() != first.Component):
			errs = append(errs, &Error{Component: m.c.Name(), Err: m.err})
		}
	}
	if len(interrupted) > 0 {
		errs = append(errs, &Error{Component: strings.Join(interrupted, ", "), Err: ErrInterrupted})
	}
	if len(late) > 0 {
		errs = append(errs, &Error{Component: strings.Join(late, ", "), Err: ErrStopLimit})
	}
	return errors.Join(errs...)
}
