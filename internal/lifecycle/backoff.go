package lifecycle

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff has the waits between attempts. The limit of a wait is First, and doubles with each wait up to Last. Spread is the
// share of the limit that is left to chance: a wait is exactly the limit if it is zero, and between nothing and the limit if it
// is 1. Machines that have lost a server at the same moment do then not all return at the same moment.
type Backoff struct {
	First, Last time.Duration
	Spread      float64
	limit       time.Duration
}

// Wait waits, or returns false when ctx ends first.
func (b *Backoff) Wait(ctx context.Context) bool {
	t := time.NewTimer(b.Next())
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Next returns the next wait, for callers that wait for other events too.
func (b *Backoff) Next() time.Duration { return b.next(rand.Float64()) }

// Reset starts again with First, after a successful attempt.
func (b *Backoff) Reset() { b.limit = 0 }

// next returns the wait for a random number in [0, 1).
func (b *Backoff) next(random float64) time.Duration {
	b.limit = min(max(2*b.limit, b.First), b.Last)
	return time.Duration((1 - b.Spread*(1-random)) * float64(b.limit))
}
