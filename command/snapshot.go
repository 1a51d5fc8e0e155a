package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/atomicfile"
	"kedge/internal/control"
	"kedge/internal/datadir"
	"kedge/internal/errorkind"
	"kedge/server/snapshots/archive"
	"kedge/settings"
)

var (
	snapshotName = settings.Text(settings.Setting{Name: "name", NoVar: true, NoKey: true, Default: archive.OnDemand,
		Help: "`PREFIX` of the snapshot's name, before the server's name and the time"})
	prunedName = settings.Text(settings.Setting{Name: "name", NoVar: true, NoKey: true, Default: archive.Scheduled,
		Help: "`PREFIX` of the snapshots' names, before the server's name and the time"})
	recoveryKey = settings.Text(settings.Setting{Name: "recovery-key", NoKey: true,
		Help: "Recovery `KEY` that opens the snapshot; better by the variable or in a file, since others see the command line"})
	recoveryKeyFile = settings.Text(settings.Setting{Name: "recovery-key-file", NoKey: true,
		Help: "`FILE` with the recovery key; \"-\" is the standard input (default: the key of this server, if it has one)"})
	passphraseFile = settings.Text(settings.Setting{Name: "passphrase-file", NoKey: true,
		Help: "`FILE` whose first line is a passphrase, instead of the recovery key; \"-\" is the standard input"})
	restoreForce = settings.Switch(settings.Setting{Name: "force", NoVar: true, NoKey: true,
		Help: "Restore over another cluster too, and while other servers answer"})
)

// Restored is what a restore has done.
type Restored struct {
	Snapshot archive.Header // zero if the file had a database only
	Revision int64          // after which the datastore goes on
	Kept     string         // where the state of before is; empty if there was none
	NewNode  bool           // the node got a new key
}

// Bucket has the snapshots that are stored outside of the machine.
type Bucket interface {
	List(ctx context.Context) ([]Stored, error)
	Download(ctx context.Context, name string, w io.Writer) error
	Remove(ctx context.Context, name string) error
	Prune(ctx context.Context, prefix, node string, keep int) (removed []string, err error)
}

// Stored is a snapshot outside of the machine. What its server has not said is empty.
type Stored struct {
	Name                  string
	Size                  int64 // in bytes
	Node, Taken, Revision string
}

func (p *Program) snapshotCommand() *cli.Command {
	return &cli.Command{
		Name:    "snapshot",
		Aliases: []string{"etcd-snapshot"}, // as in k3s
		Usage:   "Save and restore the cluster: its datastore, keys and settings; on a server",
		Action:  subcommandsOnly,
		Subcommands: []*cli.Command{
			saveSnapshotCommand(),
			leaf(cli.Command{Name: "ls", Aliases: []string{"list"}, Usage: "List the snapshots of this server"}, nodeRows(), p.listSnapshots),
			leaf(cli.Command{
				Name: "inspect", ArgsUsage: "FILE", Usage: "Show what a snapshot is, and check all of it if there is a key",
			}, append(nodeRows(), rowsOf(recoveryKey, recoveryKeyFile, passphraseFile)...), inspectSnapshot),
			p.restoreCommand(),
			leaf(cli.Command{Name: "prune", Usage: "Remove all but the newest snapshots of this server"},
				append(nodeRows(), prunedName.Row()), p.pruneSnapshots),
			leaf(cli.Command{Name: "rm", Aliases: []string{"delete"}, ArgsUsage: "NAME...", Usage: "Remove snapshots"}, nodeRows(), p.removeSnapshots),
		},
	}
}

