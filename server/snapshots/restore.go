package snapshots

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/datadir"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/snapshots/archive"
)

// Restore makes this machine the server of the cluster in a snapshot. kedge must be stopped, and all other servers of the
// cluster too.
//
// The new state is built beside the old one, in <data-dir>/server.new, and then takes its place by one operation of the file
// system. So a restore that was killed has done nothing, or everything. The old state is kept as
// <data-dir>/server.before-restore-TIME.
type Restore struct {
	DataDir string // <data-dir>; absolute
	File    string // an archive, or a file with a database only
	Lock    archive.Lock
	Node    string // name of this machine's node
	Force   bool   // also over another cluster, and while other servers answer

	Log *slog.Logger

	above int64 // the highest revision that is known to have been handed out; see Recovery
}

// Restored is the result of a restore.
type Restored struct {
	Header   archive.Header // zero if the file has a database only
	Revision int64          // the first revision that the cluster will hand out is higher
	Kept     string         // where the state of before is; empty if there was none
	NewNode  bool           // the machine gets a new key, because the snapshot is that of a server of another name
}

// Errors of a restore. Each is wrapped with what to do.
var (
	ErrOtherCluster = errors.New("the snapshot is of another cluster than this machine's")
	ErrStillServed  = errors.New("another server of the cluster still runs")
)

const (
	serverFolder  = "server"
	newFolder     = "server.new"
	workFolder    = "recover.new" // in the data directory: where a recovery, or a restore, reads a datastore
	keptPrefix    = "server.before-restore-"
	storeFolder   = "store"
	pendingFile   = "restore.json"  // in the data directory: the restore that is in progress
	restoredFile  = "restored.json" // in the server's folder: the restore that it comes from
	probeTimeout  = 2 * time.Second
	writesASecond = 30_000 // more than any machine writes
)

// record is the content of pendingFile and restoredFile.
type record struct {
	ID       string    `json:"id"`
	Snapshot string    `json:"snapshot"` // name of the file
	Taken    time.Time `json:"taken,omitzero"`
	Restored time.Time `json:"restored"`
}

// refuseWitness returns an error if dataDir belongs to a witness.
func refuseWitness(dataDir string) error {
	_, err := os.Stat(joining.StateFile(joining.Witness, filepath.Join(dataDir, "witness")))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("%s is the data directory of a witness, which has a copy of the datastore and none of the cluster's keys; restore a snapshot on a server, or in an empty data directory", dataDir)
	}
	return err
}

// Run restores. After an error nothing has changed, unless the error says so.
func (r Restore) Run(ctx context.Context) (Restored, error) {
	if _, joined, err := joining.ReadState(joining.Agent, filepath.Join(r.DataDir, "agent")); err != nil || joined {
		if err == nil {
			err = fmt.Errorf("%s is the data directory of an agent; choose another with --data-dir, or remove the agent with \"kedge uninstall\"", r.DataDir)
		}
		return Restored{}, err
	}
	if err := refuseWitness(r.DataDir); err != nil {
		return Restored{}, err
	}
	header, err := r.header()
	if err != nil {
		return Restored{}, err
	}
	release, err := r.lock()
	if err != nil {
		return Restored{}, err
	}
	defer release()
	if err := EndInterrupted(r.DataDir); err != nil {
		return Restored{}, err
	}
	had, err := r.inspect(ctx, header)
	if err != nil {
		return Restored{}, err
	}
	if header == (archive.Header{}) {
		if err := r.checkOrigin(ctx); err != nil {
			return Restored{}, err
		}
	}
	return r.replace(header, had)
}

// checkOrigin returns an error if the database in the file is one of k3s, which is a snapshot of etcd too.
func (r Restore) checkOrigin(ctx context.Context) error {
	const ofK3s = "/bootstrap/" // under which k3s keeps its cluster's keys
	foreign := fmt.Errorf("%s is a snapshot of k3s; import it into a new cluster with \"kedge import k3s\"", r.File)
	work := filepath.Join(r.DataDir, workFolder)
	if err := os.Mkdir(work, 0o700); err != nil {
		return err
	}
	err := datastore.ReadSnapshot(ctx, r.File, work, []string{ofK3s}, func(string, []byte) error { return foreign })
	return errors.Join(err, os.RemoveAll(work))
}

