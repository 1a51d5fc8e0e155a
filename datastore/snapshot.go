package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"

	"kedge/datastore/integrity"
	"kedge/internal/atomicfile"
)

// Snapshot is a file with the content of the store at one moment. Its format is that of etcd's snapshots: the database, and
// its SHA-256 behind it.
type Snapshot struct {
	Path     string
	Size     int64  // of the file, in bytes
	Revision int64  // of the last write in it
	Hash     string // of the database, hexadecimal
}

// databaseUnit divides the size of every database, so that a missing hash is noticed.
const databaseUnit = 512

// SaveSnapshot writes a snapshot to a new file, reads it again, and checks it. It contains every write that was acknowledged
// by any member before the call, so it needs a majority. The file has its name only when it is complete, on disk, and
// checked. Its folder must exist. Only its owner can read it, since it holds everything that the store holds.
func (s *Store) SaveSnapshot(ctx context.Context, path string) (Snapshot, error) {
	t := s.transport.Load()
	if t == nil {
		return Snapshot{}, ErrNotServing
	}
	for _, alarm := range t.server.Alarms() {
		if alarm.Alarm == pb.AlarmType_CORRUPT {
			return Snapshot{}, ErrCorrupt
		}
	}
	// A linearizable read: this member has applied what others have acknowledged.
	now, err := kvClient{t}.Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)})
	if err != nil {
		return Snapshot{}, fmt.Errorf("read: %w", err)
	}
	s.fileMu.Lock()
	defer s.fileMu.Unlock()
	saved, err := saveSnapshot(path, volumeFree, t.server.Backend().Size(), func(w io.Writer) error { return t.writeSnapshot(ctx, w) })
	var bad *integrity.Damage
	if errors.As(err, &bad) {
		return Snapshot{}, damage(s.cfg.Dir, filepath.Join(s.cfg.Dir, memberDir, "snap", "db")+" "+bad.What)
	}
	if err == nil && saved.Revision < now.Header.Revision {
		err = errors.Join(fmt.Errorf("the snapshot ends at revision %d, and the datastore was at revision %d before", saved.Revision, now.Header.Revision), os.Remove(path))
	}
	if err != nil {
		return Snapshot{}, err
	}
	s.log.Info("snapshot of the datastore saved", "file", path, "bytes", saved.Size, "revision", saved.Revision)
	return saved, nil
}

// writeSnapshot writes the database as it is at one moment. Writes to the store go on meanwhile.
func (t *transport) writeSnapshot(ctx context.Context, w io.Writer) error {
	c, err := t.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer c.leave()
	return t.guard(func() error {
		snapshot := t.server.Backend().Snapshot()
		_, err := snapshot.WriteTo(writerFunc(func(p []byte) (int, error) {
			if c.ctx.Err() != nil {
				return 0, context.Cause(c.ctx)
			}
			return w.Write(p)
		}))
		return errors.Join(err, snapshot.Close())
	})
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// volumeFree returns the free bytes of the volume that holds dir.
func volumeFree(dir string) (int64, error) {
	_, free, err := volume(dir)
	return free, err
}

// DatabaseSize is the size of the database in the snapshot, in bytes.
func (s Snapshot) DatabaseSize() int64 { return s.Size - sha256.Size }

// CheckRoom returns an error if a file of size bytes in dir would leave the volume with too little space for a store: the
// store refuses writes when its volume is nearly full, and a snapshot must not bring that about.
func CheckRoom(dir string, size int64) error { return checkRoom(dir, volumeFree, size) }

func checkRoom(dir string, free func(dir string) (int64, error), size int64) error {
	have, err := free(dir)
	if err != nil {
		return err
	}
	if need := size + resumeFree; have < need {
		return fmt.Errorf("the file system of %s has %d MiB free, and a snapshot of the datastore needs %d MiB there; free some space", dir, have>>20, (need+1<<20-1)>>20)
	}
	return nil
}

// saveSnapshot makes a snapshot of the database that write writes, of about size bytes. A *[integrity.Damage] is that of the
// database. After any other error too there is no file.
func saveSnapshot(path string, free func(dir string) (int64, error), size int64, write func(io.Writer) error) (_ Snapshot, err error) {
	dir := filepath.Dir(path)
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		return Snapshot{}, fmt.Errorf("%s exists already", path)
	}
	if err := checkRoom(dir, free, size); err != nil {
		return Snapshot{}, err
	}
	tmp := filepath.Join(dir, ".tmp-"+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a process that was killed
		return Snapshot{}, err
	}
	defer func() {
		if err == nil {
			return
		}
		if left := os.Remove(tmp); !errors.Is(left, fs.ErrNotExist) {
			err = errors.Join(err, left)
		}
	}()
	if err := writeSnapshotFile(tmp, free, write); err != nil {
		return Snapshot{}, err
	}
	saved, err := VerifySnapshot(tmp)
	if err != nil {
		return Snapshot{}, err
	}
	saved.Path = path
	if err := os.Rename(tmp, path); err != nil {
		return Snapshot{}, err
	}
	if err := atomicfile.SyncDir(dir); err != nil {
		return Snapshot{}, errors.Join(err, os.Remove(path))
	}
	return saved, nil
}

