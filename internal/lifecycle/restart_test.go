package lifecycle

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// script is a component whose runs end as it says, and stay ready after the last line.
type script struct {
	name string
	runs []func(ctx context.Context, ready func()) error
	at   []time.Duration // when each run began
	from time.Time
}

func (s *script) Name() string { return s.name }

func (s *script) Run(ctx context.Context, ready func()) error {
	n := len(s.at)
	s.at = append(s.at, time.Since(s.from))
	if n < len(s.runs) {
		return s.runs[n](ctx, ready)
	}
	ready()
	<-ctx.Done()
	return nil
}

// run runs g in the background, and returns how to stop it and its verdict.
func run(t *testing.T, g *Group) (stop func() error) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	synctest.Wait()
	return func() error {
		cancel()
		return <-done
	}
}

func find(t *testing.T, g *Group, name string) Status {
	t.Helper()
	for _, s := range g.Status(t.Context()) {
		if s.Name == name {
			return s
		}
	}
	t.Fatalf("no component %s", name)
	return Status{}
}

var errBoom = errors.New("boom")

// However a run ends, it is followed by another after a pause that doubles, while the
// essential components, and those after the failing one, go on.
func TestRestartsWithDoublingPauses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		readies := 0
		g := New(quiet(), WithOnReady(func() { readies++ }))
		store := g.Add(steady(&j, "store", 0, 0))
		part := &script{name: "part", from: time.Now()}
		for range 2 {
			part.runs = append(part.runs,
				func(context.Context, func()) error { return errBoom },
				func(context.Context, func()) error { return nil },
				func(context.Context, func()) error { panic("ouch") },
				func(context.Context, func()) error { runtime.Goexit(); return nil })
		}
		h := g.AddRestarted(part, store)
		g.AddRestarted(steady(&j, "user", 0, 0), h)
		stop := run(t, g)
		if s := find(t, g, "part"); s.State != Restarting || s.Error != "boom" || s.Restarts != 1 {
			t.Errorf("after the first failure: %+v", s)
		}
		if readies != 1 {
			t.Errorf("the start was over %d times while a component is restarted, want once", readies)
		}
		time.Sleep(5 * time.Minute)
		synctest.Wait()
		want := []time.Duration{0, 1, 3, 7, 15, 31, 63, 123, 183} // in seconds: 1+2+4+8+16+32+60+60
		if len(part.at) != len(want) {
			t.Fatalf("runs began at %v, want %v seconds", part.at, want)
		}
		for i := range want {
			if part.at[i] != want[i]*time.Second {
				t.Fatalf("runs began at %v, want %v seconds", part.at, want)
			}
		}
		s := find(t, g, "part")
		if s.State != Ready || s.Error != "" || s.Restarts != 8 || !strings.Contains(s.LastError, "gave up") || time.Since(s.FailedAt) != 5*time.Minute-123*time.Second {
			t.Errorf("when it is ready: %+v", s)
		}
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
		j.want(t, "start store", "ready store", "start user", "ready user", "stop user", "stop store")
	})
}

// What runs already is not touched when what it came after is restarted.
func TestDependentsOutliveARestart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet())
		part := &script{name: "part", from: time.Now(), runs: []func(context.Context, func()) error{
			func(_ context.Context, ready func()) error { ready(); time.Sleep(time.Hour); return errBoom },
			func(_ context.Context, ready func()) error { ready(); time.Sleep(time.Minute); return errBoom },
		}}
		g.Add(steady(&j, "user", 0, 0), g.AddRestarted(part))
		stop := run(t, g)
		time.Sleep(2 * time.Hour)
		synctest.Wait()
		j.want(t, "start user", "ready user")
		// An hour of service makes the next pause the first again; a minute does not.
		if want := time.Hour + time.Second + time.Minute + 2*time.Second; len(part.at) != 3 || part.at[2] != want {
			t.Errorf("runs began at %v, want the third at %s", part.at, want)
		}
		if s := find(t, g, "user"); s.WaitedFor != "part" || s.Waited != 0 {
			t.Errorf("status of the dependent: %+v", s)
		}
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestFinalFailure(t *testing.T) {
	for name, ends := range map[string]bool{"beside others": false, "with nothing else to keep": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var j journal
				var options []Option
				if ends {
					options = append(options, WithFinalFailuresEnd())
				}
				g := New(quiet(), options...)
				g.Add(steady(&j, "store", 0, 0))
				part := &script{name: "part", runs: []func(context.Context, func()) error{
					func(context.Context, func()) error { return Final(errBoom) },
				}}
				g.AddRestarted(part)
				stop := run(t, g)
				time.Sleep(time.Hour)
				synctest.Wait()
				if s := find(t, g, "part"); s.State != Failed || s.Error != "boom" || len(part.at) != 1 {
					t.Errorf("%+v, %d runs", s, len(part.at))
				}
				if s := find(t, g, "store").State; (s == Ready) == ends {
					t.Errorf("the store is %s", s)
				}
				var failed *Error
				if err := stop(); ends != (errors.As(err, &failed) && failed.Component == "part") || !ends && err != nil {
					t.Errorf("Run: %v", err)
				}
			})
		})
	}
}

