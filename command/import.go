package command

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"strings"
	"syscall"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"kedge/internal/errorkind"
	"kedge/settings"
)

// K3sImport says what is imported from k3s.
type K3sImport struct {
	Snapshot         string // path of a snapshot of k3s's etcd
	Token            string // k3s's server token; empty if it is not needed
	EncryptionConfig []byte // k3s's encryption configuration; empty for the one in the snapshot
	Kubeconfig       string // path; of an administrator of the cluster that gets the objects
	DryRun           bool   // report only
	Overwrite        bool   // change objects that exist and differ
}

// K3sImported is the result of an import.
type K3sImported struct {
	Objects []ImportedObject
	Notices []string // what the user has to do or to know
	Failed  int      // how many of Objects could not be imported
}

// ImportedObject is an object of the snapshot, or several that are left out for the same reason.
type ImportedObject struct {
	Outcome, Kind, Namespace, Name string
	Count                          int // of several objects; Name is empty then
	Reason                         string
}

func (p *Program) importCommand() *cli.Command {
	return &cli.Command{
		Name:        "import",
		Usage:       "Import the objects of another cluster",
		Action:      subcommandsOnly,
		Subcommands: []*cli.Command{p.importK3sCommand()},
	}
}

// readKubeconfig is the setting of a kubeconfig that a command uses.
func readKubeconfig() settings.Of[string] {
	return settings.Text(settings.Setting{Name: "kubeconfig", NoVar: true, NoKey: true,
		Help: "`FILE` with the kubeconfig of the cluster's administrator (default: that of this machine's server)"})
}

func (p *Program) importK3sCommand() *cli.Command {
	own := func(name, help string) settings.Of[string] {
		return settings.Text(settings.Setting{Name: name, NoVar: true, NoKey: true, Help: help})
	}
	file := own("snapshot", "`FILE` that \"k3s etcd-snapshot save\" has written, compressed or not")
	token := own("token", "k3s's server `TOKEN`; better in a file, since others see the command line")
	tokenFile := own("token-file", "`FILE` with k3s's server token, a copy of /var/lib/rancher/k3s/server/token; \"-\" is the standard input")
	config := own("encryption-config", "`FILE` with k3s's encryption configuration, instead of the token")
	kubeconfig := readKubeconfig()
	dryRun := settings.Switch(settings.Setting{Name: "dry-run", NoVar: true, NoKey: true, Help: "Only show what would be done"})
	overwrite := settings.Switch(settings.Setting{Name: "overwrite", NoVar: true, NoKey: true, Help: "Change objects that exist and differ from those in the snapshot"})
	return leaf(cli.Command{
		Name:  "k3s",
		Usage: "Import the objects in a snapshot of k3s's etcd into a running cluster of kedge",
		Description: "The cluster should be a new one. k3s's own objects, and those that a new cluster creates itself, are left\n" +
			"out. If k3s encrypts Secrets, its token or its encryption configuration is needed. The command can be\n" +
			"repeated: what exists is left as it is. Volumes' data is not in a snapshot.",
	}, rowsOf(file, token, tokenFile, config, kubeconfig, dryRun, overwrite), func(c *call) error {
		in := K3sImport{
			Snapshot: file.In(c.values), Token: token.In(c.values), DryRun: dryRun.In(c.values), Overwrite: overwrite.In(c.values),
			Kubeconfig: cmp.Or(kubeconfig.In(c.values), MachineKubeconfig()),
		}
		if in.Snapshot == "" {
			return badUsage("give the snapshot of k3s with --snapshot")
		}
		if tokenFile.IsSet(c.values) && (token.IsSet(c.values) || config.IsSet(c.values)) || token.IsSet(c.values) && config.IsSet(c.values) {
			return badUsage("give one of --token, --token-file and --encryption-config")
		}
		if tokenFile.IsSet(c.values) {
			data, err := readSecret(tokenFile.In(c.values), c.cli.App.Reader)
			if err != nil {
				return errorkind.BadSetting(tokenFile.Name, ": %w", err)
			}
			if in.Token = strings.TrimSpace(string(data)); in.Token == "" {
				return errorkind.BadSetting(tokenFile.Name, ": %s is empty", tokenFile.In(c.values))
			}
		}
		if config.IsSet(c.values) {
			data, err := readSecret(config.In(c.values), c.cli.App.Reader)
			if err != nil {
				return errorkind.BadSetting(config.Name, ": %w", err)
			}
			in.EncryptionConfig = data
		}
		// A signal stops it between two objects, and lets it remove its copy of the snapshot.
		ctx, stop := signal.NotifyContext(c.ctx, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
		defer stop()
		done, err := p.ImportK3s(ctx, in)
		if ctx.Err() != nil && err != nil {
			err = errors.New("the import was interrupted; run the command again, and it goes on")
		}
		if printErr := printImported(c.out, done, in.DryRun); err == nil {
			err = printErr
		}
		if err == nil && done.Failed > 0 {
			objects := "objects"
			if done.Failed == 1 {
				objects = "object"
			}
			err = fmt.Errorf("%d %s could not be imported: see \"failed\" above, and run the command again when the cause is removed", done.Failed, objects)
		}
		return err
	})
}

// printImported prints a line for each object, the sums, and the notices.
func printImported(out io.Writer, done K3sImported, dryRun bool) error {
	if len(done.Objects) == 0 {
		return nil
	}
	t := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "OUTCOME\tKIND\tOBJECT\tREASON")
	var outcomes []string
	sums := map[string]int{}
	for _, o := range done.Objects {
		name := o.Name
		if o.Namespace != "" {
			name = o.Namespace + "/" + o.Name
		}
		if o.Count > 0 {
			name = fmt.Sprintf("(%d)", o.Count)
		}
		if sums[o.Outcome] == 0 {
			outcomes = append(outcomes, o.Outcome)
		}
		sums[o.Outcome] += max(o.Count, 1)
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", o.Outcome, o.Kind, name, cmp.Or(o.Reason, "-"))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	var parts []string
	for _, o := range outcomes {
		parts = append(parts, fmt.Sprintf("%d %s", sums[o], o))
	}
	prefix := "\n"
	if dryRun {
		prefix = "\nNothing was changed. It would be: "
	}
	fmt.Fprintf(out, "%s%s\n", prefix, strings.Join(parts, ", "))
	for _, n := range done.Notices {
		fmt.Fprintln(out, "-", n)
	}
	return nil
}
