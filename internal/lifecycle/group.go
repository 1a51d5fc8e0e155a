package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// DefaultStopTimeout is how long a component has to return from Run after its
// context was cancelled, unless it is a [StopTimeouter].
const DefaultStopTimeout = 5 * time.Second

// ErrUnexpectedReturn is the cause of a failure when Run returned nil without a request to
// stop.
var ErrUnexpectedReturn = errors.New("returned although it was not asked to stop")

// ErrStopTimeout is the cause of a failure when Run did not return within the
// component's time limit.
var ErrStopTimeout = errors.New("did not stop in time")

// ErrInterrupted is the cause of a failure when a second signal ended the wait
// for a component to stop.
var ErrInterrupted = errors.New("was still stopping when a second signal came")

// ErrStopLimit is the cause of a failure when a component was not stopped by the end of the
// time limit for all components.
var ErrStopLimit = errors.New("was not stopped in the time that all have together")

// Pauses before a failed component is started again. After it was ready for recovered, the next
// pause is firstPause again.
const (
	firstPause = time.Second
	lastPause  = time.Minute
	recovered  = 10 * time.Minute
)

// AtOnce marks a failure after which the component's dependents cannot stop in order: they
// would wait for the failed component. The group stops within a second then.
func AtOnce(err error) error { return &atOnceError{err} }

type atOnceError struct{ err error }

func (e *atOnceError) Error() string { return e.err.Error() }

func (e *atOnceError) Unwrap() error { return e.err }

// quickStop bounds the stop after such a failure.
const quickStop = time.Second

// Final marks the failure of a component that cannot be started again in this process.
func Final(err error) error { return &finalError{err} }

type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }

func (e *finalError) Unwrap() error { return e.err }

func isFinal(err error) bool {
	var final *finalError
	return errors.As(err, &final)
}

// Error is the failure of a component. Use errors.As to get its name.
type Error struct {
	Component string
	Err       error
}

func (e *Error) Error() string { return e.Component + ": " + e.Err.Error() }

func (e *Error) Unwrap() error { return e.Err }

// Handle stands for a component of a group. The zero Handle stands for none.
type Handle struct{ m *member }

// Group runs components. Make one with [New], Add the components, then call Run
// once.
type Group struct {
	log      *slog.Logger
	fastStop <-chan struct{}
	onReady  func()
	onStop   func()
	finals   bool          // a final failure of a restarted component stops the group
	limit    time.Duration // for the whole stop; 0 for none
	over     chan struct{} // closed when that has passed
	quickly  sync.Once
	quick    chan struct{} // closed when the stop may take no longer than quickStop

	stopping chan struct{} // closed when onStop has returned
	now      func() time.Time

	members []*member
	started bool // Run was called; guarded by mu
	begun   time.Time

	mu sync.Mutex // guards started and, in every member, the fields below its comment
}

// member is a component and its state in the group.
type member struct {
	c       Component
	after   []*member
	before  []*member // dependents, which must be gone before it stops
	timeout time.Duration
	restart bool // its failure stops nothing else; Run is called again

	readyc chan struct{} // closed when ready for the first time
	failed chan struct{} // closed when a restarted component has failed for the first time
	gone   chan struct{} // closed when it is stopped or failed, or will never start

	checking atomic.Bool // its Check has not returned

	// Guarded by Group.mu.
	state   State
	since   time.Time
	begun   time.Time // of the first run
	served  time.Time // ready for the first time
	started time.Time // of the latest run
	ready   time.Time // likewise; zero while it is not
	err     error

	restarts int
	failure  error     // latest failure that led to a restart
	failedAt time.Time // time of failure
}

// Option changes how a group behaves.
type Option func(*Group)

// WithFastStop gives a channel whose closing (by a second signal) ends all waits for
// components to stop.
func WithFastStop(c <-chan struct{}) Option { return func(g *Group) { g.fastStop = c } }

// WithOnReady gives a function that is called once, when the start is over: all components are
// ready, except restarted components that have failed, and their dependents. A service manager
// that waits for the start must not end the others because of these.
func WithOnReady(f func()) Option { return func(g *Group) { g.onReady = f } }

// WithOnStop gives a function that is called once, when the stop begins, by request or after a
// failure. No component is stopped before it returns.
func WithOnStop(f func()) Option { return func(g *Group) { g.onStop = f } }

// WithStopLimit bounds the whole stop, because the limits of components that depend on each
// other add up. Components that are not stopped by then are logged and abandoned.
func WithStopLimit(d time.Duration) Option { return func(g *Group) { g.limit = d } }

// WithFinalFailuresEnd makes the [Final] failure of a restarted component stop the group.
func WithFinalFailuresEnd() Option { return func(g *Group) { g.finals = true } }

// New makes an empty group that logs to log.
func New(log *slog.Logger, options ...Option) *Group {
	g := &Group{log: log, now: time.Now, over: make(chan struct{}), quick: make(chan struct{}), stopping: make(chan struct{})}
	for _, o := range options {
		o(g)
	}
	return g
}

