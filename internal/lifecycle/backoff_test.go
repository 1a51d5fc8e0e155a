package lifecycle

import (
	"testing"
	"time"
)

func TestBackoff(t *testing.T) {
	b := Backoff{First: time.Second, Last: 5 * time.Second, Spread: 1}
	for i, want := range []time.Duration{1, 2, 4, 5, 5} {
		if got := b.next(1); got != want*time.Second {
			t.Errorf("wait %d is at most %s, want %s", i, got, want*time.Second)
		}
	}
	if got := b.next(0); got != 0 {
		t.Errorf("it is at least %s", got)
	}
	b.Reset()
	if got := b.next(0.5); got != 500*time.Millisecond {
		t.Errorf("after an attempt that succeeded it is %s", got)
	}
	for spread, want := range map[float64]time.Duration{0: time.Second, 0.5: 500 * time.Millisecond} {
		b := Backoff{First: time.Second, Last: time.Minute, Spread: spread}
		if got := b.next(0); got != want {
			t.Errorf("with a spread of %v it is at least %s, want %s", spread, got, want)
		}
	}
}
