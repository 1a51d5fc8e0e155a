package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Condition is something that comes and goes while the process runs: that this
// server leads the cluster, for instance.
type Condition interface {
	// Holds reports whether it holds, and a channel that is closed when that may have
	// changed.
	Holds() (bool, <-chan struct{})
}

// While makes a component of parts that run only while a condition holds. Every
// time that it does, build makes the part anew, so that nothing of an earlier term
// is left in it. The component is ready when its first part is, or at once where the
// condition does not hold.
//
// A part that does not stop within stop after the condition has ceased is a failure:
// another machine may do its work by then, and only the end of the process is sure
// to end it here. So is a part that fails, unless the condition has ceased by then: what
// a part does may well be possible only while it holds.
func While(name string, when Condition, stop time.Duration, build func() (Component, error)) Component {
	return &while{name: name, when: when, stop: stop, build: build}
}

type while struct {
	name  string
	when  Condition
	stop  time.Duration
	build func() (Component, error)

	mu   sync.Mutex
	part Component // that runs; nil while none does
}

// Name implements Component.
func (w *while) Name() string { return w.name }

// StopTimeout implements StopTimeouter: the part gets all of stop, and the group
// must not give up first.
func (w *while) StopTimeout() time.Duration { return w.stop + time.Second }

// Check implements Checker: it is the part's, and nil while none runs.
func (w *while) Check(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c, ok := w.part.(Checker); ok {
		return c.Check(ctx)
	}
	return nil
}

// Describe implements Describer: it is the part's, and says so where none runs.
func (w *while) Describe() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.part == nil {
		return "standing by"
	}
	if d, ok := w.part.(Describer); ok {
		return d.Describe()
	}
	return ""
}

// Run implements Component.
func (w *while) Run(ctx context.Context, ready func()) error {
	for ctx.Err() == nil {
		holds, changed := w.when.Holds()
		if holds {
			if err := w.term(ctx, changed, ready); err != nil {
				return err
			}
			continue
		}
		ready()
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

// term runs one part until the condition ceases or ctx ends.
func (w *while) term(ctx context.Context, changed <-chan struct{}, ready func()) error {
	part, err := w.build()
	if err != nil {
		return err
	}
	w.set(part)
	defer w.set(nil)
	term, end := context.WithCancel(ctx)
	defer end()
	returned := make(chan error, 1)
	var began atomic.Bool // the part has been ready
	go func() {
		defer func() {
			if p := recover(); p != nil {
				returned <- fmt.Errorf("%w: %v", errPanic, p)
			}
		}()
		returned <- part.Run(term, func() { began.Store(true); ready() })
	}()
	for holds := true; holds && ctx.Err() == nil; {
		select {
		case err := <-returned:
			if holds, _ := w.when.Holds(); !holds && !errors.Is(err, errPanic) {
				return nil // it has met the end of the term before we have
			}
			if err == nil && ctx.Err() == nil {
				err = ErrUnexpectedReturn
			}
			return err
		case <-ctx.Done():
		case <-changed:
			holds, changed = w.when.Holds()
		}
	}
	end()
	limit := time.NewTimer(w.stop)
	defer limit.Stop()
	select {
	case err := <-returned:
		if failedToStop(err, began.Load()) {
			return err
		}
		return nil
	case <-limit.C:
		return fmt.Errorf("%w (%s)", ErrStopTimeout, w.stop)
	}
}

func (w *while) set(part Component) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.part = part
}
