package history

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// verdict collects what End says of a history.
type verdict struct {
	testing.TB
	errors []string
}

func (*verdict) Helper()                           {}
func (*verdict) Logf(string, ...any)               {}
func (v *verdict) Error(args ...any)               { v.errors = append(v.errors, fmt.Sprint(args...)) }
func (v *verdict) Errorf(text string, args ...any) { v.Error(fmt.Sprintf(text, args...)) }

// A history that no single store could have given must be found out, and no other.
func TestHistoryIsJudged(t *testing.T) {
	ok := func() error { return nil }
	lost := func() error { return errors.New("no answer") }
	refused := func() error { return fmt.Errorf("%w: too many", ErrNotDone) }
	reads := func(value string) func() (string, error) { return func() (string, error) { return value, nil } }
	for name, tc := range map[string]struct {
		ask  func(h *History)
		good bool
	}{
		"in order":                     {func(h *History) { h.Write(0, "k", "1", ok); h.Read(1, "k", reads("1")) }, true},
		"a stale read":                 {func(h *History) { h.Write(0, "k", "1", ok); h.Read(1, "k", reads("")) }, false},
		"another key":                  {func(h *History) { h.Write(0, "k", "1", ok); h.Read(1, "l", reads("")) }, true},
		"a write without an answer":    {func(h *History) { h.Write(0, "k", "1", lost); h.Read(1, "k", reads("1")) }, true},
		"one that was never done":      {func(h *History) { h.Write(0, "k", "1", lost); h.Read(1, "k", reads("")) }, true},
		"one that was undone":          {func(h *History) { h.Write(0, "k", "1", lost); h.Read(1, "k", reads("1")); h.Read(1, "k", reads("")) }, false},
		"a refused one that was done":  {func(h *History) { h.Write(0, "k", "1", refused); h.Read(1, "k", reads("1")) }, false},
		"a read without an answer":     {func(h *History) { h.Read(1, "k", func() (string, error) { return "x", errors.New("no answer") }) }, true},
		"something that nobody wrote":  {func(h *History) { h.Read(1, "k", reads("x")) }, false},
		"a write that was foreseen":    {func(h *History) { h.Read(1, "k", reads("1")); h.Write(0, "k", "1", lost) }, false},
		"old after new, by one client": {func(h *History) { h.Write(0, "k", "1", ok); h.Write(0, "k", "2", ok); h.Read(0, "k", reads("1")) }, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := New()
			tc.ask(h)
			for range leastOperations {
				h.Read(2, "other", reads(""))
			}
			v := &verdict{}
			h.End(v)
			if (len(v.errors) == 0) != tc.good {
				t.Errorf("it says %q", v.errors)
			}
		})
	}
}

// Hundreds of writes without an answer, as of a member that is cut off, do not keep a history from being judged.
func TestUnansweredWritesAreJudged(t *testing.T) {
	for _, stale := range []bool{false, true} {
		t.Run(fmt.Sprintf("stale=%v", stale), func(t *testing.T) {
			h := New()
			last := ""
			for n := range 1000 {
				value := fmt.Sprint(n)
				h.Write(0, "k", value, func() error {
					h.Read(1, "k", func() (string, error) { return last, nil })
					if n%10 == 0 {
						last = value
						h.Read(2, "k", func() (string, error) { return last, nil })
					}
					return errors.New("no answer")
				})
			}
			if stale {
				h.Read(3, "k", func() (string, error) { return "0", nil })
			}
			v := &verdict{}
			h.End(v)
			if stale != (len(v.errors) == 1 && strings.Contains(v.errors[0], "not linearizable")) || !stale && len(v.errors) != 0 {
				t.Errorf("it says %q", v.errors)
			}
		})
	}
}

// A history of next to nothing proves nothing.
func TestShortHistoryIsRefused(t *testing.T) {
	h := New()
	asked := make(chan int)
	h.Client(func() time.Duration { return time.Nanosecond }, func(n int) {
		select {
		case asked <- n:
		case <-h.stop:
		}
		h.Read(0, "k", func() (string, error) { return "", nil })
	})
	for want := range 3 {
		if got := <-asked; got != want {
			t.Errorf("question %d is numbered %d", want, got)
		}
	}
	v := &verdict{}
	h.End(v)
	if len(v.errors) != 1 {
		t.Errorf("it says %q", v.errors)
	}
}
