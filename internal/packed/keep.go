package packed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		// Temporary folders may be of a launcher that is at work just now.
		if e.IsDir() && e.Name() != filepath.Base(own) && !strings.HasPrefix(e.Name(), ".") {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
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
