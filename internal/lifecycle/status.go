package lifecycle

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"text/tabwriter"
	"time"
)

// Status is what the group knows of one component at one moment.
type Status struct {
	Name      string    `json:"name"`
	State     State     `json:"state"`
	Since     time.Time `json:"since"`
	After     []string  `json:"after,omitempty"`     // the components it was started after
	WaitedFor string    `json:"waitedFor,omitempty"` // the one of them that was ready last
	Waited    Duration  `json:"waited"`              // from the group's start to its own
	Took      Duration  `json:"took"`                // from its start to ready; 0 while it is not
	Detail    string    `json:"detail,omitempty"`    // what a [Describer] says
	Error     string    `json:"error,omitempty"`
}

// Duration prints as "1.2s" in JSON, not as a count of nanoseconds.
type Duration time.Duration

// MarshalText gives the duration rounded to milliseconds.
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(time.Duration(d).Round(time.Millisecond).String()), nil
}

// UnmarshalText reads what MarshalText wrote.
func (d *Duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = Duration(v)
	return err
}

func (d Duration) String() string { return time.Duration(d).Round(time.Millisecond).String() }

// Status returns the components in the order in which they were added. With a
// context that is not nil it also asks each ready component that is a [Checker]
// how it is, and reports what it says as Error, and each [Describer].
func (g *Group) Status(ctx context.Context) []Status {
	g.mu.Lock()
	out := make([]Status, 0, len(g.members))
	for _, m := range g.members {
		s := Status{Name: m.c.Name(), State: m.state, Since: m.since}
		var last time.Time
		for _, dep := range m.after {
			s.After = append(s.After, dep.c.Name())
			if dep.ready.After(last) {
				last, s.WaitedFor = dep.ready, dep.c.Name()
			}
		}
		if !m.started.IsZero() {
			s.Waited = Duration(m.started.Sub(g.begun))
		}
		if !m.ready.IsZero() {
			s.Took = Duration(m.ready.Sub(m.started))
		}
		if m.err != nil {
			s.Error = m.err.Error()
		}
		out = append(out, s)
	}
	g.mu.Unlock()
	if ctx == nil {
		return out
	}
	for i, m := range g.members { // members do not change after Run
		if out[i].State != Ready {
			continue
		}
		if d, ok := m.c.(Describer); ok {
			out[i].Detail = d.Describe()
		}
		c, ok := m.c.(Checker)
		if !ok {
			continue
		}
		if err := c.Check(ctx); err != nil {
			out[i].Error = err.Error()
		}
	}
	return out
}

// Healthy returns nil when every component is ready and every [Checker] agrees,
// else an error that names all the others.
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

// WriteTable writes statuses as the start-up table: what each component waited
// for and how long it took.
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
