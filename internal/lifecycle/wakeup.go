package lifecycle

// Wakeup wakes one goroutine that waits for it in a select. Any number of wake-ups that come before the goroutine looks are
// one, and none is lost while the goroutine works.
type Wakeup chan struct{}

// NewWakeup returns a Wakeup that nobody has used.
func NewWakeup() Wakeup { return make(Wakeup, 1) }

// Wake wakes the goroutine, and never waits.
func (w Wakeup) Wake() {
	select {
	case w <- struct{}{}:
	default: // woken already
	}
}
