package appliance

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// ErrAtWork means that another command changes the installation at the same time.
var ErrAtWork = errors.New("another \"kedge install\", \"kedge upgrade\" or \"kedge uninstall\" is at work")

// alone makes this process the only one that changes the installation of an existing data directory, until the file is closed.
// The lock is that of the directory itself: the running node has the lock of a file in it.
func (m Machine) alone(dataDir string) (*os.File, error) {
	dir, err := os.Open(m.path(dataDir))
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = fmt.Errorf("%w with %s; run this one again when it has ended", ErrAtWork, dataDir)
		}
		return nil, errors.Join(err, dir.Close())
	}
	return dir, nil
}
