package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// Status is the state of a component at a moment.
type Status struct {
	Name      string    `json:"name"`
	State     State     `json:"state"`
	Since     time.Time `json:"since"`
	After     []string  `json:"after,omitempty"`     // its dependencies
	WaitedFor string    `json:"waitedFor,omitempty"` // the dependency that was ready last
	Waited    Duration  `json:"waited"`              // from the group's start to its own
	Took      Duration  `json:"took"`                // from its start to ready; 0 while it is not
	Detail    string    `json:"detail,omitempty"`    // of a [Describer]
	Error     string    `json:"error,omitempty"`
	Restarts  int       `json:"restarts,omitempty"` // how often it was started again after a failure
	LastError string    `json:"lastError,omitempty"`
	FailedAt  time.Time `json:"failedAt,omitzero"`  // time of LastError
	NoAnswer  bool      `json:"noAnswer,omitempty"` // Error means that its check has not answered
}

// Duration prints as "1.2s" in JSON, not as a count of nanoseconds.
type Duration time.Duration

// MarshalText gives the duration rounded to milliseconds.
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(time.Duration(d).Round(time.Millisecond).String()), nil
}

// UnmarshalText parses the output of MarshalText.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

func (d Duration) String() string { return time.Duration(d).Round(time.Millisecond).String() }

// CheckLimit bounds the time of a [Checker]'s answer.
const CheckLimit = 2 * time.Second

// Status returns the components in the order in which they were added. With a context that is
// not nil it also calls each ready [Checker], whose error it reports, and each [Describer] that is ready or starting. The
// checkers run at the same time, so that a hanging one does not affect the others; a checker
// that does not answer within [CheckLimit] is abandoned.
func (g *Group) Status(ctx context.Context) []Status {
	g.mu.Lock()
	out := make([]Status, 0, len(g.members))
	for _, m := range g.members {
		s := Status{Name: m.c.Name(), State: m.state, Since: m.since}
		var last time.Time
		for _, dep := range m.after {
			s.After = append(s.After, dep.c.Name())
			if dep.served.After(last) {
				last, s.WaitedFor = dep.served, dep.c.Name()
			}
		}
		if !m.begun.IsZero() {
			s.Waited = Duration(m.begun.Sub(g.begun))
		}
		if !m.ready.IsZero() {
			s.Took = Duration(m.ready.Sub(m.started))
		}
		if m.failure != nil {
			s.Restarts, s.LastError, s.FailedAt = m.restarts, m.failure.Error(), m.failedAt
		}
		switch {
		case m.err != nil:
			s.Error = m.err.Error()
		case m.state == Restarting || m.state == Starting:
			s.Error = s.LastError // why it is not ready
		}
		out = append(out, s)
	}
	g.mu.Unlock()
	if ctx == nil {
		return out
	}
	var checks sync.WaitGroup
	for i, m := range g.members { // members do not change after Run
		if out[i].State != Ready && out[i].State != Starting {
			continue
		}
		if d, ok := m.c.(Describer); ok {
			out[i].Detail = d.Describe() // while it starts, what it waits for
		}
		if out[i].State != Ready {
			continue
		}
		if c, ok := m.c.(Checker); ok {
			checks.Go(func() {
				if err := m.check(ctx, c); err != nil {
					out[i].Error, out[i].NoAnswer = err.Error(), errors.Is(err, errNoAnswer)
				}
			})
		}
	}
	checks.Wait()
	return out
}

var errNoAnswer = errors.New("its check has not answered")

// check calls c, but does not wait for a check that ignores its context: it may be in a system
// call that waits for a disk. Until that check returns, no other is started.
func (m *member) check(ctx context.Context, c Checker) error {
	noAnswer := fmt.Errorf("%w within %s", errNoAnswer, CheckLimit)
	if !m.checking.CompareAndSwap(false, true) {
		return noAnswer
	}
	ctx, cancel := context.WithTimeout(ctx, CheckLimit)
	defer cancel()
	answer := make(chan error, 1)
	go func() {
		var err error
		defer func() {
			if p := recover(); p != nil {
				err = fmt.Errorf("%w: %v", errPanic, p)
			}
			m.checking.Store(false)
			answer <- err
		}()
		err = c.Check(ctx)
	}()
	select {
	case err := <-answer:
		if err != nil && ctx.Err() != nil {
			return noAnswer
		}
		return err
	case <-ctx.Done():
		return noAnswer
	}
}

// Healthy returns nil when every component is ready and every [Checker] succeeds, otherwise an
// error that names all components with problems.
func (g *Group) Healthy(ctx context.Context) error {
	var bad []string
	for _, s := range g.Status(ctx) {
		switch {
		case s.Error != "":
			bad = append(bad, s.Name+": "+s.Error)
		case s.State != Ready:
			bad = append(bad, s.Name+" is "+string(s.State))
		}
	}
	if len(bad) > 0 {
		return fmt.Errorf("%s", strings.Join(bad, "; "))
	}
	return nil
}

// LogTable is [WriteTable] for a log that programs read: a record for each component.
func LogTable(log *slog.Logger, statuses []Status) {
	for _, s := range statuses {
		log.Info("started", "component", s.Name, "state", string(s.State), "waited_for", s.WaitedFor,
			"started_at", s.Waited.String(), "ready_after", s.Took.String())
	}
}

// WriteTable writes statuses as the start-up table, with each component's last dependency and
// the times of its start.
func WriteTable(w io.Writer, statuses []Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "COMPONENT\tSTATE\tWAITED FOR\tSTARTED AT\tREADY AFTER")
	for _, s := range statuses {
		waited := s.WaitedFor
		if waited == "" {
			waited = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\n", s.Name, s.State, waited, s.Waited, s.Took)
	}
	return t.Flush()
}