// Add adds an essential component, whose failure stops the group. The component is started when
// all of after are ready, and stopped before any of them. Handles come from this group only, so
// the graph has no cycle. Add panics on a duplicate name and after Run: both are errors of the
// program, not of its user.
func (g *Group) Add(c Component, after ...Handle) Handle { return g.add(c, false, after) }

// AddRestarted is Add for a component that is started again after a failure, while the others
// go on without it. The package comment has the contract.
func (g *Group) AddRestarted(c Component, after ...Handle) Handle { return g.add(c, true, after) }

func (g *Group) add(c Component, restart bool, after []Handle) Handle {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.started {
		panic("lifecycle: Add after Run")
	}
	m := &member{
		c:       c,
		timeout: DefaultStopTimeout,
		restart: restart,
		readyc:  make(chan struct{}),
		failed:  make(chan struct{}),
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

// Run starts the components and blocks until ctx is cancelled or an essential component fails.
// Then it stops the started components in reverse dependency order and returns: nil after an
// orderly stop by ctx, otherwise the first failure (an *[Error]), joined with errors of the
// stop.
func (g *Group) Run(ctx context.Context) error {
	g.mu.Lock()
	if g.started {
		g.mu.Unlock()
		panic("lifecycle: Run called twice")
	}
	g.started = true
	g.begun = g.now()
	g.mu.Unlock()

	// stop ends the start-up and begins the stop. Its cause is the reason.
	stop, halt := context.WithCancelCause(ctx)
	defer halt(nil)
	context.AfterFunc(stop, func() {
		if g.onStop != nil {
			g.onStop()
		}
		close(g.stopping)
	})

	ended := make(chan struct{})
	context.AfterFunc(stop, func() { g.bound(ended) })

	var wg sync.WaitGroup
	for _, m := range g.members {
		wg.Go(func() { g.live(ctx, stop, halt, m) })
	}
	go g.announce(stop)
	wg.Wait()
	close(ended)

	return g.verdict(stop)
}

// bound ends the stop when its time limit is over.
func (g *Group) bound(ended <-chan struct{}) {
	limit := g.limit
	select {
	case <-g.quick:
		limit = quickStop
	default:
	}
	if limit == 0 {
		limit = math.MaxInt64
	}
	timer, quick := time.NewTimer(limit), g.quick
	defer timer.Stop()
wait:
	for {
		select {
		case <-ended:
			return
		case <-quick:
			limit, quick = quickStop, nil
			timer.Reset(limit)
		case <-timer.C:
			break wait
		}
	}
	var left []string
	for _, s := range g.Status(nil) { //nolint:staticcheck // nil: do not ask checkers
		if s.State != Stopped && s.State != Failed {
			left = append(left, s.Name)
		}
	}
	g.log.Error("the stop takes too long; what is left of kedge ends with the process", "limit", limit, "left", strings.Join(left, ", "))
	close(g.over)
}

// live runs a component through all its states. ctx carries values only: its cancellation must
// not reach a component before its dependents are gone.
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
	// A dependency can become ready while the stop begins.
	if stop.Err() != nil {
		g.set(m, Stopped, nil)
		return
	}

	wait := Backoff{First: firstPause, Last: lastPause}
	for {
		err := g.once(ctx, stop, m)
		if err == nil {
			return
		}
		if !m.restart || stop.Err() != nil || isFinal(err) {
			g.set(m, Failed, err)
			var quick *atOnceError
			if errors.As(err, &quick) {
				g.quickly.Do(func() { close(g.quick) })
			}
			if !m.restart || stop.Err() != nil || g.finals {
				halt(&Error{Component: m.c.Name(), Err: err})
			}
			return
		}
		if g.wasReadyFor(m, recovered) {
			wait.Reset()
		}
		pause := wait.Next()
		g.failedOnce(m, err, pause)
		select {
		case <-time.After(pause):
		case <-stop.Done():
			g.set(m, Stopped, nil)
			return
		}
	}
}

// once runs a component. It returns the reason if the component has ended by itself, and nil
// if it was stopped: the result of the stop is in its state.
func (g *Group) once(ctx, stop context.Context, m *member) error {
	own, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	g.set(m, Starting, nil)
	returned := make(chan error, 1)
	go func() {
		err := errGoexit // a library that must not end the process ends the goroutine
		defer func() { returned <- err }()
		err = g.call(own, m)
	}()
	unasked := func(err error) error {
		if err == nil {
			return ErrUnexpectedReturn
		}
		return err
	}
	select {
	case err := <-returned:
		return unasked(err)
	case <-stop.Done():
	}
	<-g.stopping

	// Dependents stop first. They have time limits of their own, so this ends. The
	// component can end while it waits for them, which is still a failure. When the time
	// limit for all is over, its stop does not even begin.
	for _, dependent := range m.before {
		select {
		case <-dependent.gone:
		case <-g.over:
			g.set(m, Failed, ErrStopLimit)
			return nil
		case err := <-returned:
			return unasked(err)
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
			return nil
		}
		if err != nil {
			g.log.Debug("ended because it was told to", "component", m.c.Name(), "err", err)
		}
		g.set(m, Stopped, nil)
	case <-limit.C:
		g.set(m, Failed, fmt.Errorf("%w (%s)", ErrStopTimeout, m.timeout))
	case <-g.fastStop:
		g.set(m, Failed, ErrInterrupted)
	case <-g.over:
		g.set(m, Failed, ErrStopLimit)
	}
	return nil
}

// call runs the component and turns a panic into an error.
func (g *Group) call(ctx context.Context, m *member) (err error) {
	defer func() {
		if p := recover(); p != nil {
			g.log.Error("panic", "component", m.c.Name(), "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("%w: %v", errPanic, p)
		}
	}()
	g.mu.Lock()
	run := m.restarts
	g.mu.Unlock()
	return m.c.Run(ctx, func() { g.markReady(m, run) })
}

var (
	errPanic  = errors.New("panic")
	errGoexit = errors.New("gave up; its last messages say why")
)

// failedToStop reports whether the error that a component returned after its stop is a
// failure. The stop interrupts the start of a component that was not ready yet, and not all
// errors of that are context.Canceled: gRPC has an error of its own, and upstream's components
// wrap both as text.
func failedToStop(err error, wasReady bool) bool {
	return err != nil && !errors.Is(err, context.Canceled) && (wasReady || errors.Is(err, errPanic))
}

func (g *Group) wasReady(m *member) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !m.ready.IsZero()
}

// wasReadyFor reports whether the failed run had been ready for d.
func (g *Group) wasReadyFor(m *member, d time.Duration) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !m.ready.IsZero() && g.now().Sub(m.ready) >= d
}

