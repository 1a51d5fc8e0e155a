// Package mounts finds and detaches what is mounted below a folder, for cleaning
// up after processes that are gone.
//
// It is not for mounting. Any package of kedge may import it.
package mounts

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// DetachBelow detaches every mount point below dir, the deepest first; dir itself
// too when it is one. A mount that is in use disappears when its last user does.
func DetachBelow(dir string) error {
	points, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != dir && !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	var errs []error
	// The list is in the order of mounting: what is on top of something came later.
	for _, m := range slices.Backward(points) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}
