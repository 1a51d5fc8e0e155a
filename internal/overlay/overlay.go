// Package overlay finds out whether layers of images can be stacked with overlayfs on a
// file system: by stacking two, since no list of file systems would be right for long.
//
// It is for the check of the machine and for the choice of containerd's snapshotter, which
// must not come to different answers. It mounts nothing that stays.
package overlay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kedge/internal/sparethread"
)

// Try stacks two layers in a new folder of dir whose name begins with prefix, and removes
// it. The mount is made in a mount namespace of its own and disappears with it.
func Try(dir, prefix string) error {
	top, err := os.MkdirTemp(dir, prefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(top)
	for _, d := range []string{"lower", "upper", "work", "merged"} {
		if err := os.Mkdir(filepath.Join(top, d), 0o700); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(top, "lower", "file"), nil, 0o600); err != nil {
		return err
	}
	if err := hasTypes(top); err != nil {
		return err
	}
	return sparethread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("make a mount namespace: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fmt.Errorf("make mounts private: %w", err)
		}
		in := func(d string) string { return filepath.Join(top, d) }
		options := "lowerdir=" + in("lower") + ",upperdir=" + in("upper") + ",workdir=" + in("work")
		if err := unix.Mount("overlay", in("merged"), "overlay", 0, options); err != nil {
			return err
		}
		// Replacing a file of the lower layer needs what the mount alone does
		// not: extended attributes and character devices in the upper one.
		err := os.Remove(filepath.Join(in("merged"), "file"))
		return errors.Join(err, unix.Unmount(in("merged"), unix.MNT_DETACH))
	})
}

var errNoTypes = errors.New("its lists of files do not say what is a folder (XFS made without ftype=1)")

// hasTypes looks at a folder that is not empty. The kernel mounts an overlay without
// types, and files that were removed stay in its lists.
func hasTypes(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 4096)
	n, err := unix.ReadDirent(int(f.Fd()), buf)
	if err != nil {
		return fmt.Errorf("list %s: %w", dir, err)
	}
	return typesIn(buf[:n])
}

// typesIn looks at entries of a folder as the kernel gives them: of struct
// linux_dirent64 the record's length is at 16, the type at 18.
func typesIn(entries []byte) error {
	for b := entries; len(b) > 18; b = b[binary.NativeEndian.Uint16(b[16:]):] {
		if b[18] == unix.DT_UNKNOWN {
			return errNoTypes
		}
	}
	return nil
}
