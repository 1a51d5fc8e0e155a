package doctor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Level is the severity of a finding.
type Level string

const (
	Problem Level = "problem" // something does not work
	Warning Level = "warning" // something works badly, or will fail later
	Unknown Level = "unknown" // a check could not be made
	Fixed   Level = "fixed"   // it was a problem or a warning, and was repaired
)

// order has the levels in the order of the output.
var order = []Level{Problem, Warning, Unknown, Fixed}

// Finding is one thing that is wrong.
type Finding struct {
	Level   Level     `json:"level"`
	Check   string    `json:"check"`
	Subject string    `json:"subject"`
	What    string    `json:"what"`
	Since   time.Time `json:"since,omitzero"`
	Remedy  string    `json:"remedy,omitempty"`
	Fixed   string    `json:"fixed,omitempty"` // what was done about it

	fix func() (did string, err error) // nil if a person has to decide
}

// Skipped is a check that does not concern the machine.
type Skipped struct {
	Check  string `json:"check"`
	Reason string `json:"reason"`
}

// Report is the result of all checks.
type Report struct {
	Version  string    `json:"version"`
	Node     string    `json:"node"`
	Kedge    State     `json:"kedge"`
	PID      int       `json:"pid,omitempty"`
	Checks   int       `json:"checks"` // how many were made
	Findings []Finding `json:"findings"`
	Skipped  []Skipped `json:"skipped"`
}

// Has reports whether the report has a finding of the level.
func (r Report) Has(l Level) bool {
	return slices.ContainsFunc(r.Findings, func(f Finding) bool { return f.Level == l })
}

// String returns the report for a terminal: one line per finding.
func (r Report) String() string { return r.text(time.Now()) }

func (r Report) text(now time.Time) string {
	var b strings.Builder
	for _, f := range r.Findings {
		fmt.Fprintf(&b, "%-8s %s: %s", strings.ToUpper(string(f.Level)), f.Subject, oneLine(f.What))
		if !f.Since.IsZero() {
			fmt.Fprintf(&b, " (since %s, %s ago)", f.Since.UTC().Format(time.RFC3339), age(now.Sub(f.Since)))
		}
		if f.Remedy != "" && f.Level != Fixed {
			fmt.Fprintf(&b, "; %s", f.Remedy)
		}
		if f.Fixed != "" {
			fmt.Fprintf(&b, "; %s", f.Fixed)
		}
		b.WriteByte('\n')
	}
	if len(r.Findings) == 0 {
		b.WriteString("no problems found")
	} else {
		b.WriteString(counts(r.Findings))
	}
	state := map[State]string{
		Running: fmt.Sprintf("kedge runs as process %d, node %s", r.PID, r.Node),
		Stopped: fmt.Sprintf("kedge is stopped, node %s", r.Node), Absent: "no node was started on this machine",
	}[r.Kedge]
	fmt.Fprintf(&b, " by %s; %s\n", plural(r.Checks, "check"), state)
	return b.String()
}

func counts(findings []Finding) string {
	var parts []string
	for _, l := range order {
		n := 0
		for _, f := range findings {
			if f.Level == l {
				n++
			}
		}
		if n == 0 {
			continue
		}
		switch l {
		case Problem, Warning:
			parts = append(parts, plural(n, string(l)))
		default:
			parts = append(parts, fmt.Sprint(n, " ", l))
		}
	}
	return strings.Join(parts, ", ")
}

func plural(n int, word string) string {
	if n == 1 {
		return "1 " + word
	}
	return fmt.Sprint(n, " ", word, "s")
}

// oneLine replaces line ends: messages of the API and of components may have several lines.
func oneLine(s string) string { return strings.Join(strings.Fields(s), " ") }

func age(d time.Duration) string {
	switch {
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", d/(24*time.Hour))
	case d >= time.Hour:
		return strings.TrimSuffix(d.Round(time.Minute).String(), "0s")
	}
	return d.Round(time.Second).String()
}

// check is one check with its time limit.
type check struct {
	name  string
	limit time.Duration
	run   func(context.Context, *subject) ([]Finding, error)
}

// newCheck joins a reader of facts and their judge.
func newCheck[F any](name string, limit time.Duration, read func(context.Context, *subject) (F, error), judge func(*subject, F) []Finding) check {
	return check{name, limit, func(ctx context.Context, s *subject) ([]Finding, error) {
		facts, err := read(ctx, s)
		if err != nil {
			return nil, err
		}
		return judge(s, facts), nil
	}}
}

// skip is the error of a reader whose check does not concern the machine.
type skip string

func (s skip) Error() string { return string(s) }

// Run makes all checks. With fix it then repairs what can be repaired safely.
func Run(ctx context.Context, c Config, fix bool) Report {
	s := examine(ctx, c)
	r := s.run(ctx, checks())
	if fix {
		r.repair()
	}
	r.sort()
	return r
}

// run makes checks side by side.
func (s *subject) run(ctx context.Context, checks []check) Report {
	r := Report{Version: s.Version, Node: s.NodeName, Kedge: s.state, Findings: []Finding{}, Skipped: []Skipped{}}
	if s.state == Running {
		r.PID, r.Node = s.report.PID, s.report.Node
	}
	var (
		mu   sync.Mutex
		wait sync.WaitGroup
	)
	for _, c := range checks {
		wait.Go(func() {
			found, err := c.within(ctx, s)
			mu.Lock()
			defer mu.Unlock()
			var skipped skip
			switch {
			case errors.As(err, &skipped):
				r.Skipped = append(r.Skipped, Skipped{c.name, string(skipped)})
				return
			case err != nil:
				found = []Finding{{Level: Unknown, What: "the check could not be made: " + err.Error()}}
			default:
				r.Checks++
			}
			for _, f := range found {
				f.Check = c.name
				if f.Subject == "" {
					f.Subject = c.name
				}
				r.Findings = append(r.Findings, f)
			}
		})
	}
	wait.Wait()
	return r
}

// within makes the check, but does not wait longer than its limit: a reader may be in a system call that waits for a
// disk. Such a reader is abandoned.
func (c check) within(ctx context.Context, s *subject) ([]Finding, error) {
	ctx, cancel := context.WithTimeout(ctx, c.limit)
	defer cancel()
	type answer struct {
		found []Finding
		err   error
	}
	done := make(chan answer, 1)
	go func() {
		found, err := c.run(ctx, s)
		done <- answer{found, err}
	}()
	select {
	case a := <-done:
		return a.found, a.err
	case <-ctx.Done():
		select { // both may be ready
		case a := <-done:
			return a.found, a.err
		default:
		}
		return nil, fmt.Errorf("it did not finish within %s", c.limit)
	}
}

// repair calls the repair of each finding that has one.
func (r *Report) repair() {
	for i := range r.Findings {
		f := &r.Findings[i]
		if f.fix == nil {
			continue
		}
		did, err := f.fix()
		if err != nil {
			f.Fixed = "not repaired: " + err.Error()
			continue
		}
		f.Level, f.Fixed = Fixed, did
	}
}

func (r *Report) sort() {
	slices.SortStableFunc(r.Findings, func(a, b Finding) int {
		if a.Level != b.Level {
			return slices.Index(order, a.Level) - slices.Index(order, b.Level)
		}
		return strings.Compare(a.Subject+a.What, b.Subject+b.What)
	})
	slices.SortFunc(r.Skipped, func(a, b Skipped) int { return strings.Compare(a.Check, b.Check) })
}
