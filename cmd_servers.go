package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/server"
)

// Where the running process answers "kedge server ls" and "kedge server remove".
const (
	serversPath      = "/servers"
	removeServerPath = "/servers/remove"
)

// listedServer is a server as "kedge server ls" shows it.
type listedServer struct {
	Name      string    `json:"name"`
	Addresses []string  `json:"addresses"`
	Role      string    `json:"role"`
	Reachable bool      `json:"reachable"`
	LastSeen  time.Time `json:"lastSeen,omitzero"`
}

func serverSubcommands() []*cli.Command {
	return []*cli.Command{{
		Name:  "ls",
		Usage: "List the servers of the cluster; on one of them",
		Flags: []cli.Flag{runDirFlag()},
		Action: func(c *cli.Context) error {
			var all []listedServer
			if err := control.Get(c.Context, c.String("run-dir"), serversPath, nil, &all); err != nil {
				return err
			}
			t := tabwriter.NewWriter(c.App.Writer, 0, 0, 2, ' ', 0)
			fmt.Fprintln(t, "NAME\tROLE\tSTATE\tADDRESSES")
			for _, s := range all {
				fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", s.Name, s.Role, s.state(), strings.Join(s.Addresses, ","))
			}
			return t.Flush()
		},
	}, {
		Name:      "remove",
		Usage:     "Remove a server from the cluster, with its node; on any server",
		ArgsUsage: "NAME",
		Description: "The servers that remain must be able to decide: of those, more than half have to answer. A machine\n" +
			"that is removed stops, and can join again with a token once its name is free.",
		Flags: []cli.Flag{runDirFlag()},
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return errors.New("name one server; \"kedge server ls\" shows them")
			}
			return control.Tell(c.Context, c.String("run-dir"), removeServerPath, url.Values{"name": {c.Args().First()}}, &struct{}{})
		},
	}}
}

func (s listedServer) state() string {
	switch {
	case s.Reachable:
		return "reachable"
	case s.LastSeen.IsZero():
		return "not seen"
	}
	return "last seen " + time.Since(s.LastSeen).Round(time.Second).String() + " ago"
}

// answerServers makes a server answer those commands, and "kedge node remove".
func answerServers(asked *control.Server, servers *server.Servers) {
	asked.Answer(serversPath, func(ctx context.Context, _ url.Values) (any, error) {
		members, err := servers.Members(ctx)
		if err != nil {
			return nil, err
		}
		all := []listedServer{}
		for _, m := range members {
			l := listedServer{Name: m.Name, Role: "follower", Reachable: m.Reachable, LastSeen: m.LastSeen}
			switch {
			case m.Leader:
				l.Role = "leader"
			case m.Learner:
				l.Role = "learner"
			}
			for _, a := range m.Addresses {
				l.Addresses = append(l.Addresses, a.String())
			}
			all = append(all, l)
		}
		return all, nil
	})
	asked.Obey(removeNodePath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, servers.RemoveNode(ctx, v.Get("name"))
	})
	asked.Obey(removeServerPath, func(ctx context.Context, v url.Values) (any, error) {
		return struct{}{}, servers.Remove(ctx, v.Get("name"))
	})
}
