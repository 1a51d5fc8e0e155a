package command

import (
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
	"kedge/settings"
)

// notReady is the exit code of "kedge status" if a component of kedge is not ready.
const notReady = 3

func (p *Program) statusCommand() *cli.Command {
	format := output("table", "json")
	return leaf(cli.Command{Name: "status", Usage: "Show the components of the running kedge: their state, for how long, and what they waited for"},
		rowsOf(settings.RunDir, format), func(c *call) error {
			r, err := control.GetReport(c.ctx, settings.RunDir.In(c.values))
			if err != nil {
				return err
			}
			if format.In(c.values) == "json" {
				err = c.printJSON(r)
			} else {
				err = c.printStatus(r)
			}
			if err == nil && !allReady(r) {
				return exitCode(notReady)
			}
			return err
		})
}

func allReady(r control.Report) bool {
	for _, s := range r.Components {
		if s.State != lifecycle.Ready || s.Error != "" {
			return false
		}
	}
	return true
}

func (c *call) printStatus(r control.Report) error {
	fmt.Fprintf(c.out, "kedge %s, node %s, process %d, up %s, memory %d MiB (%d MiB anonymous)\n\n",
		r.Version, r.Node, r.PID, time.Since(r.Started).Round(time.Second), r.Memory.Resident>>20, r.Memory.Anonymous>>20)
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "COMPONENT\tSTATE\tFOR\tWAITED FOR\tREADY AFTER\tDETAIL\tPROBLEM")
	for _, s := range r.Components {
		waited := s.WaitedFor
		if waited == "" {
			waited = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, s.State, time.Since(s.Since).Round(time.Second), waited, s.Took, detail(s), s.Error)
	}
	return t.Flush()
}

// detail returns the details that a component reports, and the number of its restarts.
func detail(s lifecycle.Status) string {
	if s.Restarts == 0 {
		return s.Detail
	}
	times := fmt.Sprintf("restarted %d times", s.Restarts)
	if s.Restarts == 1 {
		times = "restarted once"
	}
	restarted := fmt.Sprintf("%s, last %s ago", times, time.Since(s.FailedAt).Round(time.Second))
	if s.Error != s.LastError { // it is in the next column
		restarted += ": " + s.LastError
	}
	if s.Detail == "" {
		return restarted
	}
	return s.Detail + "; " + restarted
}
