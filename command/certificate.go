package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/internal/errorkind"
	"kedge/internal/pki"
	"kedge/settings"
)

// badCertificates is the exit code of "kedge certificate check" if there is a problem.
const badCertificates = 3

// Certificates has the functions about the certificates of a node. dataDir is its data directory.
type Certificates struct {
	// List examines them. kubeconfig is the file of the administrator's kubeconfig, which agents do not have.
	List func(dataDir, kubeconfig string) ([]pki.Examined, error)
	// Rotate makes new ones while the node is stopped, and returns their names.
	Rotate func(ctx context.Context, dataDir string, names []string) ([]string, error)
}

func (p *Program) certificateCommand() *cli.Command {
	return &cli.Command{
		Name:   "certificate",
		Usage:  "List, check and renew the certificates of this machine, server or agent",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			p.listCertificatesCommand(),
			p.checkCertificatesCommand(),
			p.rotateCertificatesCommand(),
		},
	}
}

func (p *Program) listCertificatesCommand() *cli.Command {
	format := output("table", "json")
	return leaf(cli.Command{Name: "ls", Usage: "List the certificates: who uses them, who has signed them, and when they end"}, append(nodeRows(), format.Row()), func(c *call) error {
		all, err := p.certificates(c)
		switch {
		case err != nil:
			return err
		case format.In(c.values) == "json":
			return c.printJSON(all)
		}
		return c.printCertificates(all)
	})
}

func (p *Program) checkCertificatesCommand() *cli.Command {
	format := output("table", "json")
	return leaf(cli.Command{
		Name:  "check",
		Usage: "List the certificates that need attention; the exit code is 3 if there are any",
		Description: "A certificate needs attention if it has ended, or should have been renewed long ago, if its file is missing\n" +
			"or damaged, or if it does not fit its key or its authority.",
	}, append(nodeRows(), format.Row()), func(c *call) error {
		all, err := p.certificates(c)
		if err != nil {
			return err
		}
		bad := []pki.Examined{}
		for _, e := range all {
			if e.Problem != "" {
				bad = append(bad, e)
			}
		}
		switch {
		case format.In(c.values) == "json":
			err = c.printJSON(bad)
		case len(bad) == 0:
			_, err = fmt.Fprintf(c.out, "all %d certificates are good\n", len(all))
		default:
			err = c.printCertificates(bad)
		}
		if err == nil && len(bad) > 0 {
			return exitCode(badCertificates)
		}
		return err
	})
}

func (p *Program) certificates(c *call) ([]pki.Examined, error) {
	if err := needRoot("read the certificates and keys"); err != nil {
		return nil, err
	}
	dataDir, kubeconfig, err := absolutePaths(settings.DataDir.In(c.values), settings.Kubeconfig.In(c.values))
	if err != nil {
		return nil, err
	}
	return p.Certificates.List(dataDir, kubeconfig)
}

func absolutePaths(a, b string) (absA, absB string, err error) {
	if absA, err = filepath.Abs(a); err == nil {
		absB, err = filepath.Abs(b)
	}
	return absA, absB, err
}

func (c *call) printCertificates(all []pki.Examined) error {
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tENDS\tPROBLEM\tAUTHORITY\tUSED BY\tFILE\tNAMES")
	for _, e := range all {
		ends, authority := "-", e.Authority
		if !e.Ends.IsZero() {
			ends = e.Ends.Format(time.DateOnly)
		}
		if e.CA {
			authority = "itself"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Name, ends, cmp.Or(e.Problem, "-"), authority, e.UsedBy, e.File, strings.Join(e.Names, ","))
	}
	return t.Flush()
}

func (p *Program) rotateCertificatesCommand() *cli.Command {
	return leaf(cli.Command{
		Name:      "rotate",
		Usage:     "Make new certificates in place of those with the names, or of all",
		ArgsUsage: "[NAME...]",
		Description: "On a running node, and on a stopped one. Servers make new keys too, except for the key that identifies the\n" +
			"node; the certificates of an agent are renewed together by a server. The authorities stay.",
	}, nodeRows(), func(c *call) error {
		if err := needRoot("renew certificates"); err != nil {
			return err
		}
		var rotated []string
		err := control.Post(c.ctx, settings.RunDir.In(c.values), control.RotateCertificatesPath, url.Values{"name": c.args}, &rotated)
		if errors.Is(err, control.ErrNotRunning) {
			var dataDir string
			if dataDir, err = filepath.Abs(settings.DataDir.In(c.values)); err != nil {
				return errorkind.BadSetting(settings.DataDir.Name, ": %w", err)
			}
			rotated, err = p.Certificates.Rotate(c.ctx, dataDir, c.args)
		}
		for _, name := range rotated {
			fmt.Fprintln(c.out, name)
		}
		return err
	})
}
