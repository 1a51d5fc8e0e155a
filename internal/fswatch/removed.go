package fswatch

import (
	"context"
	"os"
	"time"
)

// Interval is the interval at which files are checked. A service whose file is gone is
// unreachable until then; inotify's watches are too few to use one for each file.
const Interval = 5 * time.Second

// Removed returns the first of the files that was removed or replaced since the call, or ""
// when ctx ends before. A file that does not exist at the call counts as removed. A process
// that listens on a socket is not notified of the removal of the socket's file, after which no
// client can reach it. Changes of a file's content do not count.
func Removed(ctx context.Context, files ...string) string {
	was := make([]os.FileInfo, len(files))
	for i, name := range files {
		was[i], _ = os.Lstat(name)
	}
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for {
		for i, name := range files {
			now, err := os.Lstat(name)
			if os.IsNotExist(err) || err == nil && was[i] != nil && !os.SameFile(was[i], now) {
				return name
			}
		}
		select {
		case <-ctx.Done():
			return ""
		case <-tick.C:
		}
	}
}
