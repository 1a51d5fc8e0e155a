package main

import (
	"encoding/json"
	"fmt"

	"github.com/urfave/cli/v2"

	"kedge/internal/preflight"
)

func checkCommand() *cli.Command {
	flags := short(serverFlags(), "o") // that is --output's
	output := &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Value: "text", Usage: "`FORMAT`: text or json"}
	return &cli.Command{
		Name:  "check",
		Usage: "Name what this machine lacks to run kedge, with the remedy; changes nothing",
		Flags: append(flags, output),
		Action: func(c *cli.Context) error {
			return configured(c, flags, func() error { return check(c) })
		},
	}
}

func check(c *cli.Context) error {
	s, err := composeAny(c)
	if err != nil {
		return err
	}
	if err := s.checkArgs(); err != nil {
		return err
	}
	results, err := preflight.Required(c.Context, s.preflight)
	switch c.String("output") {
	case "json":
		e := json.NewEncoder(c.App.Writer)
		e.SetIndent("", "  ")
		if err := e.Encode(results); err != nil {
			return err
		}
	case "text":
		printChecks(c, results)
	default:
		return fmt.Errorf("--output %q is neither text nor json", c.String("output"))
	}
	if err != nil {
		return exitCode(1)
	}
	return nil
}

func printChecks(c *cli.Context, results []preflight.Result) {
	for _, r := range results {
		fmt.Fprintf(c.App.Writer, "%-8s %s: %s", r.Level, r.Check, r.Message)
		if r.Remedy != "" {
			fmt.Fprintf(c.App.Writer, "; %s", r.Remedy)
		}
		fmt.Fprintln(c.App.Writer)
	}
}
