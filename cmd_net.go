package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/url"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/network/explain"
)

func netCommand() *cli.Command {
	return &cli.Command{
		Name:        "net",
		Usage:       "Look at the node's network",
		Action:      subcommandsOnly,
		Subcommands: []*cli.Command{netTraceCommand()},
	}
}

// tracePath is where the running process answers "kedge net trace".
const tracePath = "/net/trace"

func netTraceCommand() *cli.Command {
	return &cli.Command{
		Name:      "trace",
		Usage:     "Show which rules a connection passes, what they do and why",
		ArgsUsage: "[from POD|ADDRESS|node] [to] SERVICE|POD|ADDRESS[:PORT]",
		Description: "Follows an imagined connection through the rules that are in the kernel, and says where they\n" +
			"differ from what they should be. No packet is sent. Without \"from\" the node itself connects.\n" +
			"Services and pods are named [service/|pod/][NAMESPACE/]NAME.",
		Flags: []cli.Flag{
			runDirFlag(),
			&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Value: "default", Usage: "`NAMESPACE` of names without one"},
			&cli.StringFlag{Name: "protocol", Usage: "`PROTOCOL`: tcp, udp or sctp (default: the service's, or tcp)"},
			&cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`FORMAT`: text or json"},
		},
		Action: func(c *cli.Context) error {
			format := c.String("output")
			if format != "text" && format != "json" {
				return fmt.Errorf("--output %q is neither text nor json", format)
			}
			q, err := explain.ParseArgs(c.Args().Slice())
			if err != nil {
				return err
			}
			q.Namespace, q.Protocol = c.String("namespace"), c.String("protocol")
			var a explain.Answer
			if err := control.Get(c.Context, c.String("run-dir"), tracePath, q.Values(), &a); err != nil {
				return err
			}
			if format == "json" {
				e := json.NewEncoder(c.App.Writer)
				e.SetIndent("", "  ")
				return e.Encode(a)
			}
			printTrace(c.App.Writer, a)
			return nil
		},
	}
}

func printTrace(w io.Writer, a explain.Answer) {
	fmt.Fprintf(w, "from %s\nto   %s\n\n", a.From, a.To)
	for i, s := range a.Steps {
		fmt.Fprintf(w, "%d. table %s", i+1, s.Table)
		if s.Chain != "" { // a step may be about a table as a whole
			fmt.Fprintf(w, ", chain %s: %q", s.Chain, s.Rule)
		}
		fmt.Fprintln(w)
		if s.Element != "" {
			fmt.Fprintf(w, "   %s\n", s.Element)
		}
		fmt.Fprintf(w, "   %s\n", s.Effect)
		if s.Problem != "" {
			fmt.Fprintf(w, "   PROBLEM: %s\n", s.Problem)
		}
	}
	fmt.Fprintf(w, "\n%s\n", a.Result)
}

// answerTrace makes the process answer "kedge net trace".
func answerTrace(s *control.Server, e *explain.Explainer) {
	s.Answer(tracePath, func(ctx context.Context, v url.Values) (any, error) {
		return e.Explain(ctx, explain.FromValues(v))
	})
}
