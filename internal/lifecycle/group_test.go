package lifecycle

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// journal records what components do, in order.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) add(s string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, s)
}

func (j *journal) want(t *testing.T, want ...string) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	if !slices.Equal(j.lines, want) {
		t.Errorf("journal is\n  %s\nwant\n  %s", strings.Join(j.lines, ", "), strings.Join(want, ", "))
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

// steady is a component that takes startup to get ready and stopping to stop.
func steady(j *journal, name string, startup, stopping time.Duration) Component {
	return Func(name, func(ctx context.Context, ready func()) error {
		j.add("start " + name)
		select {
		case <-time.After(startup):
			j.add("ready " + name)
			ready()
			<-ctx.Done()
		case <-ctx.Done():
		}
		j.add("stop " + name)
		time.Sleep(stopping)
		return nil
	})
}

func states(g *Group) map[string]State {
	out := map[string]State{}
	for _, s := range g.Status(nil) { //nolint:staticcheck // nil means: do not ask checkers
		out[s.Name] = s.State
	}
	return out
}

func TestStartsInParallelAndStopsInReverseOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var readyAfter atomic.Int64
		begin := time.Now()
		g := New(quiet(), WithOnReady(func() { readyAfter.Store(int64(time.Since(begin))) }))
		a := g.Add(steady(&j, "a", time.Second, time.Second))
		b := g.Add(steady(&j, "b", 2*time.Second, 0), a)
		g.Add(steady(&j, "c", 3*time.Second, 0), a, b)
		g.Add(steady(&j, "d", 10*time.Second, 2*time.Second))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		time.Sleep(20 * time.Second)
		for name, s := range states(g) {
			if s != Ready {
				t.Errorf("%s is %s, want ready", name, s)
			}
		}
		// d needs 10 s; a, b, c together 6 s: in parallel 10 s, in sequence 16.
		if took := time.Duration(readyAfter.Load()); took != 10*time.Second {
			t.Errorf("all ready after %s, want 10s", took)
		}
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		j.mu.Lock()
		j.lines = slices.DeleteFunc(j.lines, func(s string) bool { return strings.HasSuffix(s, " d") })
		j.mu.Unlock()
		j.want(t, "start a", "ready a", "start b", "ready b", "start c", "ready c", "stop c", "stop b", "stop a")
	})
}

func TestFailureBeforeReadyStopsTheStartedOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		boom := errors.New("boom")
		g := New(quiet())
		a := g.Add(steady(&j, "a", time.Second, 0))
		b := g.Add(Func("b", func(context.Context, func()) error { time.Sleep(time.Second); return boom }), a)
		g.Add(steady(&j, "c", 0, 0), b)
		err := g.Run(t.Context())
		var e *Error
		if !errors.As(err, &e) || e.Component != "b" || !errors.Is(err, boom) {
			t.Errorf("Run: %v, want b: boom", err)
		}
		j.want(t, "start a", "ready a", "stop a")
		want := map[string]State{"a": Stopped, "b": Failed, "c": Stopped}
		if got := states(g); got["a"] != want["a"] || got["b"] != want["b"] || got["c"] != want["c"] {
			t.Errorf("states %v, want %v", got, want)
		}
	})
}

func TestUnexpectedReturnIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(quiet())
		g.Add(Func("a", func(_ context.Context, ready func()) error { ready(); time.Sleep(time.Second); return nil }))
		if err := g.Run(t.Context()); !errors.Is(err, ErrUnexpectedReturn) {
			t.Errorf("Run: %v, want ErrUnexpectedReturn", err)
		}
	})
}

func TestUnexpectedReturnWhileDependentsStop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet())
		ctx, cancel := context.WithCancel(t.Context())
		died := errors.New("died")
		a := g.Add(Func("a", func(own context.Context, ready func()) error {
			ready()
			<-ctx.Done() // listens to the signal, which it must not
			return died
		}))
		g.Add(steady(&j, "b", 0, time.Second), a)
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; !errors.Is(err, died) {
			t.Errorf("Run: %v, want died", err)
		}
		if s := states(g)["a"]; s != Failed {
			t.Errorf("a is %s, want failed", s)
		}
	})
}

func TestPanicIsAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var log bytes.Buffer
		g := New(slog.New(slog.NewTextHandler(&log, nil)))
		g.Add(steady(&j, "a", 0, 0))
		g.Add(Func("b", func(context.Context, func()) error { time.Sleep(time.Second); panic("ouch") }))
		err := g.Run(t.Context())
		if err == nil || !strings.Contains(err.Error(), "b: panic: ouch") {
			t.Errorf("Run: %v, want b: panic: ouch", err)
		}
		if !strings.Contains(log.String(), "group_test.go") {
			t.Error("the log has no stack of the panic")
		}
		j.want(t, "start a", "ready a", "stop a")
	})
}

// A component that never returns must not keep the others from stopping, nor
// the process from exiting.
func TestHangOnStopIsNamedAndTheRestStops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet())
		release := make(chan struct{})
		defer close(release)
		a := g.Add(steady(&j, "a", 0, 0))
		g.Add(Func("b", func(_ context.Context, ready func()) error { ready(); <-release; return nil }), a)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		begin := time.Now()
		cancel()
		err := <-done
		var e *Error
		if !errors.As(err, &e) || e.Component != "b" || !errors.Is(err, ErrStopTimeout) {
			t.Errorf("Run: %v, want b: ErrStopTimeout", err)
		}
		if took := time.Since(begin); took != DefaultStopTimeout {
			t.Errorf("stop took %s, want %s", took, DefaultStopTimeout)
		}
		j.want(t, "start a", "ready a", "stop a")
	})
}

// Limits of components that come after each other add up, to more than the time for all.
func TestStopLimitOfAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		var log bytes.Buffer
		g := New(slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelError})), WithStopLimit(7*time.Second))
		release := make(chan struct{})
		hang := func(name string) Component {
			return Func(name, func(_ context.Context, ready func()) error { ready(); <-release; return nil })
		}
		a := g.Add(steady(&j, "a", 0, 0))
		b := g.Add(hang("b"), a)
		c := g.Add(hang("c"), b)
		g.Add(steady(&j, "d", 0, time.Second), c)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		begin := time.Now()
		cancel()
		err := <-done // d takes 1 s, c its own 5, and b has one
		if took := time.Since(begin); took != 7*time.Second {
			t.Errorf("stop took %s, want 7s", took)
		}
		if !errors.Is(err, ErrStopTimeout) || !errors.Is(err, ErrStopLimit) || err.Error() != "c: did not stop in time (5s)\na, b: was not stopped in the time that all have together" {
			t.Errorf("Run: %v", err)
		}
		if want := `msg="the stop takes too long; what is left of kedge ends with the process" limit=7s left="a, b"` + "\n"; strings.Count(log.String(), "\n") != 2 || !strings.HasSuffix(log.String(), want) {
			t.Errorf("the log says\n%swant one line of c and\n%s", log.String(), want)
		}
		close(release)
		synctest.Wait()
		j.want(t, "start a", "ready a", "start d", "ready d", "stop d", "stop a") // a is told when nobody waits any more
	})
}

// A stop within the limit is as without one, and leaves nothing that waits.
func TestOnStopComesBeforeAnyComponentIsStopped(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet(), WithOnStop(func() { time.Sleep(time.Second); j.add("on stop") }))
		g.Add(steady(&j, "a", 0, 0))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		j.want(t, "start a", "ready a", "on stop", "stop a")
	})
}

func TestStopWithinTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet(), WithStopLimit(7*time.Second))
		a := g.Add(steady(&j, "a", 0, 3*time.Second))
		g.Add(steady(&j, "b", 0, 3*time.Second), a)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func TestSignalBeforeReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet(), WithOnReady(func() { t.Error("ready was announced") }))
		a := g.Add(steady(&j, "a", time.Hour, 0))
		g.Add(steady(&j, "b", 0, 0), a)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		time.Sleep(time.Second)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
		j.want(t, "start a", "stop a")
	})
}

