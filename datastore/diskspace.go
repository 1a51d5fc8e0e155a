package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/sys/unix"
)

const (
	// reserveFile occupies space that is released when the volume is full, for writes that must not fail then.
	reserveFile = "reserve"
	reserveSize = int64(64 << 20)
	// minFree is the free space below which writes are refused. The log allocates its next file of 8 MB in advance, the
	// database grows by 16 MB at a time, and deletions are written too. etcd ends when the volume is full, and does not
	// start again on a full one.
	minFree = int64(32 << 20)
	// resumeFree is the free space from which writes are accepted again.
	resumeFree = 2 * minFree
	// reserveMinFree is the free space from which the reserve is allocated, so that it does not take space that other
	// programs need.
	reserveMinFree = 8 * reserveSize

	// diskCheckInterval is the interval of checks, and lowDiskCheckInterval that below lowFree bytes. Changes wait in
	// memory for a while before they occupy space, and must not exceed the free space.
	diskCheckInterval, lowDiskCheckInterval = time.Second, 100 * time.Millisecond
	lowFree                                 = resumeFree + minFree

	// checkBytes is the number of written bytes after which the volume is checked without waiting for the interval. It is
	// much less than the log nearly always has left in its allocated file, so the check comes before a volume that fills
	// suddenly ends the store.
	checkBytes = 64 << 10
)

// ErrDiskFull means that the volume has too little free space, so that writes are refused.
var ErrDiskFull = errors.New("the volume of the datastore is full")

// diskSpace watches the free space on the volume, and keeps the store from filling it to the last byte.
//
//	plenty ──below minFree──► reserve released ──below minFree──► writes refused
//	   ▲                             │                                   │
//	   └────from reserveMinFree──────┴──────────from resumeFree──────────┘
//
// It concerns this member only. If another member leads, the others go on.
type diskSpace struct {
	dir  string
	log  *slog.Logger
	free func() (int64, error)
	// commit writes the changes that wait in memory to the database file; nil before the store is open.
	commit func()

	writesRefused atomic.Bool

	checkMu        sync.Mutex   // held during a check
	uncheckedBytes atomic.Int64 // written since the last check
}

func newDiskSpace(dir string, log *slog.Logger) *diskSpace {
	return &diskSpace{dir: dir, log: log, free: func() (int64, error) {
		_, free, err := volume(dir)
		return free, err
	}}
}

// ReleaseReserve releases the reserve of the store in dir if the volume is full. Call it at a start, before anything is
// written.
func ReleaseReserve(dir string, log *slog.Logger) error {
	d := newDiskSpace(dir, log)
	free, err := d.free()
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil && free < minFree {
		_, err = d.releaseReserve(free)
	}
	return err
}

func (d *diskSpace) reservePath() string { return filepath.Join(d.dir, reserveFile) }

// releaseReserve removes the reserve and reports whether there was one.
func (d *diskSpace) releaseReserve(free int64) (bool, error) {
	err := os.Remove(d.reservePath())
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		d.log.Warn("the disk is nearly full: the datastore has released its reserve; free some disk space", "dir", d.dir, "free", free)
	}
	return err == nil, err
}

// watch checks the volume until ctx ends.
func (d *diskSpace) watch(ctx context.Context) {
	logged := ""
	for {
		wait := diskCheckInterval
		if free, err := d.free(); err == nil && free < lowFree {
			wait = lowDiskCheckInterval
		}
		sleep(ctx, wait)
		if ctx.Err() != nil {
			return
		}
		if err := d.check(); err != nil && err.Error() != logged {
			logged = err.Error()
			d.log.Warn("cannot check the free disk space of the datastore", "err", err)
		}
	}
}

// noteWrite counts bytes that are about to be written, and checks the volume after each checkBytes of them.
func (d *diskSpace) noteWrite(bytes int) {
	if d.uncheckedBytes.Add(int64(bytes)) < checkBytes {
		return
	}
	// watch logs the error.
	_ = d.check()
}

// check checks the volume once: it releases or allocates the reserve, and refuses or accepts writes.
func (d *diskSpace) check() error {
	d.checkMu.Lock()
	defer d.checkMu.Unlock()
	d.uncheckedBytes.Store(0)
	free, err := d.free()
	if err != nil {
		return err
	}
	if free < minFree {
		if released, err := d.releaseReserve(free); released || err != nil {
			if err != nil {
				return err
			}
			if free, err = d.free(); err != nil {
				return err
			}
		}
	}
	// With nearly no space left there is no commit: if it does not fit, it ends the store.
	if free < lowFree && free >= minFree/2 && !d.writesRefused.Load() && d.commit != nil {
		d.commit()
		if free, err = d.free(); err != nil {
			return err
		}
	}
	switch {
	case free < minFree && !d.writesRefused.Swap(true):
		d.log.Error("the disk is full: the API takes no changes but deletions until there is room", "dir", d.dir, "free", free, "needed", resumeFree)
	case free >= resumeFree && d.writesRefused.Swap(false):
		d.log.Info("the disk has room again: the API takes changes", "dir", d.dir, "free", free)
	}
	if free >= reserveMinFree {
		return d.allocateReserve()
	}
	return nil
}

// allocateReserve creates the reserve if it does not exist.
func (d *diskSpace) allocateReserve() error {
	if st, err := os.Stat(d.reservePath()); err == nil && st.Size() == reserveSize {
		return nil
	}
	f, err := os.OpenFile(d.reservePath(), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	err = unix.Fallocate(int(f.Fd()), 0, 0, reserveSize)
	if errors.Is(err, unix.EOPNOTSUPP) {
		err = f.Truncate(reserveSize) // this file system has no cheap way to reserve space; the file reserves none
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("reserve disk space: %w", err), os.Remove(d.reservePath()))
	}
	return nil
}

// compactKey is the key in which the API server records its compactions. They free space, so their writes pass.
const compactKey = "compact_rev_key"

// valueBytes returns the number of bytes of values that a transaction may write.
func valueBytes(txn *pb.TxnRequest) (n int) {
	for _, ops := range [][]*pb.RequestOp{txn.GetSuccess(), txn.GetFailure()} {
		for _, op := range ops {
			n += len(op.GetRequestPut().GetValue())
			if inner := op.GetRequestTxn(); inner != nil {
				n += valueBytes(inner)
			}
		}
	}
	return n
}

// hasPuts reports whether either branch of a transaction writes anything but deletions.
func hasPuts(txn *pb.TxnRequest) bool {
	for _, ops := range [][]*pb.RequestOp{txn.GetSuccess(), txn.GetFailure()} {
		for _, op := range ops {
			if put := op.GetRequestPut(); put != nil && string(put.Key) != compactKey || op.GetRequestTxn() != nil && hasPuts(op.GetRequestTxn()) {
				return true
			}
		}
	}
	return false
}