// header returns the header of the file; zero for a database only.
func (r Restore) header() (archive.Header, error) {
	h, err := archive.HeaderOf(r.File)
	if !errors.Is(err, archive.ErrNotArchive) {
		return h, err
	}
	if _, notDatabase := datastore.VerifySnapshot(r.File); notDatabase != nil {
		return h, fmt.Errorf("%w, and no snapshot of a datastore: %w", err, notDatabase)
	}
	return archive.Header{}, nil
}

// lock takes the lock of the data directory, which it makes.
func (r Restore) lock() (release func(), err error) {
	if err := os.MkdirAll(r.DataDir, 0o755); err != nil {
		return nil, err
	}
	return lock(r.DataDir)
}

// lock takes the lock of a data directory, while kedge is stopped.
func lock(dataDir string) (release func(), err error) {
	f, err := datadir.TryLock(dataDir)
	if errors.Is(err, datadir.ErrInUse) {
		return nil, fmt.Errorf("%w; stop it first", err)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// EndInterrupted ends a restore or a recovery in a data directory that was killed: its new state is in use already, or is
// removed. The caller has the directory's lock.
func EndInterrupted(dataDir string) error {
	if err := os.RemoveAll(filepath.Join(dataDir, workFolder)); err != nil {
		return err
	}
	pending, err := readRecord(filepath.Join(dataDir, pendingFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if done, err := readRecord(filepath.Join(dataDir, serverFolder, restoredFile)); err == nil && done.ID == pending.ID {
		_, err := keepOld(dataDir, pending)
		return err
	}
	if err := os.RemoveAll(filepath.Join(dataDir, newFolder)); err != nil {
		return err
	}
	return forgetPending(dataDir)
}

func forgetPending(dataDir string) error {
	if err := os.Remove(filepath.Join(dataDir, pendingFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return atomicfile.SyncDir(dataDir)
}

// previous is the state of the machine before a restore.
type previous struct {
	exists   bool // it is the server of the snapshot's cluster
	files    map[string][]byte
	revision int64
}

// inspect looks at what the machine has, and refuses what would do harm.
func (r Restore) inspect(ctx context.Context, h archive.Header) (previous, error) {
	dir := filepath.Join(r.DataDir, serverFolder)
	p := previous{files: map[string][]byte{}}
	databaseOnly := h == (archive.Header{})
	cluster, err := clusterOf(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist) && databaseOnly:
		return p, fmt.Errorf("%s has a database only, and %s has none of the keys that belong to it; restore a snapshot that \"kedge snapshot save\" has made", r.File, dir)
	case errors.Is(err, fs.ErrNotExist):
		return p, nil
	case err != nil && databaseOnly:
		return p, fmt.Errorf("%s has a database only, and the keys that belong to it cannot be used: %w; restore a snapshot that \"kedge snapshot save\" has made", r.File, err)
	case err != nil && !r.Force:
		return p, fmt.Errorf("%w; --force restores all the same, and keeps what is there", err)
	case err != nil:
		return p, nil
	case !databaseOnly && cluster != h.Cluster:
		if !r.Force {
			return p, fmt.Errorf("%w (taken by %s); --force restores it all the same, and keeps what is there", ErrOtherCluster, h.Node)
		}
		return p, nil
	}
	if !r.Force {
		if err := r.checkOthers(ctx, dir); err != nil {
			return p, err
		}
	}
	p.exists = true
	if p.revision, err = datastore.HighestRevision(filepath.Join(dir, storeFolder)); err != nil {
		// A store that is damaged is a reason for a restore. The gap between the revisions has to do.
		r.Log.Warn("the datastore of before cannot be read", "err", err)
	}
	return p, r.readPrevious(&p, dir, databaseOnly)
}

// readPrevious reads the files that stay: the node's key and the settings of a server that has joined; with a database only all
// keys.
func (r Restore) readPrevious(p *previous, dir string, all bool) error {
	names := []string{"joined.json", nodeKeyName(dir)}
	if all {
		var err error
		if p.files, err = keyFiles(dir); err != nil {
			return fmt.Errorf("%w; restore a snapshot that \"kedge snapshot save\" has made, which has the keys", err)
		}
	}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join(dir, name))
		switch {
		case err == nil:
			p.files[name] = data
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
	}
	if _, err := pki.LoadKey(filepath.Join(dir, nodeKeyName(dir))); err != nil {
		delete(p.files, nodeKeyName(dir))
	}
	return nil
}

// nodeKeyName is the path of the node's key in a server's directory.
func nodeKeyName(dir string) string {
	name, err := filepath.Rel(dir, identity.NodeKeyFile(dir))
	if err != nil {
		panic(err) // one is below the other
	}
	return name
}

// checkOthers returns an error if the datastore of another server answers. With the state from which this machine comes back, it
// would go on as another cluster of the same name.
func (r Restore) checkOthers(ctx context.Context, dir string) error {
	others, err := datastore.OtherMembers(filepath.Join(dir, storeFolder))
	if err != nil || len(others) == 0 {
		return err
	}
	dialer, err := peerDialer(dir)
	if err != nil {
		return fmt.Errorf("whether other servers run cannot be asked: %w; --force restores all the same", err)
	}
	for _, p := range others {
		if at := answering(ctx, dialer, p.Addresses); at.IsValid() {
			return fmt.Errorf("%w: %s answers at %s; stop kedge on all servers first, and let the others join anew after the restore (see docs/backup.md)", ErrStillServed, p.Name, at)
		}
	}
	return nil
}

// peerDialer connects to the peer ports of other servers, with the certificate in a server's directory.
func peerDialer(dir string) (*tls.Dialer, error) {
	cfg := identity.PeerConfig(dir, 0, nil)
	ca, err := os.ReadFile(cfg.CAFile)
	if err != nil {
		return nil, err
	}
	own, err := tls.LoadX509KeyPair(cfg.CertFile, cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	return &tls.Dialer{NetDialer: &net.Dialer{Timeout: probeTimeout}, Config: &tls.Config{
		RootCAs: roots, Certificates: []tls.Certificate{own}, ServerName: datastore.PeerServerName, MinVersion: tls.VersionTLS13,
	}}, nil
}

// answering returns the first of a server's addresses at which its datastore answers; not valid if it does at none.
func answering(ctx context.Context, dialer *tls.Dialer, addresses []netip.AddrPort) netip.AddrPort {
	for _, at := range addresses {
		ctx, cancel := context.WithTimeout(ctx, probeTimeout)
		conn, err := dialer.DialContext(ctx, "tcp", at.String())
		cancel()
		if err == nil {
			conn.Close()
			return at
		}
	}
	return netip.AddrPort{}
}

// replace builds the new state and puts it in the place of the old one.
func (r Restore) replace(h archive.Header, had previous) (Restored, error) {
	now := time.Now()
	rec := record{ID: rand.Text(), Snapshot: filepath.Base(r.File), Taken: h.Taken, Restored: now.UTC().Truncate(time.Second)}
	if err := writeRecord(filepath.Join(r.DataDir, pendingFile), rec); err != nil {
		return Restored{}, err
	}
	out, err := r.build(h, had, rec, now)
	if err == nil {
		err = r.exchange()
	}
	if err != nil {
		return Restored{}, errors.Join(err, EndInterrupted(r.DataDir))
	}
	if out.Kept, err = keepOld(r.DataDir, rec); err != nil {
		return out, fmt.Errorf("the snapshot is restored, and the state of before is in %s: %w", filepath.Join(r.DataDir, newFolder), err)
	}
	return out, nil
}

// build makes the new state in newFolder.
func (r Restore) build(h archive.Header, had previous, rec record, now time.Time) (Restored, error) {
	dir := filepath.Join(r.DataDir, newFolder)
	out := Restored{Header: h}
	if err := os.RemoveAll(dir); err != nil {
		return out, err
	}
	if err := atomicfile.MkdirAll(filepath.Join(dir, "tls"), 0o700); err != nil {
		return out, err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return out, err
	}
	database, files, err := r.unpack(dir, h)
	if err != nil {
		return out, err
	}
	if files, err = r.settle(files, h, had); err != nil {
		return out, err
	}
	out.NewNode = files[nodeKeyName(dir)] == nil
	for name, data := range files {
		if err := atomicfile.Write(filepath.Join(dir, name), data, 0o600); err != nil {
			return out, err
		}
	}
	if _, err := pki.EnsureKey(filepath.Join(dir, nodeKeyName(dir))); err != nil {
		return out, err
	}
	made, err := datastore.RestoreSnapshot(database, filepath.Join(dir, storeFolder), r.Node, max(r.above, had.revision+sinceTaken(h, now)), r.Log)
	if err != nil {
		return out, err
	}
	out.Revision = made.Revision
	if database != r.File {
		if err := os.Remove(database); err != nil {
			return out, err
		}
	}
	return out, errors.Join(writeRecord(filepath.Join(dir, restoredFile), rec), atomicfile.SyncDir(dir))
}

// sinceTaken is more writes than the cluster can have made since the snapshot, by this machine's clock: a snapshot that is
// restored a second time must not begin where the first restore did.
func sinceTaken(h archive.Header, now time.Time) int64 {
	if h.Taken.IsZero() || now.Before(h.Taken) {
		return 0
	}
	return h.Revision + int64(now.Sub(h.Taken)/time.Second)*writesASecond
}

// unpack writes the database of the snapshot into dir, in the format of etcd's snapshots, and returns its path and the files
// of the archive. A file with a database only is used where it is.
func (r Restore) unpack(dir string, h archive.Header) (database string, files map[string][]byte, err error) {
	if h == (archive.Header{}) {
		st, err := os.Stat(r.File)
		if err == nil {
			err = datastore.CheckRoom(dir, st.Size())
		}
		return r.File, nil, err
	}
	if err := datastore.CheckRoom(dir, 2*h.Database); err != nil {
		return "", nil, err
	}
	in, err := os.Open(r.File)
	if err != nil {
		return "", nil, err
	}
	defer in.Close()
	database = filepath.Join(dir, "snapshot.db")
	out, err := os.OpenFile(database, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", nil, err
	}
	c, err := archive.Read(in, r.Lock, out)
	if err == nil {
		err = datastore.EndSnapshot(out, c.Hash)
	}
	return database, c.Files, errors.Join(err, out.Close())
}

// settle decides which files the new state gets.
func (r Restore) settle(files map[string][]byte, h archive.Header, had previous) (map[string][]byte, error) {
	if files == nil {
		return had.files, nil
	}
	key := nodeKeyName("/")
	if own := had.files[key]; own != nil {
		files[key] = own
	} else if r.Node != h.Node {
		delete(files, key) // it identifies the other machine
	}
	cluster := files[settingsFile]
	delete(files, settingsFile)
	if had.files["joined.json"] != nil || !had.exists {
		// The machine may not have the flags of the cluster's first server: it takes the settings like a server that joins.
		state := joining.State{Restored: true}
		if err := json.Unmarshal(cluster, &state.Cluster); err != nil {
			return nil, fmt.Errorf("%w: the cluster's settings: %w", archive.ErrDamaged, err)
		}
		data, err := json.MarshalIndent(state, "", "  ")
		if err != nil {
			return nil, err
		}
		files["joined.json"] = append(data, '\n')
	}
	needed, optional := identity.SharedFiles()
	for name := range files {
		if !slices.Contains(needed, name) && !slices.Contains(optional, name) && !slices.Contains([]string{key, archive.KeyFile, "joined.json"}, name) {
			return nil, fmt.Errorf("%w: it has a file %q, which no server needs", archive.ErrDamaged, name)
		}
	}
	for _, name := range needed {
		if len(files[name]) == 0 {
			return nil, fmt.Errorf("%w: it has no %s", archive.ErrDamaged, name)
		}
	}
	return files, nil
}

// exchange puts the new state in the place of the old one.
func (r Restore) exchange() error {
	from, to := filepath.Join(r.DataDir, newFolder), filepath.Join(r.DataDir, serverFolder)
	_, err := os.Lstat(to)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = os.Rename(from, to)
	case err == nil:
		err = unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
			err = fmt.Errorf("the file system of %s cannot exchange two folders (%w); move %s away and restore again", r.DataDir, err, to)
		}
	}
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(r.DataDir)
}

// keepOld gives the old state, which the exchange has put where the new one was, its name.
func keepOld(dataDir string, rec record) (kept string, err error) {
	old := filepath.Join(dataDir, newFolder)
	if _, err := os.Lstat(old); err == nil {
		kept = filepath.Join(dataDir, keptPrefix+rec.Restored.Format("20060102T150405Z"))
		if err := os.Rename(old, kept); err != nil {
			return "", err
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	return kept, forgetPending(dataDir)
}

func readRecord(path string) (rec record, err error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return rec, err
	}
	if err := json.Unmarshal(data, &rec); err != nil {
		return rec, fmt.Errorf("%s cannot be read: %w; remove it if no restore is in progress", path, err)
	}
	return rec, nil
}

func writeRecord(path string, rec record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}
