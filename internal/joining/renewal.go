package joining

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"
)

// Name implements lifecycle.Component.
func (m *Member) Name() string { return "certificates" }

// Run implements lifecycle.Component: it renews the certificates before they
// expire. Whoever uses them reads the files again. It is ready at once.
func (m *Member) Run(ctx context.Context, ready func()) error {
	ready()
	wait := firstRetry
	for {
		m.mu.Lock()
		next, failed := time.Duration(0), m.err != nil || m.signed.IsZero()
		if !failed {
			next = renewAfter(m.signed, m.end, rand.Float64()) - m.now().Sub(m.signed)
		}
		m.mu.Unlock()
		if failed {
			next, wait = jitter(wait), min(2*wait, lastRetry)
		} else {
			wait = firstRetry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.soon:
			wait = firstRetry
		case <-time.After(max(next, firstRetry)):
		}
		err := m.renew(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			m.log.Warn("this node's certificates were not renewed", "err", err, "end", m.end)
			m.mu.Lock()
			m.err = err
			m.mu.Unlock()
		default:
			m.log.Info("this node's certificates were renewed", "server", m.Server())
		}
	}
}

// Moved renews the certificates now: the addresses in them are not the machine's any more.
func (m *Member) Moved() {
	m.mu.Lock()
	m.signed = time.Time{} // it is tried until it has worked
	m.mu.Unlock()
	select {
	case m.soon <- struct{}{}:
	default:
	}
}

// Check implements lifecycle.Checker.
func (m *Member) Check(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if left := m.end.Sub(m.now()); m.err != nil && left < 0 {
		return fmt.Errorf("this node's certificates have expired on %s: %w", m.end.Format(time.DateTime), m.err)
	}
	return nil
}

// renewAfter is how long after they were signed certificates are renewed: between
// half and four fifths of their life, so that the machines of a fleet that was
// started at once do not come back at once. random is of [0, 1).
func renewAfter(signed, end time.Time, random float64) time.Duration {
	return time.Duration((0.5 + 0.3*random) * float64(end.Sub(signed)))
}

// jitter makes a wait up to half longer.
func jitter(d time.Duration) time.Duration { return d + rand.N(d/2+1) }
