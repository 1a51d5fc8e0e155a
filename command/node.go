package command

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"kedge/internal/errorkind"
	"kedge/preflight"
	"kedge/settings"
)

func (p *Program) serverCommand() *cli.Command {
	cmd := leaf(cli.Command{Name: "server", Usage: "Run the control plane and a node"}, settings.For(settings.Server), func(c *call) error {
		if err := needRoot("run a server"); err != nil {
			return err
		}
		n, err := p.node(c)
		if err != nil {
			return err
		}
		return p.Server(c.ctx, n)
	})
	cmd.Subcommands = p.serverSubcommands()
	return cmd
}

func (p *Program) agentCommand() *cli.Command {
	return leaf(cli.Command{
		Name:  "agent",
		Usage: "Run a node of a cluster with servers on other machines",
		Description: "At the first start the machine creates a key and joins with a token, which \"kedge token create\"\n" +
			"prints on a server; later starts need no token. Settings of the whole cluster come from the server:\n" +
			"an agent accepts only the settings of nodes.",
	}, settings.For(settings.Agent), func(c *call) error {
		if err := needRoot("run an agent"); err != nil {
			return err
		}
		n, err := p.node(c)
		if err != nil {
			return err
		}
		return p.Agent(c.ctx, n)
	})
}

func (p *Program) killallCommand() *cli.Command {
	return leaf(cli.Command{
		Name:  "killall",
		Usage: "Kill this node's containers and remove their kernel objects; kedge itself must be stopped",
		Description: "Stopping kedge leaves containers running, so that an upgrade does not touch them.\n" +
			"killall kills them too, and removes their mounts, cgroups, network interfaces and rules.\n" +
			"Images, volumes and the cluster's data stay: the next start starts the pods again.",
	}, settings.For(settings.Server), func(c *call) error {
		if err := needRoot("end containers"); err != nil {
			return err
		}
		n, err := p.node(c)
		if err != nil {
			return err
		}
		return p.KillAll(c.ctx, n)
	})
}

// node returns the input of a command about a whole node.
func (p *Program) node(c *call) (Node, error) {
	n := Node{Values: c.values, Warnings: settings.Unknown(os.Environ(), p.known(c), settings.LauncherVariable, settings.StartedByVariable)}
	var err error
	n.Token, err = readToken(c.values)
	return n, err
}

// known returns the settings of all commands that have an environment variable.
func (p *Program) known(c *call) (rows []*settings.Setting) {
	var collect func([]*cli.Command)
	collect = func(commands []*cli.Command) {
		for _, cmd := range commands {
			collect(cmd.Subcommands)
			for _, f := range cmd.Flags {
				if ours, ok := f.(*settingFlag); ok && !ours.row.NoVar {
					rows = append(rows, ours.row)
				}
			}
		}
	}
	collect(c.cli.App.Commands)
	return rows
}

// readToken returns the text of --token, or of the file given by --token-file.
func readToken(v settings.Values) (string, error) {
	text, file := settings.Token.In(v), settings.TokenFile.In(v)
	switch {
	case file == "":
		return text, nil
	case text != "":
		return "", errorkind.BadSettings(settings.Token.Name, "", settings.TokenFile.Name, " are both given; give one")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", errorkind.BadSetting(settings.TokenFile.Name, ": %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

func (p *Program) checkCommand() *cli.Command {
	format := output("text", "json")
	return leaf(cli.Command{Name: "check", Usage: "Check whether this machine can run kedge, and print remedies; changes nothing"}, append(nodeRows(), format.Row()), func(c *call) error {
		n, err := p.node(c)
		if err != nil {
			return err
		}
		results, found, err := p.Check(c.ctx, n)
		if !found {
			return err
		}
		if os.Geteuid() != 0 { // without root the other checks fail only for lack of permission
			results = slices.DeleteFunc(results, func(r preflight.Result) bool { return r.Check != "privileges" })
		}
		if format.In(c.values) == "json" {
			if err := c.printJSON(results); err != nil {
				return err
			}
		} else {
			c.printChecks(results)
		}
		if err != nil {
			return exitCode(errorkind.ExitFailure)
		}
		return nil
	})
}

func (c *call) printChecks(results []preflight.Result) {
	for _, r := range results {
		fmt.Fprintf(c.out, "%-8s %s: %s", r.Level, r.Check, r.Message)
		if r.Remedy != "" {
			fmt.Fprintf(c.out, "; %s", r.Remedy)
		}
		fmt.Fprintln(c.out)
	}
}

// output returns the setting for the output format of a command, with the default first.
func output(first, second string) settings.Of[string] {
	return settings.Value(settings.Setting{Name: "output", Short: "o", Default: first, NoVar: true, NoKey: true, Help: fmt.Sprintf("`FORMAT`: %s or %s", first, second)},
		func(text string) (string, error) {
			if text != first && text != second {
				return "", fmt.Errorf(" %q is neither %s nor %s", text, first, second)
			}
			return text, nil
		})
}

// printJSON prints v as JSON.
func (c *call) printJSON(v any) error {
	e := json.NewEncoder(c.out)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
