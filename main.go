// Kedge is Kubernetes in one file: this executable is the server, the node, the
// command line client and the network plug-in, by the name that it is called by.
//
// Package main only wires: flags and files become configurations, configurations
// become components, components become a group. It imports everything and nothing
// imports it.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"kedge/internal/interspersed"
	"kedge/internal/machines/keeper"
	"kedge/network/cniclient"
)

func main() { os.Exit(run(context.Background(), os.Args, os.Stdout, os.Stderr)) }

// run is the program without its global state: it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	switch filepath.Base(args[0]) {
	case "kubectl":
		return kubectl(args[1:])
	case "kedge-cni":
		return cniclient.Main()
	}
	if code, was := keeper.Main(args); was {
		return code
	}
	app := newApp(stdout, stderr)
	if completeFlag(app, args) {
		return 0
	}
	err := app.RunContext(ctx, interspersed.Reorder(app, args))
	if err == nil {
		return 0
	}
	var code exitCode
	if errors.As(err, &code) { // the command has said what there is to say
		return int(code)
	}
	fmt.Fprintln(stderr, "kedge:", err)
	return 1
}

// exitCode is the error of a command that has already told what was wrong.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("exit code %d", int(c)) }

// newApp is the command line.
func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:                      "kedge",
		Usage:                     "Kubernetes in one file",
		Version:                   version,
		Writer:                    stdout,
		ErrWriter:                 stderr,
		HideVersion:               true, // it is a command
		UseShortOptionHandling:    true,
		DisableSliceFlagSeparator: true, // values of upstream flags contain commas; see splitList
		EnableBashCompletion:      true,
		ExitErrHandler:            func(*cli.Context, error) {}, // run decides
		Commands: []*cli.Command{
			serverCommand(),
			agentCommand(),
			upCommand(),
			downCommand(),
			lsCommand(),
			logsCommand(),
			tokenCommand(),
			nodeCommand(),
			statusCommand(),
			netCommand(),
			checkCommand(),
			imagesCommand(),
			killallCommand(),
			kubectlCommand(),
			ctrCommand(),
			versionCommand(),
			completionCommand(),
			referenceCommand(),
		},
	}
	app.Action = func(c *cli.Context) error {
		if c.Args().Present() {
			return unknownCommand("", c.Args().First(), app.Commands)
		}
		return cli.ShowAppHelp(c)
	}
	app.OnUsageError = usageError
	for _, cmd := range app.Commands {
		cmd.OnUsageError = usageError
		for _, sub := range cmd.Subcommands {
			sub.OnUsageError = usageError
		}
	}
	return app
}
