package main

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

const tempPrefix = ".tmp-"

// tempDir creates a folder in dir for unpacking, and first removes the folders of killed launchers: a running
// launcher holds a lock on its folder. release unlocks the folder.
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
		// Another launcher removed the folder as abandoned before it was locked.
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
			continue // in use, or already removed
		}
		err = os.RemoveAll(name)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// lock returns the open folder with a lock on it; closing it releases the lock.
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
