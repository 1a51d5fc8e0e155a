package preflight

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
)

// tryInotify makes n instances and closes them again.
func tryInotify(n int) error {
	for range n {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
	}
	return nil
}

// existing returns the nearest existing directory above a path, in which the path will be made.
func existing(path string) string {
	for path != "/" && path != "." {
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			return path
		}
		path = filepath.Dir(path)
	}
	return path
}

// trialFile is the prefix of a trial's files.
const trialFile = ".kedge-check-"

// sweep removes files in dir of trials that were interrupted, such as by a power cut.
func sweep(dir string) {
	left, _ := filepath.Glob(filepath.Join(dir, trialFile+"*"))
	for _, path := range left {
		// Another process may be running a trial now.
		if info, err := os.Lstat(path); err == nil && time.Since(info.ModTime()) > time.Minute {
			_ = os.RemoveAll(path) // the next trial reports problems of the folder
		}
	}
}

// tryFiles makes, writes, syncs and removes a file.
func tryFiles(dir string) error {
	sweep(existing(dir))
	f, err := os.CreateTemp(existing(dir), trialFile)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString("kedge")
	return errors.Join(err, f.Sync(), f.Close())
}

func tryNamespace(flag int) error {
	return namespaces.OnOwnThread(func() error { return unix.Unshare(flag) })
}

// trySeccomp checks whether filters may answer a system call with an error, as the default
// profile of containers does.
func trySeccomp() error {
	const getActionAvail = 2     // SECCOMP_GET_ACTION_AVAIL
	action := uint32(0x00050000) // SECCOMP_RET_ERRNO
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, getActionAvail, 0, uintptr(unsafe.Pointer(&action)))
	if errno != 0 {
		return errno
	}
	return nil
}
