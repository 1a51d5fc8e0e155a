package lifecycle

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// toggle is a condition of a test.
type toggle struct {
	mu      sync.Mutex
	holds   bool
	changed chan struct{}
}

func newToggle(holds bool) *toggle { return &toggle{holds: holds, changed: make(chan struct{})} }

func (c *toggle) Holds() (bool, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holds, c.changed
}

func (c *toggle) set(holds bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.changed)
	c.holds, c.changed = holds, make(chan struct{})
}

func TestWhileRunsAPartPerTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leads := newToggle(false)
		built, running, readied := 0, 0, 0
		w := While("singleton", leads, time.Second, func() (Component, error) {
			built++
			return Func("inner", func(ctx context.Context, ready func()) error {
				running++
				defer func() { running-- }()
				ready()
				<-ctx.Done()
				return nil
			}), nil
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx, func() { readied++ }) }()
		synctest.Wait()
		if built != 0 || readied == 0 {
			t.Errorf("without the condition: %d built, ready %d times", built, readied)
		}
		for term := 1; term <= 3; term++ {
			leads.set(true)
			synctest.Wait()
			if built != term || running != 1 {
				t.Errorf("term %d: %d built, %d running", term, built, running)
			}
			if d := w.(Describer).Describe(); d != "" {
				t.Errorf("while it runs: %q", d)
			}
			leads.set(false)
			synctest.Wait()
			if d := w.(Describer).Describe(); d != "standing by" {
				t.Errorf("while it does not: %q", d)
			}
			if running != 0 {
				t.Errorf("after term %d: %d running", term, running)
			}
		}
		leads.set(true)
		synctest.Wait()
		cancel()
		if err := <-done; err != nil || running != 0 {
			t.Errorf("at the end: %v, %d running", err, running)
		}
	})
}

func TestWhileIsReadyWithItsFirstPart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		w := While("singleton", newToggle(true), time.Second, func() (Component, error) {
			return Func("inner", func(ctx context.Context, ready func()) error {
				<-release
				ready()
				<-ctx.Done()
				return nil
			}), nil
		})
		ready := make(chan struct{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- w.Run(ctx, func() { close(ready) }) }()
		synctest.Wait()
		select {
		case <-ready:
			t.Error("ready before its part")
		default:
		}
		close(release)
		<-ready
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestWhileFails(t *testing.T) {
	broken := errors.New("broken")
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	hang := func(context.Context, func()) error {
		<-over
		return nil
	}
	for name, tc := range map[string]struct {
		part  func(context.Context, func()) error
		build error
		want  error
		cease bool
	}{
		"a part that fails":          {part: func(context.Context, func()) error { return broken }, want: broken},
		"a part that returns":        {part: func(context.Context, func()) error { return nil }, want: ErrUnexpectedReturn},
		"a part that panics":         {part: func(context.Context, func()) error { panic(broken) }},
		"a part that cannot be made": {build: broken, want: broken},
		"a part that does not stop":  {part: hang, cease: true, want: ErrStopTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			leads := newToggle(true)
			began := make(chan struct{})
			w := While("singleton", leads, 10*time.Millisecond, func() (Component, error) {
				return Func("inner", func(ctx context.Context, ready func()) error {
					close(began)
					return tc.part(ctx, ready)
				}), tc.build
			})
			done := make(chan error, 1)
			go func() { done <- w.Run(t.Context(), func() {}) }()
			if tc.cease {
				<-began
				leads.set(false)
			}
			if err := <-done; err == nil || tc.want != nil && !errors.Is(err, tc.want) {
				t.Errorf("got %v, want %v", err, tc.want)
			}
		})
	}
}

// Whoever needs the condition for what it does may fail before it hears that it is gone.
func TestWhilePartFailsAtTheEndOfItsTerm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		leads := newToggle(true)
		fail := make(chan func() error)
		w := While("singleton", leads, time.Second, func() (Component, error) {
			return Func("inner", func(ctx context.Context, ready func()) error {
				ready()
				return (<-fail)()
			}), nil
		})
		done := make(chan error, 1)
		go func() { done <- w.Run(t.Context(), func() {}) }()
		synctest.Wait()
		fail <- func() error {
			leads.mu.Lock()
			defer leads.mu.Unlock()
			leads.holds = false // and nobody is told yet
			return errors.New("no leader")
		}
		synctest.Wait()
		select {
		case err := <-done:
			t.Fatalf("it ended with %v", err)
		default:
		}
		leads.set(true)
		fail <- func() error { return errors.New("boom") }
		if err := <-done; err == nil || err.Error() != "boom" {
			t.Errorf("a part that failed within its term: %v", err)
		}
	})
}
