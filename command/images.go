package command

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"

	"kedge/internal/atomicfile"
	"kedge/internal/control"
	"kedge/settings"
)

// socket returns the path of containerd's socket for a kedge with this run directory.
func (p *Program) socket(c *call) string {
	dir := settings.RunDir.In(c.values)
	// gRPC would take the first part of a relative path for a host name.
	if abs, err := filepath.Abs(dir); err == nil {
		dir = abs
	}
	return p.Containers.Socket(dir)
}

// containerd returns the path of containerd's socket, or an error if containerd does not accept connections.
// Its client would return an error of gRPC after ten seconds.
func (p *Program) containerd(c *call) (socket string, err error) {
	socket = p.socket(c)
	conn, err := (&net.Dialer{}).DialContext(c.ctx, "unix", socket)
	if err == nil {
		return socket, conn.Close()
	}
	if _, notRunning := control.GetReport(c.ctx, settings.RunDir.In(c.values)); notRunning != nil {
		return "", notRunning
	}
	return "", fmt.Errorf("containerd is not ready: %w; see \"kedge status\"", err)
}

func (p *Program) imagesCommand() *cli.Command {
	type action = func(context.Context, string, io.Writer, []string) error
	on := func(name, args, usage, what string, do action) *cli.Command {
		return leaf(cli.Command{Name: name, ArgsUsage: args, Usage: usage}, rowsOf(settings.RunDir), func(c *call) error {
			socket, err := p.containerd(c)
			if err != nil {
				return err
			}
			if len(c.args) == 0 {
				return badUsage("images %s: give at least one %s", name, what)
			}
			return do(c.ctx, socket, c.out, c.args)
		})
	}
	return &cli.Command{
		Name:   "images",
		Usage:  "Import, export, list, remove or pull images",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			on("import", "FILE...", "Import archives (Docker or OCI; tar, tar.gz, tar.zst)", "archive", p.Containers.Import),
			p.exportCommand(),
			leaf(cli.Command{Name: "ls", Usage: "List images"}, rowsOf(settings.RunDir), func(c *call) error {
				socket, err := p.containerd(c)
				if err != nil {
					return err
				}
				return p.Containers.List(c.ctx, socket, c.out)
			}),
			on("rm", "IMAGE...", "Remove images", "image", p.Containers.Remove),
			loadCommand(),
			on("pull", "IMAGE...", "Pull images from their registries", "image", p.Containers.Pull),
		},
	}
}

func (p *Program) exportCommand() *cli.Command {
	file := settings.Text(settings.Setting{Name: "output", Short: "o", NoVar: true, Help: "`FILE` to write (default: standard output)"})
	return leaf(cli.Command{Name: "export", ArgsUsage: "IMAGE...", Usage: "Write images to an archive"}, rowsOf(settings.RunDir, file), func(c *call) error {
		socket, err := p.containerd(c)
		if err != nil {
			return err
		}
		if len(c.args) == 0 {
			return badUsage("images export: name at least one image")
		}
		if to := file.In(c.values); to != "" {
			return writeAtomically(to, func(w io.Writer) error { return p.Containers.Export(c.ctx, socket, w, c.args) })
		}
		return p.Containers.Export(c.ctx, socket, c.out, c.args)
	})
}

// writeAtomically writes a file through a temporary file, so that a failed export leaves no file.
func writeAtomically(path string, write func(io.Writer) error) (err error) {
	if err := atomicfile.Replaceable(path); err != nil {
		return fmt.Errorf("images export: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return fmt.Errorf("images export: %w", err)
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (p *Program) ctrCommand() *cli.Command {
	return &cli.Command{
		Name:            "ctr",
		Usage:           "Run containerd's own client, for debugging",
		ArgsUsage:       "ARGUMENTS",
		SkipFlagParsing: true,
		Action: func(c *cli.Context) error {
			values, err := resolve(rowsOf(settings.RunDir), nil, nil, true)
			if err != nil {
				return err
			}
			return p.Containers.Ctr(c.Context, p.Containers.Socket(settings.RunDir.In(values)), c.Args().Slice())
		},
	}
}
