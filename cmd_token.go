package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/server/join"
)

// Where the running process answers "kedge token" and "kedge node".
const (
	tokensPath      = "/tokens"
	createTokenPath = "/tokens/create"
	removeTokenPath = "/tokens/remove"
	allowNodePath   = "/nodes/allow"
	removeNodePath  = "/nodes/remove"
)

// createdToken is the answer at createTokenPath.
type createdToken struct {
	Token  string `json:"token"` // in full: it is shown this once
	Server string `json:"server"`
}

func tokenCommand() *cli.Command {
	return &cli.Command{
		Name:   "token",
		Usage:  "Make, list and remove the tokens with which machines join; on a server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{{
			Name:  "create",
			Usage: "Make a token, and print the command that joins a machine with it",
			Flags: []cli.Flag{
				runDirFlag(),
				&cli.StringFlag{Name: "role", Value: string(join.Agent), Usage: "`ROLE` of the machine: agent or server"},
				&cli.DurationFlag{Name: "ttl", Value: join.DefaultTTL, Usage: "`TIME` for which it can be used"},
				&cli.IntFlag{Name: "uses", Value: 1, Usage: "`NUMBER` of machines that can join with it"},
				&cli.StringFlag{Name: "node-name", Usage: "Only `NAME` may join with it (default: any)"},
			},
			Action: createToken,
		}, {
			Name:   "ls",
			Usage:  "List the tokens; their secrets nobody knows",
			Flags:  []cli.Flag{runDirFlag()},
			Action: listTokens,
		}, {
			Name:      "rm",
			Usage:     "Remove a token; machines that have joined with it stay",
			ArgsUsage: "ID",
			Flags:     []cli.Flag{runDirFlag()},
			Action: func(c *cli.Context) error {
				if c.NArg() != 1 {
					return errors.New("name one token; \"kedge token ls\" shows them")
				}
				return control.Tell(c.Context, c.String("run-dir"), removeTokenPath, url.Values{"id": {c.Args().First()}}, &struct{}{})
			},
		}},
	}
}

func nodeCommand() *cli.Command {
	return &cli.Command{
		Name:   "node",
		Usage:  "Decide about machines of the cluster, on a server; add, stop and remove those of a throwaway cluster",
		Action: subcommandsOnly,
		Subcommands: append([]*cli.Command{{
			Name:      "allow",
			Usage:     "Let another machine take the name of a node",
			ArgsUsage: "NAME",
			Description: "A node is known by its key. A machine with another key is refused under its name until this\n" +
				"command has said that it replaces the old one, whose key then counts no more.",
			Flags: []cli.Flag{runDirFlag()},
			Action: func(c *cli.Context) error {
				if c.NArg() != 1 {
					return errors.New("name one node; \"kedge kubectl get nodes\" shows them")
				}
				return control.Tell(c.Context, c.String("run-dir"), allowNodePath, url.Values{"name": {c.Args().First()}}, &struct{}{})
			},
		}, {
			Name:      "remove",
			Usage:     "Remove an agent from the cluster for good: its node, and its key",
			ArgsUsage: "NAME",
			Description: "From now on its certificates are refused and its tunnels are closed; another machine can join under\n" +
				"the name, or this one with its data directory emptied and a token.",
			Flags: []cli.Flag{runDirFlag()},
			Action: func(c *cli.Context) error {
				if c.NArg() != 1 {
					return errors.New("name one node; \"kedge kubectl get nodes\" shows them")
				}
				return control.Tell(c.Context, c.String("run-dir"), removeNodePath, url.Values{"name": {c.Args().First()}}, &struct{}{})
			},
		}}, throwawayNodeCommands()...),
	}
}

func createToken(c *cli.Context) error {
	if c.Args().Present() {
		return fmt.Errorf("\"kedge token create\" takes flags only, not %q", c.Args().First())
	}
	s := join.Spec{Role: join.Role(c.String("role")), TTL: c.Duration("ttl"), Uses: c.Int("uses"), NodeName: c.String("node-name")}
	if err := s.Validate(); err != nil {
		return err
	}
	var made createdToken
	err := control.Tell(c.Context, c.String("run-dir"), createTokenPath, url.Values{
		"role": {string(s.Role)}, "ttl": {s.TTL.String()}, "uses": {strconv.Itoa(s.Uses)}, "node-name": {s.NodeName},
	}, &made)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.App.Writer, "kedge %s --server %s --token %s\n", s.Role, made.Server, made.Token)
	return nil
}

func listTokens(c *cli.Context) error {
	var all []join.Listed
	if err := control.Get(c.Context, c.String("run-dir"), tokensPath, nil, &all); err != nil {
		return err
	}
	t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
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

// answerJoin makes a server answer "kedge token" and "kedge node".
func answerJoin(asked *control.Server, joins *join.Service) {
	asked.Answer(tokensPath, func(ctx context.Context, _ url.Values) (any, error) { return joins.Tokens().List(ctx) })
	asked.Obey(createTokenPath, func(ctx context.Context, v url.Values) (any, error) {
		ttl, err := time.ParseDuration(v.Get("ttl"))
		if err != nil {
			return nil, err
		}
		uses, err := strconv.Atoi(v.Get("uses"))
		if err != nil {
			return nil, err
		}
		made, err := joins.Tokens().Create(ctx, joins.CAHash(), join.Spec{Role: join.Role(v.Get("role")), TTL: ttl, Uses: uses, NodeName: v.Get("node-name")})
		if err != nil {
			return nil, err
		}
		return createdToken{Token: made.Reveal(), Server: joins.Cluster().Servers[0]}, nil
	})
	asked.Obey(removeTokenPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, joins.Tokens().Remove(ctx, v.Get("id"))
	})
	asked.Obey(allowNodePath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, joins.Nodes().Allow(ctx, v.Get("name"))
	})
}

// refuseJoin makes an agent say where those commands belong.
func refuseJoin(asked *control.Server) {
	elsewhere := func(context.Context, url.Values) (any, error) {
		return nil, errors.New("this machine is an agent; run the command on a server")
	}
	asked.Answer(tokensPath, elsewhere)
	for _, path := range []string{createTokenPath, removeTokenPath, allowNodePath, removeNodePath} {
		asked.Obey(path, elsewhere)
	}
}
