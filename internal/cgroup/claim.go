package cgroup

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrClaimed is wrapped when another process has claimed the cgroup.
var ErrClaimed = errors.New("the node's control group is in use")

// Claim locks the cgroup of a node, so that no second node of the same name on this machine
// shares it, or links and rules with the same names. The end of the process, or release,
// releases the lock. root must exist; for systemd it is "/" and the name of the slice.
func Claim(root string) (release func() error, err error) {
	dir := filepath.Join(mountPoint, root)
	if !Unified() {
		dir = filepath.Join(mountPoint, "memory", root)
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("claim cgroup %s: %w", root, err)
	}
	if err := unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		d.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("%w: another kedge on this machine uses %s; give this node another name with --node-name", ErrClaimed, root)
		}
		return nil, fmt.Errorf("claim cgroup %s: %w", root, err)
	}
	return d.Close, nil
}
