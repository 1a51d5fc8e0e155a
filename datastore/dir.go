package datastore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
)

const (
	// lockFile is held locked by the process that has the store open.
	lockFile = "lock"
	// newFile is there from before the store is first created until it has first been ready.
	newFile = "new"
	// memberDir is etcd's own directory name.
	memberDir = "member"
)

// openDir takes sole possession of the data directory and brings it into a state that can be opened. The
// directory is free again when the returned function is called, or the process ends however it may.
//
// joins says that the store, if it is not there yet, is to become a member of one that others have.
func openDir(dir string, joins bool) (release func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return nil, err
	}
	lock, err := lockDir(dir)
	if err != nil {
		return nil, err
	}
	if err := cleanDir(dir, joins); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock.Close, nil
}

// lockDir locks the directory for as long as the returned file is open.
func lockDir(dir string) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrInUse
		}
		return nil, errors.Join(fmt.Errorf("lock: %w", err), lock.Close())
	}
	return lock, nil
}

// cleanDir removes what a crash may have left behind.
func cleanDir(dir string, joins bool) error {
	marker, member := filepath.Join(dir, newFile), filepath.Join(dir, memberDir)
	if holds, err := HoldsStore(dir); err != nil {
		return err
	} else if joins && !holds {
		// The first start of a member that joins was cut short, or is this one. Without a log it has promised
		// nothing to the others, so what there is can go. With one it must not: they may have counted on it
		// already. And its log need not begin with the members, which it gets from the others.
		if err := errors.Join(os.RemoveAll(member), os.RemoveAll(marker)); err != nil {
			return err
		}
		return atomicfile.SyncDir(dir)
	}
	switch _, err := os.Stat(marker); {
	case err == nil:
		// The very first start was cut short. etcd cannot start again from a log without its first entries,
		// and nobody has ever been served from this one, so begin afresh.
		if err := os.RemoveAll(member); err != nil {
			return err
		}
		return atomicfile.SyncDir(dir)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}

	switch _, err := os.Stat(member); {
	case errors.Is(err, os.ErrNotExist):
		if err := os.WriteFile(marker, nil, 0o600); err != nil {
			return err
		}
		// The marker must be on disk before anything that it speaks of.
		return atomicfile.SyncDir(dir)
	case err != nil:
		return err
	}

	// Copies made by a defragmentation that did not end.
	left, err := filepath.Glob(filepath.Join(member, "snap", "db.tmp.*"))
	if err != nil {
		return err
	}
	for _, name := range left {
		if err := os.Remove(name); err != nil {
			return err
		}
	}
	return nil
}

// markCreated records that the store exists from now on and is never again begun afresh.
func markCreated(dir string) error {
	err := os.Remove(filepath.Join(dir, newFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(dir)
}

// volume returns the size of the volume that holds dir and what is free on it, in bytes.
func volume(dir string) (size, free int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	// The field types differ between architectures.
	block := int64(fs.Bsize)                                       //nolint:unconvert
	return int64(fs.Blocks) * block, int64(fs.Bavail) * block, nil //nolint:unconvert
}

const (
	maxQuota = int64(2 << 30)
	// minQuota lets a store exist on a tiny volume; a cluster without load needs about 10 MiB.
	minQuota = int64(64 << 20)
)

// quota is the configured quota, or a quarter of a volume of the given size within sensible bounds. Not more,
// because a defragmentation needs room for a second copy.
func (c Config) quota(volumeSize int64) int64 {
	if c.Quota > 0 {
		return c.Quota
	}
	limit := maxQuota
	if strconv.IntSize == 32 {
		// The file is mapped into memory in one piece.
		limit = 512 << 20
	}
	return max(min(volumeSize/4, limit), minQuota)
}
