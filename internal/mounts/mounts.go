// Package mounts detaches mounts that processes have left below a folder, and tries whether
// a file system can carry overlayfs.
//
// It leaves nothing mounted. Any package of kedge may import it.
package mounts

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// DetachBelow detaches every mount point below dir, the deepest first, and dir itself if it
// is a mount point. A mount that is in use disappears with its last user.
func DetachBelow(dir string) error {
	points, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		return m.Mountpoint != dir && !strings.HasPrefix(m.Mountpoint, dir+"/"), false
	})
	if err != nil {
		return fmt.Errorf("list the mounts below %s: %w", dir, err)
	}
	var errs []error
	// The list is in the order of mounting: a mount on top of another came later.
	for _, m := range slices.Backward(points) {
		if err := unix.Unmount(m.Mountpoint, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.Mountpoint, err))
		}
	}
	return errors.Join(errs...)
}