func saveSnapshotCommand() *cli.Command {
	return leaf(cli.Command{
		Name:  "save",
		Usage: "Save the cluster in a file, and check the file; on a server that runs",
		Description: "The file has the datastore, the authorities and keys, and the settings that are equal on all nodes. The\n" +
			"recovery key opens it (\"kedge recovery-key show\"), or a passphrase. Keep a copy of both elsewhere.",
	}, append(nodeRows(), rowsOf(snapshotName, passphraseFile)...), func(c *call) error {
		if err := archive.CheckPrefix(snapshotName.In(c.values)); err != nil {
			return errorkind.BadSetting(snapshotName.Name, ": %w", err)
		}
		if snapshotName.In(c.values) == archive.Scheduled {
			return errorkind.BadSetting(snapshotName.Name, " %s is for the snapshots of the schedule, of which old ones are removed; choose another", archive.Scheduled)
		}
		parameters := url.Values{"name": {snapshotName.In(c.values)}}
		if passphraseFile.IsSet(c.values) {
			word, err := readPassphrase(passphraseFile.In(c.values), c.cli.App.Reader)
			if err == nil {
				err = word.Validate()
			}
			if err != nil {
				return err
			}
			parameters.Set("passphrase", string(word))
		}
		var saved control.SavedArchive
		if err := control.Post(c.ctx, settings.RunDir.In(c.values), control.SaveArchivePath, parameters, &saved); err != nil {
			return err
		}
		fmt.Fprintf(c.out, "%s\n%s, revision %d, opened by %s\n", saved.Path, sizeOf(saved.Size), saved.Revision, saved.OpenedBy)
		return nil
	})
}

// snapshotFolders returns the folders with snapshots of this machine's server: the one in the settings, and the one in the data
// directory, which has those of before upgrades.
func snapshotFolders(v settings.Values) []string {
	own := filepath.Join(settings.DataDir.In(v), control.SnapshotFolder)
	return slices.Compact([]string{filepath.Clean(cmp.Or(settings.SnapshotDir.In(v), own)), own})
}

func (p *Program) listSnapshots(c *call) error {
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tTAKEN\tSIZE\tREVISION\tSERVER\tOPENED BY")
	for _, dir := range snapshotFolders(c.values) {
		all, err := archive.List(dir)
		if err != nil {
			return err
		}
		for _, l := range all {
			name, taken, size := filepath.Base(l.Path), l.Taken.UTC().Format(time.RFC3339), sizeOf(l.Size)
			switch {
			case l.Err != nil:
				fmt.Fprintf(t, "%s\t%s\t%s\t-\t-\t%s\n", name, taken, size, reasonOf(l.Err))
			case l.DatabaseOnly:
				fmt.Fprintf(t, "%s\t%s\t%s\t-\t-\ton this server only\n", name, taken, size)
			default:
				fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\t%s\n", name, taken, size, l.Header.Revision, l.Header.Node, openedBy(l.Header))
			}
		}
	}
	if settings.S3.In(c.values) {
		if err := p.listBucket(c, t); err != nil {
			return errors.Join(t.Flush(), err)
		}
	}
	return t.Flush()
}

func (p *Program) listBucket(c *call, t io.Writer) error {
	b, err := p.Bucket(c.ctx, Node{Values: c.values})
	if err != nil {
		return err
	}
	all, err := b.List(c.ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\tin S3\n", s.Name, cmp.Or(s.Taken, "-"), sizeOf(s.Size), cmp.Or(s.Revision, "-"), cmp.Or(s.Node, "-"))
	}
	return nil
}

// reasonOf is the text of an error without the file's name, which is beside it.
func reasonOf(err error) string {
	for _, known := range []error{archive.ErrNotArchive, archive.ErrDamaged, archive.ErrNewer} {
		if errors.Is(err, known) {
			return known.Error()
		}
	}
	return err.Error()
}

// openedBy is a short name of what opens a snapshot.
func openedBy(h archive.Header) string {
	if h.OpenedBy == archive.PassphraseName {
		return h.OpenedBy
	}
	const shown = 12
	return "key " + h.OpenedBy[:min(shown, len(h.OpenedBy))] + "..."
}

