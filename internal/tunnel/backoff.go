package tunnel

import (
	"context"
	"math/rand/v2"
	"time"
)

// Backoff is the waits between attempts: each is random between nothing and a limit
// that doubles from First to Last. So those who lost the same server at the same
// moment do not come back at the same moment.
type Backoff struct {
	First, Last time.Duration
	limit       time.Duration
}

// Wait waits, or returns false when ctx ends first.
func (b *Backoff) Wait(ctx context.Context) bool {
	t := time.NewTimer(b.next(rand.Float64()))
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// Reset begins again with First, after an attempt that has succeeded.
func (b *Backoff) Reset() { b.limit = 0 }

// next is the wait for a random number of [0, 1).
func (b *Backoff) next(random float64) time.Duration {
	b.limit = min(max(2*b.limit, b.First), b.Last)
	return time.Duration(random * float64(b.limit))
}
