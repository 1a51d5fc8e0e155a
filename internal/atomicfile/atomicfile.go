// Package atomicfile writes files so that a power cut leaves either the whole
// old content or the whole new content, never a mixture and never nothing.
//
// It is for small files: keys, certificates, kubeconfigs, state. It is not for
// logs or databases. Any package of kedge may import it.
package atomicfile

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Write replaces the file at path with data and mode. When it returns nil the
// new content is durable: the file and its directory have been synced. The
// directory must exist. Temporary files begin with a dot and ".tmp-" and are
// removed by the next Write of the same path.
func Write(path string, data []byte, mode fs.FileMode) (err error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	tmp := filepath.Join(dir, ".tmp-"+base)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
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
	// The umask, or an older temporary file, may have left other bits.
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

// WriteIfChanged is Write, but leaves the file alone when it already has this
// content and mode. It reports whether it wrote.
func WriteIfChanged(path string, data []byte, mode fs.FileMode) (bool, error) {
	if old, err := os.ReadFile(path); err == nil && bytes.Equal(old, data) {
		if st, err := os.Stat(path); err == nil && st.Mode().Perm() == mode.Perm() {
			return false, nil
		}
	}
	return true, Write(path, data, mode)
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
