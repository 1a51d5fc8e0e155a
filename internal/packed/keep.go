package packed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kedge/internal/atomicfile"
)

// The names of the files beside an unpacked program. Until it is known to be on the
// disk, the program is good only in the boot that wrote it: a power cut could leave
// holes in it.
const (
	ProgramName = "kedge"
	SyncedName  = "synced"
	BootName    = "boot"
)

// Keep makes the program that runs from <dir>/<ID>/kedge durable and removes older
// ones from dir. It does nothing when program is elsewhere, as in development. It
// can take as long as the disk needs for the whole program, so it is called when
// the start is over.
func Keep(dir, program string) error {
	own := filepath.Dir(program)
	if filepath.Dir(own) != filepath.Clean(dir) || filepath.Base(program) != ProgramName {
		return nil
	}
	if _, err := os.Stat(filepath.Join(own, SyncedName)); errors.Is(err, fs.ErrNotExist) {
		if err := flush(program); err != nil {
			return fmt.Errorf("sync the program: %w", err)
		}
		if err := atomicfile.Write(filepath.Join(own, SyncedName), nil, 0o644); err != nil {
			return err
		}
		if err := atomicfile.SyncDir(dir); err != nil {
			return err
		}
	}
	return Prune(dir, filepath.Base(own), 0)
}

// Prune removes programs from dir, but for own, an ID, and the others that were unpacked
// last. A program that runs is not disturbed.
func Prune(dir, own string, others int) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var old []fs.FileInfo
	for _, e := range entries {
		// Temporary folders may be of a launcher that is at work just now.
		if !e.IsDir() || e.Name() == own || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if st, err := e.Info(); err == nil { // else somebody has removed it
			old = append(old, st)
		}
	}
	slices.SortFunc(old, func(a, b fs.FileInfo) int { return b.ModTime().Compare(a.ModTime()) })
	var errs []error
	for _, st := range old[min(others, len(old)):] {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, st.Name())))
	}
	return errors.Join(errs...)
}

func flush(name string) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}
