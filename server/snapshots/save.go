package snapshots

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"kedge/datastore"
	"kedge/internal/atomicfile"
	"kedge/internal/joining"
	"kedge/server/identity"
	"kedge/server/snapshots/archive"
)

// Config says what is saved, and where.
type Config struct {
	Folder    string // of the snapshots; absolute
	ServerDir string // <data-dir>/server
	Node      string // of this server

	Kedge, Kubernetes string // versions, for the header

	Schedule  Schedule
	Retention int     // of the snapshots that the schedule takes, of this server
	Remote    *Remote // nil if snapshots stay on the machine

	Changed func() // called after a snapshot was taken, stored or removed; must not wait. Nil for nobody
}

// settingsFile is the file of an archive with the settings that are equal on all nodes: what a server that joins gets, too.
const settingsFile = "cluster.json"

const (
	// keyAttempts is how often a snapshot is begun anew because a key was replaced meanwhile.
	keyAttempts = 5
	// plainPrefix and temporaryPrefix begin the names of files that are being written.
	plainPrefix, temporaryPrefix = ".plain-", ".tmp-"
)

// Store is the datastore.
type Store interface {
	SaveSnapshot(ctx context.Context, path string) (datastore.Snapshot, error)
}

// Saver takes snapshots of this server's cluster.
type Saver struct {
	cfg     Config
	cluster joining.Cluster
	source  Store
	keys    *Keys
	log     *slog.Logger
	now     func() time.Time

	mu     sync.Mutex            // held while a snapshot is taken
	failed atomic.Pointer[error] // why the last snapshot of the schedule failed; nil if it did not
}

// NewSaver returns what takes snapshots. cluster has the settings that are equal on all nodes.
func NewSaver(cfg Config, cluster joining.Cluster, store Store, keys *Keys, log *slog.Logger) *Saver {
	return &Saver{cfg: cfg, cluster: cluster, source: store, keys: keys, log: log, now: time.Now}
}

// Keys returns the keys that open its snapshots.
func (s *Saver) Keys() *Keys { return s.keys }

