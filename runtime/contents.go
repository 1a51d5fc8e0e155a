package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	bolt "go.etcd.io/bbolt"

	"kedge/internal/atomicfile"
)

// checkContents decodes the records of containerd's databases, whose files are intact, in the way containerd
// does: containerd does not start if it cannot decode a value. It returns the path of the damaged database and
// the fault.
func checkContents(ctx context.Context, c Config) (name string, err error) {
	name = databases(c)[0]
	if _, err := os.Stat(name); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("value cannot be decoded: %v", p)
		}
	}()
	db, err := bolt.Open(name, 0o600, &bolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return name, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	if err := decodeAll(ctx, db); err != nil {
		return name, err
	}
	return missingLayers(c, db)
}

// decodeAll decodes every record that containerd reads at its start.
func decodeAll(ctx context.Context, db *bolt.DB) error {
	var known []string
	err := db.View(func(tx *bolt.Tx) error {
		var err error
		known, err = metadata.NewNamespaceStore(tx).List(ctx)
		return err
	})
	if err != nil {
		return fmt.Errorf("list namespaces: %w", err)
	}
	m := metadata.NewDB(db, struct{ content.Store }{}, nil) // the blobs themselves are not read
	for _, ns := range known {
		ctx := namespaces.WithNamespace(ctx, ns)
		for what, list := range map[string]func() error{
			"containers": func() error { _, err := metadata.NewContainerStore(m).List(ctx); return err },
			"images":     func() error { _, err := metadata.NewImageStore(m).List(ctx); return err },
			"leases":     func() error { _, err := metadata.NewLeaseManager(m).List(ctx); return err },
			"sandboxes":  func() error { _, err := metadata.NewSandboxStore(m).List(ctx); return err },
			"blobs":      func() error { return m.ContentStore().Walk(ctx, func(content.Info) error { return nil }) },
		} {
			if err := list(); err != nil {
				return fmt.Errorf("list %s of namespace %s: %w", what, ns, err)
			}
		}
	}
	return nil
}

// missingLayers returns the path of a snapshotter's database that is missing although the metadata database
// lists layers in it.
func missingLayers(c Config, db *bolt.DB) (name string, err error) {
	err = db.View(func(tx *bolt.Tx) error {
		v1 := tx.Bucket([]byte("v1"))
		if v1 == nil {
			return nil
		}
		return v1.ForEachBucket(func(ns []byte) error {
			snapshotters := v1.Bucket(ns).Bucket([]byte("snapshots"))
			if snapshotters == nil {
				return nil
			}
			return snapshotters.ForEachBucket(func(snapshotter []byte) error {
				if key, _ := snapshotters.Bucket(snapshotter).Cursor().First(); key == nil {
					return nil
				}
				name = filepath.Join(c.root(), "io.containerd.snapshotter.v1."+string(snapshotter), "metadata.db")
				_, err := os.Stat(name)
				return err
			})
		})
	})
	return name, err
}

// repairBlobs writes the blobs of the pause image again if their files are missing or have a wrong content.
// containerd trusts its record of a blob and does not check the file.
func (p *pauseImage) repairBlobs(c Config) (mended []string, err error) {
	dir := filepath.Join(c.root(), "io.containerd.content.v1.content", "blobs", "sha256")
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil // nothing has been stored yet
	}
	for _, b := range p.blobs {
		name := filepath.Join(dir, b.desc.Digest.Encoded())
		held, err := os.ReadFile(name)
		if err == nil && string(held) == string(b.data) {
			continue
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return mended, err
		}
		if err := atomicfile.Write(name, b.data, 0o444); err != nil {
			return mended, err
		}
		mended = append(mended, name)
	}
	return mended, nil
}