// sizeOf is a number of bytes for people.
func sizeOf(n int64) string {
	if n < 1<<20 {
		return strconv.FormatInt((n+1<<10-1)>>10, 10) + " KiB"
	}
	return strconv.FormatFloat(float64(n)/(1<<20), 'f', 1, 64) + " MiB"
}

// snapshotFile returns the path of a snapshot that the user has named: a path, or a name that "kedge snapshot ls" shows.
func snapshotFile(c *call) (string, error) {
	if len(c.args) != 1 {
		return "", badUsage("give one snapshot: the path of a file, or a name that \"kedge snapshot ls\" shows")
	}
	return findSnapshot(c.values, c.args[0])
}

func findSnapshot(v settings.Values, name string) (string, error) {
	if _, err := os.Stat(name); err == nil {
		return filepath.Abs(name)
	}
	dirs := snapshotFolders(v)
	if filepath.Base(name) == name {
		for _, dir := range dirs {
			path := filepath.Join(dir, name)
			if _, err := os.Stat(path); err == nil {
				return filepath.Abs(path)
			}
		}
	}
	return "", errorkind.Permanent(fmt.Errorf("there is no snapshot %s, neither here nor in %s; \"kedge snapshot ls\" shows those of this server", name, strings.Join(dirs, ", ")))
}

