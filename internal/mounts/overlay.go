package mounts

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
)

// TryOverlay finds out whether overlayfs can stack layers of images on the file system of
// dir. It stacks two layers, since no list of file systems would be right for long, in a new
// folder of dir whose name begins with prefix, and removes the folder. The mount is made in a
// mount namespace of its own and disappears with it.
//
// The check of the machine and the choice of containerd's snapshotter both call it, so that
// they cannot come to different answers.
func TryOverlay(dir, prefix string) error {
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
	return namespaces.OnOwnThread(func() error {
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
		// Replacing a file of the lower layer needs extended attributes and character
		// devices in the upper layer, which the mount alone does not need.
		err := os.Remove(filepath.Join(in("merged"), "file"))
		return errors.Join(err, unix.Unmount(in("merged"), unix.MNT_DETACH))
	})
}

var errNoTypes = errors.New("its directories do not record the types of files (XFS made without ftype=1)")

// hasTypes looks for types of files in a folder that is not empty. Without types the kernel
// mounts an overlay too, but removed files stay in its listings.
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

// typesIn looks for types in entries of a folder, which are struct linux_dirent64: the
// record's length is at offset 16, the type at 18.
func typesIn(entries []byte) error {
	for b := entries; len(b) > 18; b = b[binary.NativeEndian.Uint16(b[16:]):] {
		if b[18] == unix.DT_UNKNOWN {
			return errNoTypes
		}
	}
	return nil
}
