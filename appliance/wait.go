package appliance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
)

// Waiter waits until a node is ready, for as long as it makes progress. A slow machine takes the time that it needs; a
// machine on which nothing changes any more is given up.
type Waiter struct {
	// Report returns the report of the running kedge.
	Report func(context.Context) (control.Report, error)
	// Service returns the state of the service.
	Service func(context.Context) (ServiceState, error)
	// Node reports whether the node is Ready, and otherwise why not. It is nil for a server without a node.
	Node func(ctx context.Context, name string) (ready bool, why string, err error)
	// Show is told what is waited for, with changed set if that is news.
	Show func(p Progress, changed bool)
	// Besides is the name of a component whose state does not count; empty for none.
	Besides string
	// Patience is the time without progress after which the waiting ends.
	Patience time.Duration
	// Problems is told at the end of what components report although they are ready and the node is Ready, such as a
	// firewall of the machine that is in the way of pods. It is nil if nobody wants to know.
	Problems func(of []lifecycle.Status)
	// Before is the process that was running before the service was restarted; 0 if there was none.
	Before int
}

// Progress is what a starting node waits for.
type Progress struct {
	Component string // empty while kedge does not answer
	Detail    string
	Ready     int // number of components
	Total     int
}

func (p Progress) String() string {
	text := "waiting for kedge to start"
	if p.Component != "" {
		text = "waiting for " + p.Component
	}
	if p.Total > 1 {
		text = fmt.Sprintf("%s (%d of %d components ready)", text, p.Ready, p.Total)
	}
	if p.Detail != "" {
		text += ": " + p.Detail
	}
	return text
}

// ErrEnded means that the service has ended and is not started again.
var ErrEnded = errors.New("kedge has exited and is not started again")

// ErrStuck means that nothing has changed for a while.
var ErrStuck = errors.New("kedge is not ready")

// Intervals of the waiting.
const (
	pollInterval    = 250 * time.Millisecond
	serviceInterval = time.Second // it costs a process
	// endedAfter is the time for which a service must be seen without a process: a restart has such a moment too.
	endedAfter = 3 * time.Second
	// lastingAfter is the time after which a problem of a component of a Ready node is one of the machine, which the
	// waiting does not solve. At the start there are others: a check that takes too long, for instance.
	lastingAfter = 20 * time.Second
)

// Wait returns when the node is ready.
func (w Waiter) Wait(ctx context.Context) error {
	seen := map[string]bool{}
	last, checked, inactive, works := time.Now(), time.Time{}, time.Time{}, time.Time{}
	for {
		p, news, done, problems := w.look(ctx)
		switch {
		case !done:
			works = time.Time{}
		case works.IsZero():
			works = time.Now()
		}
		if done && (len(problems) == 0 || time.Since(works) >= lastingAfter) {
			if w.Problems != nil {
				w.Problems(problems)
			}
			return nil
		}
		changed := false
		for _, n := range news {
			changed = changed || !seen[n]
			seen[n] = true
		}
		if changed {
			last = time.Now()
		}
		w.Show(p, changed)
		if time.Since(checked) >= serviceInterval {
			checked = time.Now()
			state, err := w.Service(ctx)
			switch {
			case err != nil || state.Active:
				inactive = time.Time{}
			case inactive.IsZero():
				inactive = time.Now()
			}
			if !inactive.IsZero() && time.Since(inactive) >= endedAfter {
				return ended(state)
			}
		}
		if time.Since(last) >= w.Patience {
			return fmt.Errorf("%w: nothing has changed for %s while %s", ErrStuck, w.Patience, p)
		}
		if err := Sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
}

func ended(state ServiceState) error {
	if state.Code == 0 {
		return ErrEnded
	}
	err := fmt.Errorf("%w: exit code %d", ErrEnded, state.Code)
	if state.Code == errorkind.ExitUsage || state.Code == errorkind.ExitConfig {
		return errorkind.Permanent(err)
	}
	return err
}

// look returns what is waited for, and facts of which a new one is progress: facts that come again and again, such as
// those of a kedge that crashes at every start, are none. done means that the node is Ready and all components are ready, of
// which some may report problems.
func (w Waiter) look(ctx context.Context) (p Progress, facts []string, done bool, problems []lifecycle.Status) {
	r, err := w.Report(ctx)
	if err != nil || r.PID == w.Before {
		return Progress{}, []string{"start"}, false, nil
	}
	p.Total = len(r.Components)
	var first *lifecycle.Status
	done = true
	for i := range r.Components {
		c := &r.Components[i]
		if c.Name == w.Besides {
			p.Total--
			continue
		}
		fact := c.Name + " " + string(c.State)
		if c.State == lifecycle.Ready && c.Error == "" {
			p.Ready++
		} else {
			done = done && c.State == lifecycle.Ready
			problems = append(problems, *c)
			// What waits for others is not what is waited for.
			if first == nil || first.State == lifecycle.Waiting && c.State != lifecycle.Waiting {
				first = c
			}
			fact += " not ready"
		}
		facts = append(facts, fact)
	}
	if first != nil {
		p.Component, p.Detail = first.Name, first.Error
		if p.Detail == "" && first.State != lifecycle.Ready {
			p.Detail = first.Detail
		}
	}
	if !done || w.Node == nil {
		return p, facts, done, problems
	}
	ready, why, err := w.Node(ctx, r.Node)
	if err == nil && ready {
		return p, facts, true, problems
	}
	if err != nil {
		why = err.Error()
	}
	if first == nil {
		p = Progress{Component: "node " + r.Node + " to become Ready", Detail: strings.TrimSpace(why)}
	}
	return p, append(facts, "node "+why), false, problems
}

// Sleep waits, and returns the cause if ctx ends before.
func Sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
