package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const tempPrefix = ".tmp-"

// tempDir makes a folder in dir to unpack into, and first removes those of launchers
// that were killed: a folder belongs to whoever has it locked. release unlocks it.
func tempDir(dir string) (name string, release func(), err error) {
	if err := removeAbandoned(dir); err != nil {
		return "", nil, err
	}
	for {
		if name, err = os.MkdirTemp(dir, tempPrefix); err != nil {
			return "", nil, err
		}
		f, err := lock(name)
		if err == nil {
			if _, err = os.Stat(name); err == nil {
				return name, func() { f.Close() }, nil
			}
			f.Close()
		}
		// Another launcher took it for abandoned before we had it locked.
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.EWOULDBLOCK) {
			return "", nil, err
		}
	}
}

func removeAbandoned(dir string) error {
	found, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, name := range found {
		f, err := lock(name)
		if err != nil {
			continue // at work, or gone
		}
		err = os.RemoveAll(name)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// lock returns the open folder; closing it gives the lock back.
func lock(name string) (*os.File, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
