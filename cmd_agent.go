package main

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"kedge/internal/joining"
	"kedge/internal/lifecycle"
	"kedge/internal/servers"
)

func agentCommand() *cli.Command {
	flags := agentFlags()
	return &cli.Command{
		Name:  "agent",
		Usage: "Run a node of a cluster whose servers are other machines",
		Description: "At the first start the machine makes a key and joins with a token, which \"kedge token create\"\n" +
			"makes on a server; later starts need none. What is about the cluster as a whole comes from the server:\n" +
			"an agent takes the settings about nodes only.",
		Flags: flags,
		Action: func(c *cli.Context) error {
			if c.Args().Present() {
				return fmt.Errorf("\"kedge agent\" takes flags only, not %q", c.Args().First())
			}
			return configured(c, flags, func() error { return runAgent(c) })
		},
	}
}

// runAgent joins if need be, and runs the node.
func runAgent(c *cli.Context) error {
	p := &flagParser{c: c}
	dataDir := p.dir("data-dir")
	jc := joining.Config{Dir: agentDir(dataDir), Server: c.String("server"), Token: p.token(), NodeName: p.nodeName()}
	if p.err() == nil {
		p.fail(jc.Validate())
	}
	if err := p.err(); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dataDir, "server", "tls")); err == nil {
		return fmt.Errorf("%s is the data directory of a server; start it with \"kedge server\", or choose another with --data-dir", dataDir)
	}
	// What is wrong with the flags must be said before a token is spent.
	s, err := composeAgent(c, usualCluster(), netip.Addr{})
	if err != nil {
		return err
	}
	if err := s.checkArgs(); err != nil {
		return err
	}
	list, err := servers.Load(filepath.Join(jc.Dir, serversFile), jc.Server)
	if err != nil {
		return err
	}
	jc.Servers = list
	var member *joining.Member
	return runNode(c.Context, s, role{
		settle: func(ctx context.Context, _ settings, log *slog.Logger) (settings, error) {
			var err error
			if member, err = joining.Prepare(ctx, jc, component(log, "join")); err != nil {
				return settings{}, err
			}
			return composeAgent(c, member.Cluster(), member.Address())
		},
		wire: func(group *lifecycle.Group, s settings, log *slog.Logger) error {
			return wireAgent(group, s, member, list, log)
		},
		ready: func(settings, *slog.Logger) {},
	})
}
