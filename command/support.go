package command

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/urfave/cli/v2"

	"kedge/appliance/remote"
	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/settings"
)

var bundleFile = settings.Text(settings.Setting{Name: "output", Short: "o", NoVar: true, NoKey: true,
	Help: "`FILE` to write, which must not exist (default: kedge-support-HOST-TIME.tar.zst in the current folder)"})

var bundleAll = settings.Switch(settings.Setting{Name: "all", NoVar: true, NoKey: true,
	Help: "Collect the state of all nodes of the cluster, each in a file in the file; on a server"})

func (p *Program) supportCommand() *cli.Command {
	return leaf(cli.Command{
		Name:  "support-bundle",
		Usage: "Collect the state of this machine, its node and its cluster in one file, without secrets, for somebody who helps",
		Description: "The file has the status, the report of \"kedge doctor\", versions, settings, logs, objects without the data of Secrets and\n" +
			"ConfigMaps, events, and the state of the kernel. It works while kedge runs and when kedge does not start. Give it the\n" +
			"flags of the node. Secrets are left out, and names of your objects, images and machines are not: look at the file\n" +
			"(tar --zstd -xf FILE) before you pass it on.",
	}, append(nodeRows(), bundleFile.Row(), bundleAll.Row()), func(c *call) error {
		if err := needRoot("collect the state of a node"); err != nil {
			return err
		}
		n, err := p.node(c)
		if err != nil {
			return err
		}
		return p.writeBundle(c, n)
	})
}

func (p *Program) writeBundle(c *call, n Node) error {
	path := bundleFile.In(c.values)
	if path == "" {
		host, err := os.Hostname()
		if err != nil {
			return err
		}
		path = fmt.Sprintf("kedge-support-%s-%s.tar.zst", host, time.Now().UTC().Format("20060102-150405"))
	}
	// The file is for its owner only: it may say more about a cluster than every user of the machine may know.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		if os.IsExist(err) {
			return errorkind.Permanent(fmt.Errorf("%s exists; remove it, or name another file with --output", path))
		}
		return err
	}
	write := p.writeState
	if bundleAll.In(c.values) {
		write = p.writeStates
	}
	missing, files, err := write(c, n, f)
	st, statErr := f.Stat()
	for _, e := range []error{statErr, f.Close()} {
		if err == nil {
			err = e
		}
	}
	if err != nil {
		os.Remove(path)
		return err
	}
	for _, m := range missing {
		fmt.Fprintf(c.out, "not in it: %s\n", strings.Join(strings.Fields(m), " "))
	}
	fmt.Fprintf(c.out, "wrote %s: %d files, %d KiB\n", path, files, st.Size()>>10)
	return nil
}

// writeState writes the state of this machine. missing says what is not in it, and why.
func (p *Program) writeState(c *call, n Node, w io.Writer) (missing []string, files int, err error) {
	var version bytes.Buffer
	p.printVersion(&version)
	summary, err := p.SupportBundle(c.ctx, n, version.String(), w)
	return summary.Missing, len(summary.Files), err
}

// writeStates writes the states of all nodes of the cluster, as NODE.tar.zst in an archive.
func (p *Program) writeStates(c *call, n Node, w io.Writer) (missing []string, files int, err error) {
	in, _, err := c.nodeHere()
	if err != nil {
		return nil, 0, err
	}
	r, err := control.GetReport(c.ctx, in.RunDir)
	if err != nil {
		return nil, 0, err
	}
	targets, bare, err := c.clusterNodes(c.ctx, in)
	if err != nil {
		return nil, 0, err
	}
	for _, name := range bare {
		missing = append(missing, "server "+name+", which has no node and no tunnel: run the command there")
	}
	compressed, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return nil, 0, err
	}
	archive := tar.NewWriter(compressed)
	for _, t := range targets {
		client := remote.Client{Dial: func(ctx context.Context) (net.Conn, error) {
			return control.Connect(ctx, in.RunDir, control.ConnectNodePath, url.Values{"name": {t.Name}})
		}}
		var state bytes.Buffer
		var lacks []string
		if t.Name == r.Node {
			lacks, _, err = p.writeState(c, n, &state)
		} else {
			err = client.SupportBundle(c.ctx, &state)
		}
		if err != nil {
			missing = append(missing, fmt.Sprintf("node %s: %v", t.Name, err))
			continue
		}
		for _, l := range lacks {
			missing = append(missing, "node "+t.Name+": "+l)
		}
		err = archive.WriteHeader(&tar.Header{Name: t.Name + ".tar.zst", Mode: 0o600, Size: int64(state.Len()), ModTime: time.Now()})
		if err == nil {
			_, err = state.WriteTo(archive)
		}
		if err != nil {
			return missing, files, err
		}
		files++
	}
	return missing, files, errors.Join(archive.Close(), compressed.Close())
}
