package main

import (
	"encoding/json"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/internal/lifecycle"
)

func statusCommand() *cli.Command {
	return &cli.Command{
		Name:  "status",
		Usage: "Show each component of the running kedge: state, since when, what it waited for",
		Flags: []cli.Flag{
			runDirFlag(),
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "table", Usage: "`FORMAT`: table or json"},
		},
		Action: func(c *cli.Context) error {
			format := c.String("output")
			if format != "table" && format != "json" {
				return fmt.Errorf("--output %q is neither table nor json", format)
			}
			r, err := control.Ask(c.Context, c.String("run-dir"))
			if err != nil {
				return err
			}
			if format == "json" {
				e := json.NewEncoder(c.App.Writer)
				e.SetIndent("", "  ")
				err = e.Encode(r)
			} else {
				err = printStatus(c, r)
			}
			if err == nil && !allReady(r) {
				return exitCode(3)
			}
			return err
		},
	}
}

func allReady(r control.Report) bool {
	for _, s := range r.Components {
		if s.State != lifecycle.Ready || s.Error != "" {
			return false
		}
	}
	return true
}

func printStatus(c *cli.Context, r control.Report) error {
	fmt.Fprintf(c.App.Writer, "kedge %s, node %s, process %d, up %s, memory %d MiB (%d MiB anonymous)\n\n",
		r.Version, r.Node, r.PID, time.Since(r.Started).Round(time.Second), r.Memory.Resident>>20, r.Memory.Anonymous>>20)
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "COMPONENT\tSTATE\tFOR\tWAITED FOR\tREADY AFTER\tDETAIL\tPROBLEM")
	for _, s := range r.Components {
		waited := s.WaitedFor
		if waited == "" {
			waited = "-"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", s.Name, s.State, time.Since(s.Since).Round(time.Second), waited, s.Took, s.Detail, s.Error)
	}
	return t.Flush()
}
