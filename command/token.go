package command

import (
	"fmt"
	"net/url"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/internal/joining"
	"kedge/server/join"
	"kedge/settings"
)

func (p *Program) tokenCommand() *cli.Command {
	return &cli.Command{
		Name:   "token",
		Usage:  "Create, list and remove tokens for joining the cluster; on a server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			createTokenCommand(),
			leaf(cli.Command{Name: "ls", Usage: "List the tokens, without their secrets"}, rowsOf(settings.RunDir), listTokens),
			nameCommand(cli.Command{Name: "rm", Usage: "Remove a token; machines that have joined with it remain in the cluster", ArgsUsage: "ID"},
				control.RemoveTokenPath, "id", "give the ID of one token; \"kedge token ls\" shows them"),
		},
	}
}

func (p *Program) nodeCommand() *cli.Command {
	const oneNode = "give the name of one node; \"kedge kubectl get nodes\" shows them"
	return &cli.Command{
		Name:   "node",
		Usage:  "Admit and remove nodes of the cluster, on a server; add, stop and remove nodes of a throwaway cluster",
		Action: subcommandsOnly,
		Subcommands: append([]*cli.Command{
			nameCommand(cli.Command{
				Name:  "allow",
				Usage: "Allow another machine to join under the name of a node",
				Description: "A node is identified by its key. A machine with another key is refused under its name until this\n" +
					"command allows the replacement, which makes the old key invalid.",
			}, control.AllowNodePath, "name", oneNode),
			nameCommand(cli.Command{
				Name:  "remove",
				Usage: "Remove an agent from the cluster permanently: its node and its key",
				Description: "Its certificates are refused and its tunnels are closed at once. Another machine can join under\n" +
					"the name, or this machine with an empty data directory and a token.",
			}, control.RemoveNodePath, "name", oneNode),
		}, p.throwawayNodeCommands()...),
	}
}

func createTokenCommand() *cli.Command {
	role := settings.Text(settings.Setting{Name: "role", Default: string(joining.Agent), NoVar: true, Help: "`ROLE` of the machine: agent, server or witness"})
	ttl := settings.Duration(settings.Setting{Name: "ttl", Default: join.DefaultTTL.String(), NoVar: true, Help: "`TIME` for which the token is valid"})
	uses := settings.Number(settings.Setting{Name: "uses", Default: "1", NoVar: true, Help: "`NUMBER` of machines that can join with the token"})
	nodeName := settings.Text(settings.Setting{Name: "node-name", NoVar: true, Help: "`NAME` of the only node that may join with the token (default: any)"})
	return leaf(cli.Command{Name: "create", Usage: "Create a token, and print the command for joining a machine with it"}, rowsOf(settings.RunDir, role, ttl, uses, nodeName), func(c *call) error {
		s := join.Spec{Role: joining.Role(role.In(c.values)), TTL: ttl.In(c.values), Uses: uses.In(c.values), NodeName: nodeName.In(c.values)}
		if err := s.Validate(); err != nil {
			return err
		}
		var made control.CreatedToken
		err := control.Post(c.ctx, settings.RunDir.In(c.values), control.CreateTokenPath, url.Values{
			"role": {string(s.Role)}, "ttl": {s.TTL.String()}, "uses": {strconv.Itoa(s.Uses)}, "node-name": {s.NodeName},
		}, &made)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "%s --server %s --token %s\n", s.Role.Command(), made.Server, made.Token)
		return nil
	})
}

func listTokens(c *call) error {
	var all []join.Listed
	if err := control.Get(c.ctx, settings.RunDir.In(c.values), control.TokensPath, nil, &all); err != nil {
		return err
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tROLE\tEXPIRES\tUSES LEFT\tNODE")
	for _, l := range all {
		node := l.NodeName
		if node == "" {
			node = "any"
		}
		left := time.Until(l.Expires).Round(time.Second)
		expires := "expired"
		if left > 0 {
			expires = "in " + left.String()
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", l.ID, l.Role, expires, l.UsesLeft, node)
	}
	return t.Flush()
}
