package datastore

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
	"kedge/internal/atomicfile"
	"kedge/internal/logging"
)

// revisionGap is how far the first revision of a restored store is above the highest one that is known to have been handed
// out. It covers what a store wrote after that one was seen.
const revisionGap = 1_000_000_000

// RestoreSnapshot makes the store of a new cluster with one member from a snapshot file, in a directory that does not exist
// or is empty. The file is verified first. The caller opens the directory with a [Store] of the same member name; it is
// durable and sealed.
//
// Clients must not take the restored state for a later one of the state that they have seen. So the next revision is higher
// than that of the snapshot and than above, by a thousand million, and all revisions before it count as compacted: every
// watch of before ends, and its client lists anew (kubernetes/kubernetes#107457 is what happens otherwise). above is the
// highest revision that the caller knows to have been handed out; 0 for none.
//
// It needs as much space again as the snapshot has. After an error the directory holds what was written until then.
func RestoreSnapshot(path, dir, memberName string, above int64, log *slog.Logger) (Snapshot, error) {
	saved, err := VerifySnapshot(path)
	if err != nil {
		return Snapshot{}, err
	}
	first := max(saved.Revision, above)
	if first > math.MaxInt64/2 {
		return Snapshot{}, fmt.Errorf("revision %d is too high to be one", first)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Snapshot{}, err
	}
	setWALSegment()
	book := peers.NewAddressBook(dir, memberName)
	url := book.Self().URL
	err = restore(snapshot.RestoreConfig{
		SnapshotPath: path, OutputDataDir: dir, Name: memberName,
		PeerURLs: []string{url}, InitialCluster: memberName + "=" + url, InitialClusterToken: newClusterToken(),
		RevisionBump: uint64(first - saved.Revision + revisionGap), MarkCompacted: true,
	}, log)
	if err != nil {
		return Snapshot{}, fmt.Errorf("make a datastore from %s: %w", path, err)
	}
	if err := finishRestore(dir, book); err != nil {
		return Snapshot{}, err
	}
	saved.Revision = first + revisionGap
	return saved, nil
}

// restore calls etcd's function, which panics where a disk is full or a file cannot be read.
func restore(c snapshot.RestoreConfig, log *slog.Logger) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("etcd: %v", p)
		}
	}()
	return snapshot.NewV3(logging.Zap(log).WithOptions(zap.WithFatalHook(zapcore.WriteThenPanic))).Restore(c)
}

// finishRestore records the identity and the checksums of a new store, and makes its folders durable.
func finishRestore(dir string, book *peers.AddressBook) error {
	id, err := integrity.ReadIdentity(dir)
	if err != nil {
		return err
	}
	if err := book.Identify(types.ID(id.Cluster).String(), types.ID(id.Member).String()); err != nil {
		return err
	}
	sum, err := integrity.Seal(dir)
	if err == nil {
		err = book.SetSeal(sum)
	}
	if err != nil {
		return err
	}
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		return atomicfile.SyncDir(path)
	})
}

// OtherMembers returns the other members that the store in dir knows, which is closed; none if there is no store, or if its
// address book is damaged.
func OtherMembers(dir string) ([]Peer, error) {
	b, err := peers.OpenAddressBook(dir, "")
	if errors.Is(err, peers.ErrBookDamaged) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return b.Get().Others, nil
}

// HighestRevision returns the highest revision in the database of the store in dir, which is closed, and 0 if there is no
// store. A store may have acknowledged later writes, which only its log holds.
func HighestRevision(dir string) (int64, error) {
	revision, err := integrity.CheckDatabase(filepath.Join(dir, memberDir, "snap", "db"))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return revision, err
}
