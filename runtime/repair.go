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
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"

	"github.com/google/uuid"

	"kedge/internal/atomicfile"
)

// repairDatabases makes sure that containerd can open its databases. It sets a damaged database aside and gives
// up all data that depends on it: the layers, and the pods, which could no longer be stopped. The blobs are set
// aside too; Images restores the images from them when containerd runs.
func repairDatabases(ctx context.Context, c Config, log *slog.Logger) error {
	if err := checkDatabase(mountsDatabase(c)); err != nil {
		log.Warn("mount database is damaged, starting with an empty one", keyPath, mountsDatabase(c), keyError, err)
		if err := os.Remove(mountsDatabase(c)); err != nil {
			return err
		}
	}
	if err := repairName(c, log); err != nil {
		return err
	}
	var damaged []string
	for _, name := range databases(c) {
		if err := checkDatabase(name); err != nil {
			log.Error("containerd's database is damaged", keyPath, name, keyError, err)
			damaged = append(damaged, name)
		}
	}
	if len(damaged) == 0 { // checkContents reads only databases that passed checkDatabase
		if name, err := checkContents(ctx, c); err != nil {
			log.Error("containerd's database is damaged", keyPath, name, keyError, err)
			damaged = append(damaged, name)
		}
	}
	if len(damaged) == 0 {
		return nil
	}

	aside := filepath.Join(c.DataDir, "containerd-damaged-"+time.Now().UTC().Format("20060102T150405.000Z"))
	log.Error("all pods of this node are killed and its images restored, because of the damaged database", "kept_for_study", aside)
	if err := killAll(ctx, c, log); err != nil {
		return fmt.Errorf("kill the pods of a damaged database: %w", err)
	}
	if err := os.MkdirAll(aside, 0o700); err != nil {
		return err
	}
	for _, name := range damaged {
		to := filepath.Join(aside, filepath.Base(filepath.Dir(name))+"-"+filepath.Base(name))
		if err := os.Link(name, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if err := keepBlobs(c, aside); err != nil {
		return err
	}
	// The metadata database goes first. After a power failure the rest is either garbage, because nothing
	// refers to it, or found damaged again.
	if err := os.Remove(databases(c)[0]); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := atomicfile.SyncDir(c.root()); err != nil {
		return err
	}
	return emptyRoot(c)
}

// repairName removes containerd's UUID file if it is damaged: containerd creates a new file if it is missing,
// and refuses all requests of the kubelet if it is damaged.
func repairName(c Config, log *slog.Logger) error {
	file := filepath.Join(c.root(), "io.containerd.grpc.v1.introspection", "uuid")
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := uuid.Validate(strings.TrimSpace(string(text))); err == nil {
		return nil
	}
	log.Warn("containerd's UUID file is damaged and is created again", keyPath, file)
	return os.Remove(file)
}

// emptyRoot removes all folders of containerd's data except the temporary folder, and keeps kedge's own files.
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

// checkDatabase reads a whole bolt database and returns its fault; a missing file is no fault. Opening a
// damaged database in the usual way would end the process: bolt panics in its own goroutines, and reading
// beyond the end of a mapped file raises a signal.
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
	// SetPanicOnFault and recover work for this goroutine only, so all reads happen on it.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("file is damaged: %v", p)
		}
	}()
	// bolt would read the list of free pages in another goroutine; in read-only mode it does not.
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
	var sum byte // the sum is unused: reading touches every page, so that a missing page is found
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
