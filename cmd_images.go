package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/runtime"
	"kedge/runtime/ctr"
)

// socketOf is where the containerd of the kedge with this run directory listens.
func socketOf(c *cli.Context) string {
	cfg := runtime.DefaultConfig()
	cfg.RunDir = c.String("run-dir")
	return cfg.Socket()
}

// runtimeAnswers returns nil, or why there is no containerd to ask. Its client would
// find out in ten seconds and say so in the words of gRPC.
func runtimeAnswers(c *cli.Context) error {
	conn, err := (&net.Dialer{}).DialContext(c.Context, "unix", socketOf(c))
	if err == nil {
		return conn.Close()
	}
	if _, notRunning := control.Ask(c.Context, c.String("run-dir")); notRunning != nil {
		return notRunning
	}
	return fmt.Errorf("containerd is not ready: %w; see \"kedge status\"", err)
}

func imagesCommand() *cli.Command {
	sub := func(name, args, usage string, run func(c *cli.Context, socket string, args []string) error) *cli.Command {
		return &cli.Command{
			Name: name, ArgsUsage: args, Usage: usage, Flags: []cli.Flag{runDirFlag()}, OnUsageError: usageError,
			Action: func(c *cli.Context) error {
				if err := runtimeAnswers(c); err != nil {
					return err
				}
				return run(c, socketOf(c), c.Args().Slice())
			},
		}
	}
	needArgs := func(run func(context.Context, string, io.Writer, []string) error, what string) func(*cli.Context, string, []string) error {
		return func(c *cli.Context, socket string, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("images %s: name at least one %s", c.Command.Name, what)
			}
			return run(c.Context, socket, c.App.Writer, args)
		}
	}
	export := sub("export", "IMAGE...", "Write images to an archive", exportImages)
	export.Flags = append(export.Flags, &cli.StringFlag{Name: "output", Aliases: []string{"o"}, Usage: "`FILE` to write (default: standard output)"})
	return &cli.Command{
		Name:   "images",
		Usage:  "Import, export, list, remove or pull images",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			sub("import", "FILE...", "Import archives (Docker or OCI; tar, tar.gz, tar.zst)", needArgs(runtime.ImportImages, "archive")),
			export,
			sub("ls", "", "List images", func(c *cli.Context, socket string, args []string) error {
				if len(args) > 0 {
					return fmt.Errorf("images ls takes no arguments, not %q", args[0])
				}
				return runtime.ListImages(c.Context, socket, c.App.Writer)
			}),
			sub("rm", "IMAGE...", "Remove images", needArgs(runtime.RemoveImages, "image")),
			loadCommand(),
			sub("pull", "IMAGE...", "Pull images from their registries", needArgs(runtime.PullImages, "image")),
		},
	}
}

// exportImages writes to a temporary file first, so that a failed export never
// looks like an archive.
func exportImages(c *cli.Context, socket string, names []string) (err error) {
	if len(names) == 0 {
		return errors.New("images export: name at least one image")
	}
	to := c.String("output")
	if to == "" {
		return runtime.ExportImages(c.Context, socket, c.App.Writer, names)
	}
	f, err := os.CreateTemp(filepath.Dir(to), "."+filepath.Base(to)+"-*")
	if err != nil {
		return fmt.Errorf("images export: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := runtime.ExportImages(c.Context, socket, f, names); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), to)
}

func ctrCommand() *cli.Command {
	return &cli.Command{
		Name:            "ctr",
		Usage:           "Run containerd's own client, for debugging",
		ArgsUsage:       "ARGUMENTS",
		SkipFlagParsing: true,
		Action: func(c *cli.Context) error {
			cfg := runtime.DefaultConfig()
			if d := os.Getenv(env("run-dir")[0]); d != "" {
				cfg.RunDir = d
			}
			return ctr.Run(c.Context, cfg.Socket(), c.Args().Slice())
		},
	}
}
