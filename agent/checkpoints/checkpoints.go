// Package checkpoints sets damaged state files of the kubelet aside before it starts. The kubelet would exit
// when it reads such a file, at each start, until the file is removed by hand.
//
// It does not know the content of the files: the caller provides a check for each file. Only package agent
// imports it.
package checkpoints

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"kedge/internal/atomicfile"
)

// File is a state file that the kubelet creates again if it is missing.
type File struct {
	Name string
	// Lost names the information that the kubelet loses with the file.
	Lost string
	// Check returns an error if the kubelet could not start with the file. It receives a copy in a directory of
	// its own, in which it may write.
	Check func(dir, name string) error
}

// SetAside renames the damaged files in dir and logs them. A file that cannot be read at all is an error,
// because the disk may be faulty.
func SetAside(dir string, files []File, now time.Time, log *slog.Logger) error {
	var errs []error
	for _, f := range files {
		path := filepath.Join(dir, f.Name)
		damage, err := inspect(path, f)
		if err != nil {
			errs = append(errs, fmt.Errorf("read the kubelet's state: %w", err))
			continue
		}
		if damage == nil {
			continue
		}
		aside := path + ".damaged-" + now.UTC().Format("20060102T150405.000Z")
		if err := os.Rename(path, aside); err != nil {
			errs = append(errs, fmt.Errorf("set a damaged state file of the kubelet aside: %w", err))
			continue
		}
		log.Error("a damaged state file of the kubelet was set aside; the kubelet creates it again", "file", path, "err", damage, "lost", f.Lost, "kept_for_study", aside)
	}
	return errors.Join(append(errs, removeOld(dir, files), atomicfile.SyncDir(dir))...)
}

// inspect returns the fault of a file's content as damage, or an error if the file cannot be read.
func inspect(path string, f File) (damage, err error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return fmt.Errorf("not a regular file, but %s", info.Mode().Type()), nil
	}
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	scratch, err := os.MkdirTemp("", "kedge-checkpoint-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(scratch)
	if err := os.WriteFile(filepath.Join(scratch, f.Name), content, 0o600); err != nil {
		return nil, err
	}
	defer func() {
		if p := recover(); p != nil {
			damage = fmt.Errorf("panic: %v", p)
		}
	}()
	return f.Check(scratch, f.Name), nil
}

// kept is the number of damaged versions of a file that are kept.
const kept = 3

// removeOld removes all but the latest damaged versions, so that they do not fill up a disk that damages files
// repeatedly.
func removeOld(dir string, files []File) error {
	var errs []error
	for _, f := range files {
		found, err := filepath.Glob(filepath.Join(dir, f.Name+".damaged-*"))
		if err != nil || len(found) <= kept {
			continue
		}
		slices.Sort(found)
		for _, old := range found[:len(found)-kept] {
			errs = append(errs, os.RemoveAll(old))
		}
	}
	return errors.Join(errs...)
}
