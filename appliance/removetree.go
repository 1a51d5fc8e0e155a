package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// removeTree removes what is at path, with everything below it. It never enters a mount point, of whatever file system,
// follows no link, and so deletes nothing that is not in the tree itself. What is not removed is in the error.
func removeTree(ctx context.Context, path string) error {
	parent, err := unix.Open(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return &fs.PathError{Op: "open", Path: filepath.Dir(path), Err: err}
	}
	defer unix.Close(parent)
	return removeAt(ctx, parent, filepath.Base(path), path)
}

// removeAt removes name in an open directory; path is for errors.
func removeAt(ctx context.Context, parent int, name, path string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	err := unix.Unlinkat(parent, name, 0)
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EBUSY):
		return mounted(path)
	case !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.EPERM):
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	dir, err := unix.Openat2(parent, name, &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_NOFOLLOW | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_BENEATH,
	})
	switch {
	case errors.Is(err, unix.EXDEV):
		return mounted(path)
	case err != nil:
		return &fs.PathError{Op: "open", Path: path, Err: err}
	}
	f := os.NewFile(uintptr(dir), path)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	errs := []error{err}
	for _, n := range names {
		errs = append(errs, removeAt(ctx, dir, n, filepath.Join(path, n)))
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if err := unix.Unlinkat(parent, name, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
		if errors.Is(err, unix.EBUSY) {
			return mounted(path)
		}
		return &fs.PathError{Op: "remove", Path: path, Err: err}
	}
	return nil
}

// errMounted marks what stays because a file system is mounted there.
var errMounted = errors.New("a file system is mounted there, which is not kedge's")

func mounted(path string) error {
	return fmt.Errorf("%s stays: %w; unmount it and run the command again", path, errMounted)
}

// mountsBelow returns the mount points below a directory, and the directory if it is one. It reads a list of the kernel
// and touches none of them.
func mountsBelow(dir string) (points []string, err error) {
	_, err = mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		if m.Mountpoint == dir || strings.HasPrefix(m.Mountpoint, dir+"/") {
			points = append(points, m.Mountpoint)
		}
		return true, false
	})
	return points, err
}
