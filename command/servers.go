package command

import (
	"fmt"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/settings"
)

func (p *Program) serverSubcommands() []*cli.Command {
	return []*cli.Command{
		p.resetServerCommand(),
		leaf(cli.Command{Name: "ls", Usage: "List the servers of the cluster; on any server"}, rowsOf(settings.RunDir), func(c *call) error {
			var all []control.ListedServer
			if err := control.Get(c.ctx, settings.RunDir.In(c.values), control.ServersPath, nil, &all); err != nil {
				return err
			}
			t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tROLE\tSTATE\tADDRESSES")
			for _, s := range all {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.Name, s.Role, stateOf(s), strings.Join(s.Addresses, ","))
			}
			return t.Flush()
		}),
		nameCommand(cli.Command{
			Name:  "remove",
			Usage: "Remove a server from the cluster, with its node; on any server",
			Description: "A majority of the remaining servers must be running. The removed machine\n" +
				"stops, and can join again with a token once its name is free.",
		}, control.RemoveServerPath, "name", "give the name of one server; \"kedge server ls\" shows them"),
	}
}

func (p *Program) resetServerCommand() *cli.Command {
	return leaf(cli.Command{
		Name: "reset", Usage: "Set the datastore of this stopped server aside, so that it joins its cluster anew",
		Description: "For the other servers after \"kedge snapshot restore\" or \"kedge recover\" on one, and for a server whose\n" +
			"datastore is damaged while the others work. The next start needs --server and --token of a server of the cluster.",
	}, nodeRows(), func(c *call) error {
		if err := needRoot("reset a server"); err != nil {
			return err
		}
		kept, err := p.ResetServer(Node{Values: c.values})
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "the datastore is kept in %s; start kedge with --server and a token of \"kedge token create --role server\"\n", kept)
		return nil
	})
}

// stateOf returns a description of when a server was last seen.
func stateOf(s control.ListedServer) string {
	switch {
	case s.Reachable:
		return "reachable"
	case s.LastSeen.IsZero():
		return "not seen"
	}
	return "last seen " + time.Since(s.LastSeen).Round(time.Second).String() + " ago"
}

// nameCommand returns a command that sends one name to the running process, as the value of key at path. usage is
// the error if there is not exactly one argument.
func nameCommand(cmd cli.Command, path, key, usage string) *cli.Command {
	if cmd.ArgsUsage == "" {
		cmd.ArgsUsage = "NAME"
	}
	return leaf(cmd, rowsOf(settings.RunDir), func(c *call) error {
		if len(c.args) != 1 {
			return badUsage("%s", usage)
		}
		return control.Post(c.ctx, settings.RunDir.In(c.values), path, url.Values{key: {c.args[0]}}, &struct{}{})
	})
}
