package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// Condition is a condition that changes while the process runs, such as the leadership of this
// server.
type Condition interface {
	// Holds reports whether the condition holds, and returns a channel that is closed when
	// that may have changed.
	Holds() (bool, <-chan struct{})
}

// While makes a component whose part runs only while a condition holds. Each time the condition
// begins to hold, build makes a new part, so that no state of an earlier term is left. The
// component is ready when its first part is ready, or at once if the condition does not hold.
//
// The component fails if the part does not stop within stop after the condition has ceased:
// another machine may do the part's work by then, and only the end of the process surely ends
// it here. It also fails if the part fails, unless the condition has ceased by then: the part's
// work may be possible only while the condition holds.
func While(name string, when Condition, stop time.Duration, build func() (Component, error)) Component {
	return &while{name: name, when: when, stop: stop, build: build}
}

type while struct {
	name  string
	when  Condition
	stop  time.Duration
	build func() (Component, error)

	mu   sync.Mutex
	part Component // running part, or nil
}

// Name implements Component.
func (w *while) Name() string { return w.name }

// StopTimeout implements StopTimeouter. The part gets all of stop before the group gives up.
func (w *while) StopTimeout() time.Duration { return w.stop + time.Second }

// Check implements Checker. It is the part's check, and nil without a part.
func (w *while) Check(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if c, ok := w.part.(Checker); ok {
		return c.Check(ctx)
	}
	return nil
}

// Describe implements Describer. It is the part's description, or says that there is no part.
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
				return nil // the part has noticed the end of the term first
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