// A start that is cut off fails in words that the component's own libraries choose; a
// component that was ready has no such excuse, and nothing excuses a panic.
func TestErrorsWhenToldToStop(t *testing.T) {
	broken := errors.New("rpc error: code = Canceled")
	for name, tc := range map[string]struct {
		startup time.Duration
		end     func() error
		want    string
	}{
		"while it starts":       {time.Hour, func() error { return broken }, ""},
		"after it was ready":    {0, func() error { return broken }, "a: " + broken.Error()},
		"cancelled":             {0, func() error { return context.Canceled }, ""},
		"a panic on its way up": {time.Hour, func() error { panic("ouch") }, "a: panic: ouch"},
	} {
		// Once as a member of the group, and once as the part of a later term, of which
		// the group knows only that its component has been ready for long.
		for _, while := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					a := Func("a", func(ctx context.Context, ready func()) error {
						select {
						case <-time.After(tc.startup):
							ready()
							<-ctx.Done()
						case <-ctx.Done():
						}
						return tc.end()
					})
					if while {
						inner, leads := a, newToggle(false)
						a = While("a", leads, time.Second, func() (Component, error) { return inner, nil })
						time.AfterFunc(time.Second, func() { leads.set(true) })
					}
					g := New(quiet())
					g.Add(a)
					ctx, cancel := context.WithCancel(t.Context())
					defer cancel()
					time.AfterFunc(time.Minute, cancel)
					got := ""
					if err := g.Run(ctx); err != nil {
						got = err.Error()
					}
					if got != tc.want {
						t.Errorf("Run: %q, want %q", got, tc.want)
					}
				})
			})
		}
	}
}

func TestSecondSignalCutsTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		hurry := make(chan struct{})
		g := New(quiet(), WithFastStop(hurry))
		g.Add(steady(&j, "a", 0, 4*time.Second))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		synctest.Wait()
		begin := time.Now()
		cancel()
		time.Sleep(time.Second)
		close(hurry)
		if err := <-done; !errors.Is(err, ErrInterrupted) {
			t.Errorf("Run: %v, want ErrInterrupted", err)
		}
		if took := time.Since(begin); took != time.Second {
			t.Errorf("stop took %s, want 1s", took)
		}
		time.Sleep(time.Minute) // lets a return before the bubble ends
	})
}

func TestReadyAfterReturnIsIgnored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := New(quiet())
		var late func()
		g.Add(Func("a", func(_ context.Context, ready func()) error { late = ready; return errors.New("no") }))
		if err := g.Run(t.Context()); err == nil {
			t.Error("Run returned nil")
		}
		late()
		if s := states(g)["a"]; s != Failed {
			t.Errorf("a is %s, want failed", s)
		}
	})
}

type sick struct{ Component }

func (sick) Check(context.Context) error { return errors.New("fever") }

func (sick) Describe() string { return "in bed" }

func TestStatusAsksCheckers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var j journal
		g := New(quiet())
		a := g.Add(steady(&j, "a", 2*time.Second, 0))
		g.Add(sick{steady(&j, "b", time.Second, 0)}, a)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- g.Run(ctx) }()
		time.Sleep(2500 * time.Millisecond)
		if err := g.Healthy(t.Context()); err == nil || err.Error() != "b is starting" {
			t.Errorf("Healthy: %v, want b is starting", err)
		}
		if st := g.Status(t.Context())[1]; st.Detail != "in bed" || st.Error != "" {
			t.Errorf("while it starts: %+v", st)
		}
		time.Sleep(time.Minute)
		if err := g.Healthy(t.Context()); err == nil || err.Error() != "b: fever" {
			t.Errorf("Healthy: %v, want b: fever", err)
		}
		st := g.Status(t.Context())[1]
		if st.WaitedFor != "a" || st.Waited != Duration(2*time.Second) || st.Took != Duration(time.Second) {
			t.Errorf("status %+v", st)
		}
		text, err := json.Marshal(st)
		if err != nil || !strings.Contains(string(text), `"took":"1s"`) {
			t.Errorf("json %s, %v", text, err)
		}
		cancel()
		<-done
	})
}

func TestNotifierTakesTheVariable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "n")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	n := TakeNotifier()
	if v, ok := os.LookupEnv("NOTIFY_SOCKET"); ok {
		t.Errorf("NOTIFY_SOCKET is still %q", v)
	}
	if err := n.Ready(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	k, err := l.Read(buf)
	if err != nil || string(buf[:k]) != "READY=1" {
		t.Errorf("read %q, %v", buf[:k], err)
	}
	if err := (Notifier{}).Ready(); err != nil {
		t.Errorf("zero Notifier: %v", err)
	}
}
