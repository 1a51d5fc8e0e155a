package joining

import (
	"context"
	"fmt"
	"math/rand/v2"
	"time"

	"kedge/internal/lifecycle"
)

// Name implements lifecycle.Component.
func (m *Member) Name() string { return "certificates" }

// Run implements lifecycle.Component: it renews the certificates before they expire. Their
// users read the files again. It is ready at once.
func (m *Member) Run(ctx context.Context, ready func()) error {
	ready()
	wait := lifecycle.Backoff{First: firstRetry, Last: lastRetry, Spread: 0.5}
	for {
		m.mu.Lock()
		next, failed := time.Duration(0), m.err != nil || m.signed.IsZero()
		if !failed {
			next = renewAfter(m.signed, m.end, rand.Float64()) - m.now().Sub(m.signed)
		}
		m.mu.Unlock()
		if failed {
			next = wait.Next()
		} else {
			wait.Reset()
		}
		select {
		case <-ctx.Done():
			return nil
		case <-m.soon:
			wait.Reset()
		case <-time.After(max(next, firstRetry)):
		}
		err := m.renew(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			m.log.Warn("cannot renew this node's certificates", "err", err, "end", m.end)
			m.mu.Lock()
			m.err = err
			m.mu.Unlock()
		default:
			m.log.Info("this node's certificates were renewed", "server", m.Server())
		}
	}
}

// Moved renews the certificates now: the machine has lost the addresses in them.
func (m *Member) Moved() {
	m.mu.Lock()
	m.signed = time.Time{} // retried until it succeeds
	m.mu.Unlock()
	m.soon.Wake()
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

// renewAfter returns the age at which certificates are renewed: between half and four fifths
// of their life, so that machines that were started together do not renew together. random is
// from [0, 1).
func renewAfter(signed, end time.Time, random float64) time.Duration {
	return time.Duration((0.5 + 0.3*random) * float64(end.Sub(signed)))
}

// lastRetry is the longest wait before a renewal is tried again.
const lastRetry = 5 * time.Minute
