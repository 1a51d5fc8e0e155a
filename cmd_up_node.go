package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/urfave/cli/v2"

	"kedge/internal/throwaway"
)

// throwawayNodeCommands are those of "kedge node" that are about throwaway clusters.
func throwawayNodeCommands() []*cli.Command {
	flags := []cli.Flag{clusterNameFlag(), rootFlag()}
	role := &cli.StringFlag{Name: "role", Category: catCluster, Value: string(throwaway.Agent), Usage: "`ROLE` of the node: agent or server"}
	return []*cli.Command{{
		Name:  "add",
		Usage: "Add a node to a throwaway cluster",
		Flags: append([]cli.Flag{role, waitFlag()}, flags...),
		Action: func(c *cli.Context) error {
			r := throwaway.Role(c.String("role"))
			if c.Args().Present() || r != throwaway.Agent && r != throwaway.Server {
				return errors.New("\"kedge node add\" takes flags only, and its --role is agent or server")
			}
			return withCluster(c, func(cluster *throwaway.Cluster) error {
				p := &flagParser{c: c}
				cfg := throwaway.Config{Program: ownExecutable(p), Version: version}
				if p.err() != nil {
					return p.err()
				}
				ctx, stop := patience(c)
				defer stop()
				name, err := cluster.AddNode(ctx, cfg, r, func(text string) { fmt.Fprintln(c.App.ErrWriter, "kedge:", text) })
				if err == nil {
					fmt.Fprintln(c.App.Writer, name)
				}
				return err
			})
		},
	}, {
		Name:      "rm",
		Usage:     "Remove a node from a throwaway cluster",
		ArgsUsage: "NODE",
		Flags:     flags,
		Action: func(c *cli.Context) error {
			return withNode(c, func(cluster *throwaway.Cluster, name string) error { return cluster.RemoveNode(c.Context, name) })
		},
	}, {
		Name:        "stop",
		Usage:       "Switch off the machine of a node of a throwaway cluster",
		ArgsUsage:   "NODE",
		Description: "Everything on it ends at once, as when its plug is pulled. Its disk stays.",
		Flags:       flags,
		Action: func(c *cli.Context) error {
			return withNode(c, func(cluster *throwaway.Cluster, name string) error { return cluster.StopNode(name) })
		},
	}, {
		Name:      "start",
		Usage:     "Switch on the machine of a node of a throwaway cluster, and wait until the node is Ready",
		ArgsUsage: "NODE",
		Flags:     append([]cli.Flag{waitFlag()}, flags...),
		Action: func(c *cli.Context) error {
			return withNode(c, func(cluster *throwaway.Cluster, name string) error {
				ctx, stop := patience(c)
				defer stop()
				return cluster.StartNode(ctx, name)
			})
		},
	}, {
		Name:      "shell",
		Usage:     "Run a shell, or the command after --, on the machine of a node of a throwaway cluster",
		ArgsUsage: "NODE [-- COMMAND ARGUMENTS]",
		Flags:     flags,
		Action: func(c *cli.Context) error {
			if !c.Args().Present() {
				return errors.New("name a node; \"kedge ls\" shows them")
			}
			return withCluster(c, func(cluster *throwaway.Cluster) error {
				m, err := cluster.Node(c.Args().First())
				if err != nil {
					return err
				}
				command := c.Args().Tail()
				if len(command) > 0 && command[0] == "--" {
					command = command[1:]
				}
				if len(command) == 0 {
					command = []string{"/bin/sh"}
				}
				// A signal of the terminal is the command's: it has the same terminal.
				signal.Ignore(syscall.SIGINT, syscall.SIGQUIT)
				cmd := m.Command(c.Context, command...)
				cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, c.App.Writer, c.App.ErrWriter
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
		},
	}}
}

// patience is a context for what --wait limits, and that signals end.
func patience(c *cli.Context) (context.Context, func()) {
	ctx, stop := signal.NotifyContext(c.Context, syscall.SIGINT, syscall.SIGTERM)
	ctx, cancel := context.WithTimeoutCause(ctx, c.Duration("wait"), fmt.Errorf("not ready within %s", c.Duration("wait")))
	return ctx, func() { cancel(); stop() }
}

func withNode(c *cli.Context, f func(cluster *throwaway.Cluster, name string) error) error {
	if c.NArg() != 1 {
		return errors.New("name one node; \"kedge ls\" shows them")
	}
	return withCluster(c, func(cluster *throwaway.Cluster) error { return f(cluster, c.Args().First()) })
}

// loadCommand is the one of "kedge images" that is about throwaway clusters.
func loadCommand() *cli.Command {
	return &cli.Command{
		Name:      "load",
		Usage:     "Import archives on every node of a throwaway cluster, and on those that come",
		ArgsUsage: "ARCHIVE...",
		Flags:     []cli.Flag{clusterNameFlag(), rootFlag()},
		Action: func(c *cli.Context) error {
			if !c.Args().Present() {
				return errors.New("images load: name at least one archive")
			}
			return withCluster(c, func(cluster *throwaway.Cluster) error { return cluster.LoadImages(c.Context, c.Args().Slice()) })
		},
	}
}
