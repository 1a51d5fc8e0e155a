package command

import (
	"fmt"
	"io"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/network/trace"
	"kedge/settings"
)

func (p *Program) netCommand() *cli.Command {
	return &cli.Command{
		Name:        "net",
		Usage:       "Inspect the node's network",
		Action:      subcommandsOnly,
		Subcommands: []*cli.Command{netTraceCommand()},
	}
}

func netTraceCommand() *cli.Command {
	namespace := settings.Text(settings.Setting{Name: "namespace", Short: "n", Default: "default", NoVar: true, Help: "`NAMESPACE` of names without one"})
	protocol := settings.Text(settings.Setting{Name: "protocol", NoVar: true, Help: "`PROTOCOL`: tcp, udp or sctp (default: the service's, or tcp)"})
	format := output("text", "json")
	return leaf(cli.Command{
		Name:      "trace",
		Usage:     "Show which rules a connection passes, what they do and why",
		ArgsUsage: "[from POD|ADDRESS|node] [to] SERVICE|POD|ADDRESS[:PORT]",
		Description: "Follows a hypothetical connection through the rules in the kernel, and reports where they\n" +
			"differ from the expected rules. No packet is sent. Without \"from\" the node itself connects.\n" +
			"Services and pods are named [service/|pod/][NAMESPACE/]NAME.",
	}, rowsOf(settings.RunDir, namespace, protocol, format), func(c *call) error {
		q, err := trace.ParseArgs(c.args)
		if err != nil {
			return errorkind.BadUsage(err)
		}
		q.Namespace, q.Protocol = namespace.In(c.values), protocol.In(c.values)
		var a trace.Answer
		if err := control.Get(c.ctx, settings.RunDir.In(c.values), control.TracePath, q.Values(), &a); err != nil {
			return err
		}
		if format.In(c.values) == "json" {
			return c.printJSON(a)
		}
		printTrace(c.out, a)
		return nil
	})
}

func printTrace(w io.Writer, a trace.Answer) {
	fmt.Fprintf(w, "from %s\nto   %s\n\n", a.From, a.To)
	for i, s := range a.Steps {
		fmt.Fprintf(w, "%d. table %s", i+1, s.Table)
		if s.Chain != "" { // a step may be about a whole table
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