func readPassphrase(path string, in io.Reader) (archive.Passphrase, error) {
	data, err := readSecret(path, in)
	if err != nil {
		return "", err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return archive.Passphrase(strings.TrimSuffix(line, "\r")), nil
}

// readSecret reads a small file, or the standard input.
func readSecret(path string, in io.Reader) ([]byte, error) {
	const limit = 64 << 10
	if path == "-" {
		return io.ReadAll(io.LimitReader(in, limit))
	}
	return atomicfile.ReadSmall(path, limit)
}

// errNoKey is returned where a snapshot is to be opened and nothing says by what.
var errNoKey = errors.New("this machine has no recovery key: give that of the cluster with --recovery-key-file or KEDGE_RECOVERY_KEY, or a passphrase with --passphrase-file")

// lockOf returns what opens a snapshot: what the settings say, or the recovery key of this machine's server.
func lockOf(c *call) (archive.Lock, error) {
	switch {
	case passphraseFile.IsSet(c.values) && (recoveryKeyFile.IsSet(c.values) || recoveryKey.IsSet(c.values)):
		return nil, errorkind.BadSettings(passphraseFile.Name, "", recoveryKeyFile.Name, " contradict each other: a snapshot is opened by one of them")
	case passphraseFile.IsSet(c.values):
		word, err := readPassphrase(passphraseFile.In(c.values), c.cli.App.Reader)
		return word, err
	case recoveryKeyFile.IsSet(c.values):
		path := recoveryKeyFile.In(c.values)
		data, err := readSecret(path, c.cli.App.Reader)
		if err != nil {
			return nil, err
		}
		key, err := archive.ParseKey(string(data))
		if err != nil {
			return nil, errorkind.BadSetting(recoveryKeyFile.Name, " %s: %w", path, err)
		}
		return key, nil
	case recoveryKey.IsSet(c.values):
		key, err := archive.ParseKey(recoveryKey.In(c.values))
		if err != nil {
			return nil, errorkind.BadSetting(recoveryKey.Name, ": %w", err)
		}
		return key, nil
	}
	key, err := archive.ReadKey(filepath.Join(settings.DataDir.In(c.values), "server"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, errorkind.Permanent(errNoKey)
	}
	return key, err
}

func inspectSnapshot(c *call) error {
	path, err := snapshotFile(c)
	if err != nil {
		return err
	}
	h, err := archive.HeaderOf(path)
	if err != nil {
		return err
	}
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, row := range [][2]string{
		{"file", path}, {"taken", h.Taken.UTC().Format(time.RFC3339)}, {"server", h.Node}, {"cluster", h.Cluster}, {"kedge", h.Kedge}, {"kubernetes", h.Kubernetes},
		{"revision", strconv.FormatInt(h.Revision, 10)}, {"datastore", sizeOf(h.Database)}, {"opened by", h.OpenedBy},
	} {
		fmt.Fprintf(t, "%s\t%s\n", row[0], row[1])
	}
	lock, err := lockOf(c)
	if errors.Is(err, errNoKey) {
		fmt.Fprintf(t, "checked\tno: %v\n", err)
		return t.Flush()
	}
	if err != nil {
		return errors.Join(t.Flush(), err)
	}
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := archive.Read(f, lock, io.Discard); err != nil {
		return errors.Join(t.Flush(), fmt.Errorf("%s: %w", path, err))
	}
	fmt.Fprintln(t, "checked\tyes: the key opens it, and it is whole")
	return t.Flush()
}

func (p *Program) restoreCommand() *cli.Command {
	return leaf(cli.Command{
		Name: "restore", ArgsUsage: "FILE", Usage: "Make this machine the server of the cluster in a snapshot, while kedge is stopped",
		Description: "The machine may be the one of the snapshot, or one that has no cluster yet, with another name and address.\n" +
			"Stop kedge on all servers first. After the restore start it here, and let the other servers join anew. What was\n" +
			"there before is kept beside. A restore that is interrupted has changed nothing, or everything.",
	}, append(nodeRows(), rowsOf(recoveryKey, recoveryKeyFile, passphraseFile, restoreForce)...), func(c *call) error {
		if err := needRoot("restore a snapshot"); err != nil {
			return err
		}
		path, remove, err := p.fetchSnapshot(c)
		if err != nil {
			return err
		}
		defer remove()
		var lock archive.Lock
		if _, err := archive.HeaderOf(path); !errors.Is(err, archive.ErrNotArchive) { // a database only needs no key
			if lock, err = lockOf(c); err != nil {
				return err
			}
		}
		done, err := p.Restore(c.ctx, Node{Values: c.values}, path, lock, restoreForce.In(c.values))
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "restored %s\n", c.args[0])
		if done.Snapshot.Node != "" {
			fmt.Fprintf(c.out, "it was taken by %s at %s\n", done.Snapshot.Node, done.Snapshot.Taken.UTC().Format(time.RFC3339))
		}
		if done.Kept != "" {
			fmt.Fprintf(c.out, "the state of before is kept in %s\n", done.Kept)
		}
		if done.NewNode {
			fmt.Fprintln(c.out, "this machine joins as a new node; those of the servers of then are removed")
		}
		fmt.Fprintln(c.out, "start kedge now; other servers of the cluster join anew after \"kedge server reset\" on each")
		return nil
	})
}

// fetchSnapshot returns the path of the snapshot that the user has named. With --s3 it downloads it if it is not on this machine.
// The caller calls remove at the end.
func (p *Program) fetchSnapshot(c *call) (path string, remove func(), err error) {
	path, err = snapshotFile(c)
	if err == nil || !settings.S3.In(c.values) || len(c.args) != 1 {
		return path, func() {}, err
	}
	b, err := p.Bucket(c.ctx, Node{Values: c.values})
	if err != nil {
		return "", nil, err
	}
	dir := settings.DataDir.In(c.values)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", nil, err
	}
	f, err := os.CreateTemp(dir, ".restore-*"+archive.Suffix)
	if err != nil {
		return "", nil, err
	}
	err = errors.Join(b.Download(c.ctx, c.args[0], f), f.Close())
	if err != nil {
		return "", nil, errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), func() { os.Remove(f.Name()) }, nil
}