// The failure of an essential component still stops the restarted ones, in whatever
// state they are.
func TestEssentialFailureStopsRestarted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(quiet())
		g.Add(Func("store", func(_ context.Context, ready func()) error { ready(); time.Sleep(10 * time.Second); return errBoom }))
		failing := &script{name: "failing"}
		for range 9 {
			failing.runs = append(failing.runs, func(context.Context, func()) error { return errors.New("no") })
		}
		h := g.AddRestarted(failing)
		g.AddRestarted(&script{name: "waits"}, h)
		g.AddRestarted(&script{name: "runs"})
		err := g.Run(t.Context())
		if !errors.Is(err, errBoom) || time.Since(g.begun) != 10*time.Second {
			t.Errorf("Run: %v after %s", err, time.Since(g.begun))
		}
		for name, s := range states(g) {
			if name != "store" && s != Stopped {
				t.Errorf("%s is %s", name, s)
			}
		}
	})
}

// What is left of an earlier run has no say in the state of the next, and its context has
// ended.
func TestEarlierRunHasNoSay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var late func()
		var earlier context.Context
		g := New(quiet())
		part := &script{name: "part", runs: []func(context.Context, func()) error{
			func(ctx context.Context, ready func()) error { late, earlier = ready, ctx; return errBoom },
			func(ctx context.Context, _ func()) error { <-ctx.Done(); return nil },
		}}
		g.AddRestarted(part)
		stop := run(t, g)
		time.Sleep(time.Minute)
		synctest.Wait()
		late()
		if s := find(t, g, "part"); s.State != Starting || s.Error != "boom" {
			t.Errorf("it is %s (%s), want starting, with the error that it was restarted for", s.State, s.Error)
		}
		if earlier.Err() == nil {
			t.Error("the context of the run that failed goes on")
		}
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// checked is a component with a check.
type checked struct {
	script
	check func(context.Context) error
}

func (c *checked) Check(ctx context.Context) error { return c.check(ctx) }

// A check that hangs, heeding its context or not, is its own component's problem only.
func TestChecksDoNotWaitForEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		calls := 0
		part := func(name string, check func(context.Context) error) Component {
			return &checked{script{name: name}, check}
		}
		g := New(quiet())
		g.Add(part("stuck", func(context.Context) error { calls++; <-release; return nil }))
		g.Add(part("slow", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }))
		g.Add(part("panics", func(context.Context) error { panic("ouch") }))
		g.Add(part("well", func(ctx context.Context) error { time.Sleep(time.Second); return ctx.Err() }))
		stop := run(t, g)
		for range 2 {
			begin := time.Now()
			got := map[string]string{}
			for _, s := range g.Status(t.Context()) {
				got[s.Name] = s.Error
			}
			if took := time.Since(begin); took != CheckLimit {
				t.Errorf("asked for %s, want %s", took, CheckLimit)
			}
			late := "its check has not answered within 2s"
			if got["stuck"] != late || got["slow"] != late || got["panics"] != "panic: ouch" || got["well"] != "" {
				t.Errorf("errors %v", got)
			}
		}
		synctest.Wait()
		if calls != 1 {
			t.Errorf("the check that hangs was called %d times", calls)
		}
		close(release)
		synctest.Wait()
		if s := find(t, g, "stuck"); s.Error != "" || calls != 2 {
			t.Errorf("when it answers again: %q after %d calls", s.Error, calls)
		}
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// When what all others need is gone for good, they are not waited for.
func TestFailureAtOnce(t *testing.T) {
	for name, quick := range map[string]bool{"in order": false, "at once": true} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var j journal
				g := New(quiet(), WithStopLimit(time.Hour))
				store := g.Add(Func("store", func(_ context.Context, ready func()) error {
					ready()
					time.Sleep(10 * time.Second)
					if quick {
						return AtOnce(errBoom)
					}
					return errBoom
				}))
				g.Add(steady(&j, "user", 0, 4*time.Second), store)
				g.AddRestarted(steady(&j, "other", 0, 0))
				err := g.Run(t.Context())
				want := 14 * time.Second
				if quick {
					want = 11 * time.Second
				}
				if took := time.Since(g.begun); !errors.Is(err, errBoom) || took != want {
					t.Errorf("%v after %s, want %s", err, took, want)
				}
				if s := states(g)["other"]; s != Stopped {
					t.Errorf("what can stop in time is %s", s)
				}
				time.Sleep(time.Hour) // lets a return before the bubble ends
			})
		})
	}
}
