package lifecycle

import "testing"

// TestWakeup: wake-ups before a look are one, and a look ends them.
func TestWakeup(t *testing.T) {
	w := NewWakeup()
	woken := func() bool {
		select {
		case <-w:
			return true
		default:
			return false
		}
	}
	if woken() {
		t.Error("woken by nothing")
	}
	w.Wake()
	w.Wake()
	if !woken() {
		t.Error("a wake-up before the look was lost")
	}
	if woken() {
		t.Error("two wake-ups before a look are two")
	}
}