func (p *Program) pruneSnapshots(c *call) error {
	node, err := datadir.NodeName(settings.DataDir.In(c.values))
	if err != nil {
		return err
	}
	if node == "" {
		return errorkind.Permanent(fmt.Errorf("%s is no node's data directory; give it with --data-dir", settings.DataDir.In(c.values)))
	}
	removed, err := archive.Prune(snapshotFolders(c.values)[0], prunedName.In(c.values), node, settings.SnapshotRetention.In(c.values))
	for _, path := range removed {
		fmt.Fprintln(c.out, "removed", path)
	}
	if err != nil || !settings.S3.In(c.values) {
		return err
	}
	b, err := p.Bucket(c.ctx, Node{Values: c.values})
	if err != nil {
		return err
	}
	removed, err = b.Prune(c.ctx, prunedName.In(c.values), node, settings.SnapshotRetention.In(c.values))
	for _, name := range removed {
		fmt.Fprintln(c.out, "removed", name, "from S3")
	}
	return err
}

func (p *Program) removeSnapshots(c *call) error {
	if len(c.args) == 0 {
		return badUsage("give the names of snapshots; \"kedge snapshot ls\" shows them")
	}
	found := map[string]func() error{}
	for _, name := range c.args {
		path, err := findSnapshot(c.values, name)
		if err != nil {
			continue
		}
		if !strings.HasSuffix(path, archive.Suffix) && !strings.HasSuffix(path, archive.DatabaseSuffix) {
			return badUsage("%s is no snapshot", path)
		}
		found[name] = func() error { return os.Remove(path) }
	}
	if settings.S3.In(c.values) {
		if err := p.findStored(c, found); err != nil {
			return err
		}
	}
	for _, name := range c.args {
		if found[name] == nil {
			return errorkind.Permanent(fmt.Errorf("there is no snapshot %s; \"kedge snapshot ls\" shows those that there are", name))
		}
	}
	for _, name := range c.args {
		if err := found[name](); err != nil {
			return err
		}
		fmt.Fprintln(c.out, "removed", name)
	}
	return nil
}

// findStored adds what removes the snapshots from S3 that the user has named.
func (p *Program) findStored(c *call, found map[string]func() error) error {
	b, err := p.Bucket(c.ctx, Node{Values: c.values})
	if err != nil {
		return err
	}
	all, err := b.List(c.ctx)
	if err != nil {
		return err
	}
	for _, s := range all {
		if !slices.Contains(c.args, s.Name) {
			continue
		}
		here := found[s.Name]
		found[s.Name] = func() error {
			if here != nil {
				if err := here(); err != nil {
					return err
				}
			}
			return b.Remove(c.ctx, s.Name)
		}
	}
	return nil
}

func recoveryKeyCommand() *cli.Command {
	return &cli.Command{
		Name:   "recovery-key",
		Usage:  "Show or replace the key that opens the cluster's snapshots; on a server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			leaf(cli.Command{Name: "show", Usage: "Show the key; write it down, and keep it elsewhere than the snapshots"}, nodeRows(), showRecoveryKey),
			leaf(cli.Command{Name: "new", Usage: "Replace the key, for snapshots from now on; those of before are opened by the earlier one"}, nodeRows(), func(c *call) error {
				var made control.RecoveryKey
				if err := control.Post(c.ctx, settings.RunDir.In(c.values), control.NewRecoveryKeyPath, nil, &made); err != nil {
					return err
				}
				if made.Earlier != "" {
					fmt.Fprintf(c.out, "Keep the earlier key as long as snapshots of before are kept:\n%s\n", made.Earlier)
				}
				fmt.Fprintf(c.out, "The new key:\n%s\n", made.Key)
				return nil
			}),
		},
	}
}

func showRecoveryKey(c *call) error {
	if err := needRoot("read the recovery key"); err != nil {
		return err
	}
	var shown control.RecoveryKey
	err := control.Get(c.ctx, settings.RunDir.In(c.values), control.RecoveryKeyPath, nil, &shown)
	if err == nil {
		fmt.Fprintln(c.out, shown.Key)
		return nil
	}
	// The copy of this server is there when kedge is not.
	key, fileErr := archive.ReadKey(filepath.Join(settings.DataDir.In(c.values), "server"))
	if fileErr != nil {
		return err
	}
	fmt.Fprintln(c.out, key.Reveal())
	return nil
}