// failedOnce records a failure after which the component is started again.
func (g *Group) failedOnce(m *member, err error, pause time.Duration) {
	g.mu.Lock()
	if m.restarts == 0 {
		close(m.failed)
	}
	m.restarts++
	m.failure, m.failedAt = err, g.now()
	g.mu.Unlock()
	g.set(m, Restarting, nil)
	g.log.Error("failed; it is started again, and the rest of kedge goes on", "component", m.c.Name(), "err", err, "again_in", pause)
}

// markReady marks a component as ready, for its ready function. run is the number of restarts
// before the run of that function: a leftover of an earlier run must not mark a later run.
func (g *Group) markReady(m *member, run int) {
	g.mu.Lock()
	if m.state != Starting || m.restarts != run {
		g.mu.Unlock()
		return
	}
	now := g.now()
	m.state, m.since, m.ready = Ready, now, now
	took := now.Sub(m.started)
	select {
	case <-m.readyc: // of an earlier run
	default:
		m.served = now
		close(m.readyc)
	}
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
		m.started, m.ready = now, time.Time{}
		if m.begun.IsZero() {
			m.begun = now
		}
	}
	g.mu.Unlock()
	switch {
	case state == Failed:
		if errors.Is(err, ErrInterrupted) || errors.Is(err, ErrStopLimit) {
			return // logged for all of them together
		}
		g.log.Error("failed", "component", m.c.Name(), "was", before, "err", err)
	case state == Stopped && before == Waiting:
		// The component never ran; a line about it would only hide the reason of the stop.
	case state == Starting:
		g.log.Debug("starting", "component", m.c.Name(), "waited", took.Round(time.Millisecond))
	case state == Stopped:
		g.log.Info("stopped", "component", m.c.Name(), "took", took.Round(time.Millisecond))
	default:
		g.log.Debug(string(state), "component", m.c.Name())
	}
}

// announce waits until the start is over and logs it once.
func (g *Group) announce(stop context.Context) {
	closed := make(chan struct{})
	close(closed)
	held := map[*member]bool{} // not ready, and not waited for
	var names []string
	for _, m := range g.members { // in an order in which dependencies come first
		failed := m.failed
		for _, dep := range m.after {
			if held[dep] {
				failed = closed
			}
		}
		select {
		case <-m.readyc:
		case <-stop.Done():
			return
		case <-failed:
			select {
			case <-m.readyc: // meanwhile
			default:
				held[m] = true
				names = append(names, m.c.Name())
			}
		}
	}
	took := g.now().Sub(g.begun).Round(time.Millisecond)
	if len(names) == 0 {
		g.log.Info("all components are ready", "took", took)
	} else {
		g.log.Warn("started, but for components that have failed, which are tried again, and what waits for them", "missing", strings.Join(names, ", "), "took", took)
	}
	if g.onReady != nil {
		g.onReady()
	}
}

// verdict returns the result of the run, after all components are gone.
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
		case m.restart && isFinal(m.err):
			// It was logged when it happened, and is not an error of the stop.
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
