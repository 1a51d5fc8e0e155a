package runtime

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	bolt "go.etcd.io/bbolt"

	"kedge/internal/atomicfile"
)

// repairDatabases makes sure that containerd can open its databases. One that is
// damaged is set aside, and with it goes everything that only it could name: the
// layers and blobs, and the pods, which nobody could stop any more otherwise. Images
// from the images folder are imported again, others are pulled again.
func repairDatabases(ctx context.Context, c Config, log *slog.Logger) error {
	if err := checkDatabase(mountsDatabase(c)); err != nil {
		log.Warn("mount database is damaged, starting with an empty one", keyPath, mountsDatabase(c), keyError, err)
		if err := os.Remove(mountsDatabase(c)); err != nil {
			return err
		}
	}
	var damaged []string
	for _, name := range databases(c) {
		if err := checkDatabase(name); err != nil {
			log.Error("containerd's database is damaged", keyPath, name, keyError, err)
			damaged = append(damaged, name)
		}
	}
	if len(damaged) == 0 {
		return nil
	}

	aside := filepath.Join(c.DataDir, "containerd-damaged-"+time.Now().UTC().Format("20060102T150405.000Z"))
	log.Error("pods of this node are ended and its images fetched again, because the record of them is damaged", "kept_for_study", aside)
	if err := killAll(ctx, c, log); err != nil {
		return fmt.Errorf("end the pods of a damaged record: %w", err)
	}
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return err
	}
	for _, name := range damaged {
		to := filepath.Join(aside, filepath.Base(filepath.Dir(name))+"-"+filepath.Base(name))
		if err := os.Link(name, to); err != nil {
			return err
		}
	}
	// The names go first. Whatever is then left when the power goes is either
	// collected, as nothing refers to it, or found damaged again.
	if err := os.Remove(databases(c)[0]); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := atomicfile.SyncDir(c.root()); err != nil {
		return err
	}
	return emptyRoot(c)
}

// emptyRoot removes all that containerd keeps, but for our own small files.
func emptyRoot(c Config) error {
	entries, err := os.ReadDir(c.root())
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.IsDir() && e.Name() != filepath.Base(c.tempDir()) {
			errs = append(errs, os.RemoveAll(filepath.Join(c.root(), e.Name())))
		}
	}
	return errors.Join(append(errs, atomicfile.SyncDir(c.root()))...)
}

// checkDatabase reads all of a bolt file, or reports that there is none to read.
// Opening a damaged one the usual way would end the process: bolt panics in
// goroutines of its own, and reading past the end of a mapped file is a signal.
func checkDatabase(name string) (err error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.Size() == 0 {
		return errors.New("file is empty")
	}
	// Both hold for this goroutine alone, so everything is read on it.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("file is not whole: %v", p)
		}
	}()
	// Read-only: does not load the list of free pages, which bolt would do elsewhere.
	db, err := bolt.Open(name, 0o600, &bolt.Options{ReadOnly: true, Timeout: 10 * time.Second})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	return db.View(func(tx *bolt.Tx) error {
		if tx.Size() > info.Size() {
			return fmt.Errorf("file has %d of %d bytes", info.Size(), tx.Size())
		}
		return tx.ForEach(func(_ []byte, b *bolt.Bucket) error { return readBucket(b) })
	})
}

func readBucket(b *bolt.Bucket) error {
	var sum byte // reading is the point: a page that is missing shows when touched
	return b.ForEach(func(k, v []byte) error {
		for _, c := range k {
			sum ^= c
		}
		for _, c := range v {
			sum ^= c
		}
		if v == nil {
			if child := b.Bucket(k); child != nil {
				return readBucket(child)
			}
		}
		return nil
	})
}
