package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"kedge/internal/errorkind"
	"kedge/settings"
	"kedge/throwaway"
)

// throwawayNodeCommands returns the subcommands of "kedge node" for throwaway clusters.
func (p *Program) throwawayNodeCommands() []*cli.Command {
	return []*cli.Command{
		p.addNodeCommand(),
		onNode(cli.Command{Name: "rm", Usage: "Remove a node from a throwaway cluster"},
			func(c *call, cluster *throwaway.Cluster, name string) error { return cluster.RemoveNode(c.ctx, name) }),
		onNode(cli.Command{
			Name: "stop", Usage: "Switch off the machine of a node of a throwaway cluster",
			Description: "All its processes end at once, as in a power failure. Its disk is kept.",
		}, func(_ *call, cluster *throwaway.Cluster, name string) error { return cluster.StopNode(name) }),
		onNode(cli.Command{Name: "start", Usage: "Switch on the machine of a node of a throwaway cluster, and wait until the node is Ready"},
			func(c *call, cluster *throwaway.Cluster, name string) error {
				ctx, stop := c.waitContext()
				defer stop()
				return cluster.StartNode(ctx, name)
			}, waitLimit.Row()),
		leaf(cli.Command{
			Name:      "shell",
			Usage:     "Run a shell, or the command after --, on the machine of a node of a throwaway cluster",
			ArgsUsage: "NODE [-- COMMAND ARGUMENTS]",
		}, rowsOf(clusterName, clusters), shellOnNode),
	}
}

func (p *Program) addNodeCommand() *cli.Command {
	role := settings.Text(settings.Setting{Name: "role", Category: settings.Throwaway, Default: string(throwaway.Agent), NoVar: true, Help: "`ROLE` of the node: agent or server"})
	return leaf(cli.Command{Name: "add", Usage: "Add a node to a throwaway cluster"}, rowsOf(role, waitLimit, clusterName, clusters), func(c *call) error {
		r := throwaway.Role(role.In(c.values))
		if r != throwaway.Agent && r != throwaway.Server {
			return errorkind.BadUsage(errorkind.BadSetting(role.Name, " %q is neither agent nor server", r))
		}
		return c.withCluster(func(cluster *throwaway.Cluster) error {
			program, err := p.executable()
			if err != nil {
				return err
			}
			ctx, stop := c.waitContext()
			defer stop()
			name, err := cluster.AddNode(ctx, throwaway.Config{Program: program, Version: p.Version}, r, func(text string) { fmt.Fprintln(c.errOut, "kedge:", text) })
			if err == nil {
				fmt.Fprintln(c.out, name)
			}
			return err
		})
	})
}

func shellOnNode(c *call) error {
	if len(c.args) == 0 {
		return badUsage("give the name of a node; \"kedge ls\" shows them")
	}
	return c.withCluster(func(cluster *throwaway.Cluster) error {
		m, err := cluster.Node(c.args[0])
		if err != nil {
			return err
		}
		command := c.args[1:]
		if len(command) > 0 && command[0] == "--" {
			command = command[1:]
		}
		if len(command) == 0 {
			command = []string{"/bin/sh"}
		}
		// Signals of the terminal are for the command, which has the same terminal.
		signal.Ignore(syscall.SIGINT, syscall.SIGQUIT)
		cmd := m.Command(c.ctx, command...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, c.out, c.errOut
		if term := os.Getenv("TERM"); term != "" {
			cmd.Env = append(cmd.Env, "TERM="+term)
		}
		if err := m.Start(cmd); err != nil {
			return err
		}
		err = cmd.Wait()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Exited() {
			return exitCode(exit.ExitCode())
		}
		return err
	})
}

// waitContext returns a context with the time limit of --wait, which signals cancel.
func (c *call) waitContext() (context.Context, func()) {
	wait := waitLimit.In(c.values)
	ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM)
	ctx, cancel := context.WithTimeoutCause(ctx, wait, fmt.Errorf("not ready within %s", wait))
	return ctx, func() { cancel(); stop() }
}

// onNode returns a command about one node of a throwaway cluster.
func onNode(cmd cli.Command, do func(c *call, cluster *throwaway.Cluster, name string) error, more ...*settings.Setting) *cli.Command {
	cmd.ArgsUsage = "NODE"
	return leaf(cmd, append(more, rowsOf(clusterName, clusters)...), func(c *call) error {
		if len(c.args) != 1 {
			return badUsage("give the name of one node; \"kedge ls\" shows them")
		}
		return c.withCluster(func(cluster *throwaway.Cluster) error { return do(c, cluster, c.args[0]) })
	})
}

// loadCommand is the subcommand of "kedge images" for throwaway clusters.
func loadCommand() *cli.Command {
	return leaf(cli.Command{
		Name:      "load",
		Usage:     "Import archives on every present and future node of a throwaway cluster",
		ArgsUsage: "ARCHIVE...",
	}, rowsOf(clusterName, clusters), func(c *call) error {
		if len(c.args) == 0 {
			return badUsage("images load: give at least one archive")
		}
		return c.withCluster(func(cluster *throwaway.Cluster) error { return cluster.LoadImages(c.ctx, c.args) })
	})
}
