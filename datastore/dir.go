package datastore

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
)

const (
	// lockFile is locked by the process that has the store open.
	lockFile = "lock"
	// newFile exists from before the creation of the store until the store was first ready.
	newFile = "new"
	// openedFile exists while the last file of the log has the size with which it was allocated: from when etcd has opened the
	// store until it is about to open it again, when it cuts the file off behind the last record and allocates the rest anew.
	// That may fail, as on a full disk, where a file can be removed, but not written.
	openedFile = "opened"
	// memberDir is the name that etcd gives its directory.
	memberDir = "member"
)

// openDir locks the data directory and removes what an interrupted start has left. The lock lasts until the returned
// function is called or the process ends.
//
// joins means that a store that does not exist yet is to join other members. exists means that the directory held a store
// before.
func openDir(dir string, joins, exists bool) (release func() error, err error) {
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
	if err := cleanDir(dir, joins, exists); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock.Close, nil
}

// lockDir locks the directory while the returned file is open.
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

// cleanDir removes what a crash may have left behind. A store that existed before and is missing is an error.
func cleanDir(dir string, joins, exists bool) error {
	marker, member := filepath.Join(dir, newFile), filepath.Join(dir, memberDir)
	holds, err := HoldsStore(dir)
	if err != nil {
		return err
	}
	if _, err := os.Stat(marker); !holds && exists && errors.Is(err, os.ErrNotExist) {
		return Lost(dir)
	}
	if joins && !holds {
		// This is the first start of a member that joins, or an earlier one was interrupted. Without a log the member has
		// acknowledged nothing to the others, so everything can be removed. A log must be kept, because the others may
		// already rely on it. The log may be incomplete at its beginning: the member gets the rest from the others.
		if err := errors.Join(os.RemoveAll(member), os.RemoveAll(marker)); err != nil {
			return err
		}
		return atomicfile.SyncDir(dir)
	}
	switch _, err := os.Stat(marker); {
	case err == nil:
		// The very first start was interrupted. etcd cannot start from a log without its first entries. The store has
		// never served a client, so it is created again.
		if err := os.RemoveAll(member); err != nil {
			return err
		}
		return atomicfile.SyncDir(dir)
	case !errors.Is(err, os.ErrNotExist):
		return err
	}

	switch _, err := os.Stat(member); {
	case err == nil && !holds:
		return Lost(dir) // a first start writes the marker first, and the log before the rest of the store
	case errors.Is(err, os.ErrNotExist):
		if err := os.WriteFile(marker, nil, 0o600); err != nil {
			return err
		}
		// The marker must be on disk before the store.
		return atomicfile.SyncDir(dir)
	case err != nil:
		return err
	}

	// Copies of the database from interrupted defragmentations.
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

// Lost returns the error for a store that existed in dir and is missing.
func Lost(dir string) error {
	what := dir
	for _, below := range []string{memberDir, filepath.Join(memberDir, "wal")} {
		if _, err := os.Stat(filepath.Join(dir, below)); err != nil {
			break
		}
		what = filepath.Join(dir, below)
	}
	logFile := ""
	if book, err := peers.OpenAddressBook(dir, ""); err == nil {
		logFile = book.Get().Log
	}
	switch entries, err := os.ReadDir(what); {
	case filepath.Base(what) == "wal" && logFile != "":
		what = filepath.Join(what, logFile) + " is missing"
	case err != nil:
		what += " is missing"
	case len(entries) == 0:
		what += " is empty"
	case what == dir:
		what = filepath.Join(dir, memberDir) + " is missing"
	case filepath.Base(what) == memberDir:
		what = filepath.Join(what, "wal") + " is missing"
	default:
		what += " has no file of the log"
	}
	return errorkind.Permanent(fmt.Errorf("%w: %s; if a file system is not mounted there, mount it; otherwise %s", ErrDamaged, what, remedy(dir)))
}

// LostWitness is [Lost] for the store of a witness.
func LostWitness(dir string) error {
	return errorkind.Permanent(fmt.Errorf("%w: %s has no datastore; if a file system is not mounted there, mount it; otherwise %s", ErrDamaged, dir, remedyOfWitness))
}

// remedyOfWitness is [remedy] for a witness, which has nothing that the servers do not have.
const remedyOfWitness = "remove this witness with \"kedge server remove\" on a server, and let it join in an empty data directory, with --server and a token that " +
	"\"kedge token create --role witness\" makes there"

// remedy says what to do when the store in dir is damaged or lost.
func remedy(dir string) string {
	return "restore a snapshot with \"kedge snapshot restore\", or, if the cluster has other servers, " + joinAnew(dir)
}

// joinAnew says how a server of several gets the data of the others in the place of its own.
func joinAnew(dir string) string {
	return fmt.Sprintf("set %s aside with \"kedge server reset\" and join this server anew, with --server and a token that "+
		"\"kedge token create --role server\" makes there", dir)
}

// damage returns the error for a store whose files are damaged.
func damage(dir, what string) error {
	return errorkind.Permanent(fmt.Errorf("%w: %s; %s", ErrDamaged, what, remedy(dir)))
}

// damage returns the error for this store, whose files are damaged.
func (s *Store) damage(what string) error {
	if s.cfg.Witness {
		return errorkind.Permanent(fmt.Errorf("%w: %s; %s", ErrDamaged, what, remedyOfWitness))
	}
	return damage(s.cfg.Dir, what)
}

// markCreated records that the store exists, so that it is never created again.
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

// markOpening records that etcd is about to open the store, before it does.
func markOpening(dir string) error {
	err := os.Remove(filepath.Join(dir, openedFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return atomicfile.SyncDir(dir)
}

// markOpened records that etcd has opened the store completely, unless the last file of the log is shorter than it was allocated:
// so it stays until the next file, if etcd had to cut off a torn record.
func markOpened(dir string) error {
	name, err := integrity.NewestLogFile(dir)
	if err != nil {
		return err
	}
	st, err := os.Stat(filepath.Join(dir, memberDir, "wal", name))
	if err != nil {
		return err
	}
	if st.Size() < walSegment {
		return nil
	}
	if err := os.WriteFile(filepath.Join(dir, openedFile), nil, 0o600); err != nil {
		return err
	}
	return atomicfile.SyncDir(dir)
}

// wasOpened reports whether etcd has opened the store completely when it last opened it.
func wasOpened(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, openedFile))
	return err == nil
}

// volume returns the size and the free space, in bytes, of the volume that holds dir.
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
	// minQuota allows a store on a tiny volume; a cluster without load needs about 10 MiB.
	minQuota = int64(64 << 20)
)

// quota returns the configured quota, or a quarter of a volume of the given size within fixed bounds. It is not more than
// that, because a defragmentation needs space for a second copy.
func (c Config) quota(volumeSize int64) int64 {
	if c.Quota > 0 {
		return c.Quota
	}
	limit := maxQuota
	if strconv.IntSize == 32 {
		// The whole file is mapped into memory.
		limit = 512 << 20
	}
	return max(min(volumeSize/4, limit), minQuota)
}