// Save takes a snapshot, whose name begins with prefix, and verifies it. lock closes it; nil for the recovery key. The file has
// its name only when it is complete, on disk, and was read again. Only its owner can read it. Then it is stored outside of the
// machine, if there is such a place; the error wraps [ErrNotStored] if that has failed.
func (s *Saver) Save(ctx context.Context, prefix string, lock archive.Lock) (archive.Listed, error) {
	if err := archive.CheckPrefix(prefix); err != nil {
		return archive.Listed{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if lock == nil {
		key, err := s.keys.Current(ctx)
		if err != nil {
			return archive.Listed{}, err
		}
		lock = key
	}
	if err := atomicfile.MkdirAll(s.cfg.Folder, 0o700); err != nil {
		return archive.Listed{}, err
	}
	if err := s.removeLeftovers(); err != nil {
		return archive.Listed{}, err
	}
	taken := s.now().UTC().Truncate(time.Second)
	path := filepath.Join(s.cfg.Folder, archive.FileName(prefix, s.cfg.Node, taken))
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return archive.Listed{}, fmt.Errorf("%s exists already", path)
	}
	saved, err := s.save(ctx, path, taken, lock)
	if err == nil {
		s.log.Info("snapshot of the cluster saved", "file", saved.Path, "bytes", saved.Size, "revision", saved.Header.Revision)
		s.changed()
		err = s.store(ctx, saved.Path, prefix)
	}
	return saved, err
}

func (s *Saver) changed() {
	if s.cfg.Changed != nil {
		s.cfg.Changed()
	}
}

// removeLeftovers removes the files of a process that was killed while it took a snapshot.
func (s *Saver) removeLeftovers() error {
	entries, err := os.ReadDir(s.cfg.Folder)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, plainPrefix) || strings.HasPrefix(name, temporaryPrefix) && strings.HasSuffix(name, archive.Suffix) {
			if err := os.Remove(filepath.Join(s.cfg.Folder, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

func (s *Saver) save(ctx context.Context, path string, taken time.Time, lock archive.Lock) (_ archive.Listed, err error) {
	name := filepath.Base(path)
	plain, tmp := filepath.Join(s.cfg.Folder, plainPrefix+name), filepath.Join(s.cfg.Folder, temporaryPrefix+name)
	defer func() {
		for _, left := range []string{plain, tmp} {
			if rmErr := os.Remove(left); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
				err = errors.Join(err, rmErr)
			}
		}
	}()
	database, files, err := s.consistent(ctx, plain)
	if err != nil {
		return archive.Listed{}, err
	}
	ca, err := clusterOf(s.cfg.ServerDir)
	if err != nil {
		return archive.Listed{}, err
	}
	h := archive.Header{
		Kedge: s.cfg.Kedge, Kubernetes: s.cfg.Kubernetes, Cluster: ca, Node: s.cfg.Node, Taken: taken,
		Revision: database.Revision, Database: database.DatabaseSize(), Hash: database.Hash,
	}
	if err := datastore.CheckRoom(s.cfg.Folder, h.Database); err != nil {
		return archive.Listed{}, err
	}
	if err := writeArchive(ctx, tmp, plain, h, lock, files); err != nil {
		return archive.Listed{}, err
	}
	if err := verify(tmp, lock); err != nil {
		return archive.Listed{}, fmt.Errorf("the snapshot was read again: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return archive.Listed{}, err
	}
	if err := atomicfile.SyncDir(s.cfg.Folder); err != nil {
		return archive.Listed{}, err
	}
	st, err := os.Stat(path)
	if err != nil {
		return archive.Listed{}, err
	}
	h, err = archive.HeaderOf(path)
	return archive.Listed{Path: path, Size: st.Size(), Header: h, Taken: h.Taken}, err
}

// consistent saves the database in the file plain, with the files that belong to it: the key of Secrets may be replaced
// meanwhile, and one that is not in the files opens nothing.
func (s *Saver) consistent(ctx context.Context, plain string) (datastore.Snapshot, map[string][]byte, error) {
	for range keyAttempts {
		before, err := s.files()
		if err != nil {
			return datastore.Snapshot{}, nil, err
		}
		database, err := s.source.SaveSnapshot(ctx, plain)
		if err != nil {
			return datastore.Snapshot{}, nil, err
		}
		after, err := s.files()
		if err != nil || maps.EqualFunc(before, after, bytes.Equal) {
			return database, after, err
		}
		if err := os.Remove(plain); err != nil {
			return datastore.Snapshot{}, nil, err
		}
	}
	return datastore.Snapshot{}, nil, errors.New("the cluster's keys are being replaced; save the snapshot again when that has ended (\"kedge secrets-encrypt status\", \"kedge service-account-key status\")")
}

// files returns the files of an archive: what all servers have in common, the key of this server's node, and the cluster's
// settings.
func (s *Saver) files() (map[string][]byte, error) {
	files, err := keyFiles(s.cfg.ServerDir)
	if err != nil {
		return nil, err
	}
	if files[settingsFile], err = json.MarshalIndent(s.cluster, "", "  "); err != nil {
		return nil, err
	}
	return files, nil
}

// keyFiles reads the files with keys of the server in dir, by their path in it.
func keyFiles(dir string) (map[string][]byte, error) {
	out := map[string][]byte{}
	needed, optional := identity.SharedFiles()
	nodeKey, err := filepath.Rel(dir, identity.NodeKeyFile(dir))
	if err != nil {
		return nil, err
	}
	for _, name := range append(needed, nodeKey) {
		if out[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
			return nil, err
		}
	}
	for _, name := range append(optional, archive.KeyFile) {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		out[name] = data
	}
	return out, nil
}

// writeArchive writes an archive to a new file, durably, with the database in the file plain.
func writeArchive(ctx context.Context, path, plain string, h archive.Header, lock archive.Lock, files map[string][]byte) error {
	database, err := os.Open(plain)
	if err != nil {
		return err
	}
	defer database.Close()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	err = archive.Write(cancelled{ctx, atomicfile.NewStepWriter(f, nil)}, h, lock, maps.Clone(files), database)
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		// What is verified is then read from the disk. It is only an advice to the kernel.
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	return errors.Join(err, f.Close())
}

// cancelled is a writer that ends with its context.
type cancelled struct {
	ctx context.Context
	to  io.Writer
}

func (c cancelled) Write(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.to.Write(p)
}

// verify reads an archive to its end.
func verify(path string, lock archive.Lock) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = archive.Read(f, lock, io.Discard)
	return err
}