// writeSnapshotFile writes a database and its hash to a new file, durably, and in steps.
func writeSnapshotFile(path string, free func(dir string) (int64, error), write func(io.Writer) error) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	sum := sha256.New()
	// A sync of the log, for which every write waits, may have to wait for everything that other files have written before.
	step := atomicfile.NewStepWriter(f, func() error {
		// Something else may be filling the volume.
		have, err := free(filepath.Dir(path))
		if err == nil && have < resumeFree {
			err = fmt.Errorf("the file system of %s has only %d MiB free; free some space", filepath.Dir(path), have>>20)
		}
		return err
	})
	err = write(io.MultiWriter(step, sum))
	if err == nil {
		_, err = f.Write(sum.Sum(nil))
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		// What is verified is then read from the disk. It is only an advice to the kernel.
		_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	return errors.Join(err, f.Close())
}

// EndSnapshot completes a snapshot file whose database was written to f: it adds the hash, in hexadecimal, and makes the file
// durable.
func EndSnapshot(f *os.File, hash string) error {
	sum, err := hex.DecodeString(hash)
	if err != nil || len(sum) != sha256.Size {
		return fmt.Errorf("%q is no SHA-256", hash)
	}
	if _, err := f.Write(sum); err != nil {
		return err
	}
	return f.Sync()
}

// VerifySnapshot reads a snapshot and checks it: all of it by its hash, and the structure of the database. The second finds
// what was damaged in the store already, as a *[integrity.Damage].
func VerifySnapshot(path string) (Snapshot, error) {
	f, err := os.Open(path)
	if err != nil {
		return Snapshot{}, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return Snapshot{}, err
	}
	if st.Size()%databaseUnit != sha256.Size {
		return Snapshot{}, fmt.Errorf("%s has %d bytes, and so is cut off or no snapshot of a datastore", path, st.Size())
	}
	sum := sha256.New()
	if _, err := io.CopyN(sum, f, st.Size()-sha256.Size); err != nil {
		return Snapshot{}, fmt.Errorf("read %s: %w", path, err)
	}
	want := make([]byte, sha256.Size)
	if _, err := io.ReadFull(f, want); err != nil {
		return Snapshot{}, fmt.Errorf("read %s: %w", path, err)
	}
	if !bytes.Equal(sum.Sum(nil), want) {
		return Snapshot{}, fmt.Errorf("%s is not as it was written; its disk may be failing", path)
	}
	revision, err := integrity.CheckDatabase(path)
	if err != nil {
		return Snapshot{}, err
	}
	return Snapshot{Path: path, Size: st.Size(), Revision: revision, Hash: hex.EncodeToString(want)}, nil
}
