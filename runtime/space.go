package runtime

import (
	"context"
	"fmt"
	"time"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// fullError means that images do not fit on the disk.
type fullError struct {
	dir      string
	needs    int64 // a minimum in bytes; 0 if unknown
	free     int64
	reserved int64 // bytes that must stay free
}

func (e *fullError) Error() string {
	needs := "more than there is"
	if e.needs > 0 {
		needs = "at least " + units.BytesSize(float64(e.needs))
	}
	return fmt.Sprintf("does not fit on the disk of %s: it needs %s; %s are free, of which %s are reserved for the node; free some space, for example with \"kedge images rm\", or use a larger disk",
		e.dir, needs, units.BytesSize(float64(e.free)), units.BytesSize(float64(e.reserved)))
}

// of returns the error for an archive. It is not an archiveError, because that is stored in the import record,
// and the disk may have space at the next start.
func (e *fullError) of(file string) error { return fmt.Errorf("image archive %s %w", file, e) }

// reservedSpace returns the space that images must leave free on a disk, in bytes: the kubelet's eviction
// threshold, and the space that the datastore needs to continue. On a small disk it is a tenth.
func reservedSpace(size int64) int64 { return max(size/20, min(size/10, 320<<20)) }

// statfs is a variable so that tests can replace it.
var statfs = func(dir string) (size, free int64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, 0, fmt.Errorf("read the free space of %s: %w", dir, err)
	}
	return int64(fs.Blocks) * fs.Frsize, int64(fs.Bavail) * fs.Frsize, nil
}

// fits returns an error if there is no space even for the archive itself, which has the given size in bytes.
func (l layers) fits(file string, bytes int64) error {
	size, free, err := statfs(l.dir)
	if err != nil {
		return err
	}
	if reserved := reservedSpace(size); free-bytes < reserved {
		return (&fullError{l.dir, bytes, free, reserved}).of(file)
	}
	return nil
}

// spaceInterval is the interval between checks of the free space. A fast disk writes about a hundred megabytes in
// that time.
const spaceInterval = 100 * time.Millisecond

// watchSpace returns a context that is cancelled, with a fullError as cause, before the disk of dir is full.
func watchSpace(ctx context.Context, dir string) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(spaceInterval)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			size, free, err := statfs(dir)
			if err != nil {
				continue // the import itself reports errors of the disk
			}
			if reserved := reservedSpace(size); free < reserved {
				cancel(&fullError{dir: dir, free: free, reserved: reserved})
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}
