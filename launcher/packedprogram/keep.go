package packedprogram

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
// disk, the program is valid only in the boot that wrote it: a power cut could leave
// holes in it.
const (
	ProgramName = "kedge"
	SyncedName  = "synced"
	BootName    = "boot"
	// CheckedName has the boot in which the program was last found to be valid. A server's
	// launcher removes the file, and the program itself writes it when its start is over.
	CheckedName = "checked"
)

// BootID identifies this boot of the machine.
func BootID() string {
	id, _ := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return string(id)
}

// Keep syncs the running program <dir>/<ID>/kedge to disk, records that it is valid, and removes older programs
// from dir, except the most recently unpacked others. It does nothing if program is in another folder, as in development. The sync can take long on a
// slow disk, so it is called when the start is complete.
func Keep(dir, program string, others int) error {
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
	if err := atomicfile.Write(filepath.Join(own, CheckedName), []byte(BootID()), 0o644); err != nil {
		return err
	}
	return Prune(dir, filepath.Base(own), others)
}

// Prune removes programs from dir, except the one whose ID is own and the most recently
// unpacked others. A running program is not disturbed.
func Prune(dir, own string, others int) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var old []fs.FileInfo
	for _, e := range entries {
		// A temporary folder may belong to a launcher that is unpacking into it.
		if !e.IsDir() || e.Name() == own || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		if st, err := e.Info(); err == nil { // else it was removed meanwhile
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
