// Package atomicfile writes files so that a power cut leaves either the whole
// old content or the whole new content, never a mixture and never nothing.
//
// It is for small files: keys, certificates, kubeconfigs, state. It is not for
// logs or databases; a large file that is written beside them has StepWriter, with
// which the caller makes it durable. Any package of kedge may import it.
package atomicfile

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Write replaces the file at path with data and mode. When it returns nil the
// new content is durable: the file and its directory have been synced. The
// directory must exist. The temporary file is named ".tmp-" and the file's name. The next
// Write of the same path removes the temporary file of a crash; a path must have only one
// Write at a time. The temporary file is always new, so that no link is written through. A device, a pipe or a socket is not
// replaced: with a path such as /dev/null, which an administrator may give, the machine would lose the device.
func Write(path string, data []byte, mode fs.FileMode) (err error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	if err := Replaceable(path); err != nil {
		return err
	}
	tmp := filepath.Join(dir, ".tmp-"+base)
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(tmp)
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	// The umask may have cleared bits.
	if err := f.Chmod(mode); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Replaceable returns an error if a device, a pipe or a socket is at path. It is for those who rename their own temporary file.
func Replaceable(path string) error {
	if st, err := os.Lstat(path); err == nil && st.Mode()&(fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
		return fmt.Errorf("write %s: it is not a regular file; name another file", path)
	}
	return nil
}

// WriteIfChanged is Write, but leaves the file alone when it already has this
// content and mode. It reports whether it wrote.
func WriteIfChanged(path string, data []byte, mode fs.FileMode) (bool, error) {
	// A read of a device or a pipe would not end; Write refuses them.
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode().Perm() == mode.Perm() {
		if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
			return false, nil
		}
	}
	return true, Write(path, data, mode)
}

// ReadSmall reads a regular file of at most limit bytes. A device, a pipe and a larger file are refused: what is read here
// was named by an administrator, and a read of a pipe would not end.
func ReadSmall(path string, limit int64) ([]byte, error) {
	// Without O_NONBLOCK opening a pipe waits for its writer.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", path)
	}
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("%s is larger than %d KiB, and so not a configuration file", path, limit>>10)
	}
	return data, err
}

// SyncDir makes renames, creations and removals in dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// MkdirAll makes dir and its parents with mode, as os.MkdirAll does, sets the
// mode of dir itself also when it existed, and makes its entry durable.
func MkdirAll(dir string, mode fs.FileMode) error {
	if err := os.MkdirAll(dir, mode); err != nil {
		return err
	}
	if st, err := os.Stat(dir); err != nil {
		return err
	} else if st.Mode().Perm() != mode.Perm() {
		if err := os.Chmod(dir, mode); err != nil {
			return err
		}
	}
	return SyncDir(filepath.Dir(filepath.Clean(dir)))
}
