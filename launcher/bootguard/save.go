package bootguard

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"kedge/internal/atomicfile"
)

// saveAll copies files and folders of the data directory into the folder "saved", which exists only when it is complete.
func saveAll(dataDir string, names []string) error {
	to, tmp := Path(dataDir, savedFolder), Path(dataDir, ".tmp-"+savedFolder)
	if _, err := os.Stat(to); err == nil {
		return nil // the machine lost power before this was recorded; nothing has run since
	}
	err := os.RemoveAll(tmp)
	if err == nil {
		err = os.Mkdir(tmp, 0o700)
	}
	if err == nil {
		err = copyAll(dataDir, tmp, names)
	}
	if err == nil {
		err = os.Rename(tmp, to)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(tmp))
	}
	return atomicfile.SyncDir(Path(dataDir))
}

// restoreAll brings the saved files and folders back. What was written since is lost. It can be repeated after it was
// interrupted, because the saved files stay.
func restoreAll(dataDir string, names []string) error {
	from := Path(dataDir, savedFolder)
	if _, err := os.Stat(from); err != nil {
		return err
	}
	for _, name := range names {
		if err := os.RemoveAll(filepath.Join(dataDir, name)); err != nil {
			return err
		}
	}
	if err := copyAll(from, dataDir, names); err != nil {
		return err
	}
	return atomicfile.SyncDir(dataDir)
}

// copyAll copies files and folders of from that exist into the folder to, durably.
func copyAll(from, to string, names []string) error {
	for _, name := range names {
		source := filepath.Join(from, name)
		if _, err := os.Lstat(source); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		parent := filepath.Dir(filepath.Join(to, name))
		if err := os.MkdirAll(parent, 0o700); err != nil {
			return err
		}
		if err := copyTree(source, filepath.Join(to, name)); err != nil {
			return err
		}
		if err := atomicfile.SyncDir(parent); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies a file or a folder with the modes, durably. Sockets and pipes are left out: the process that made them
// makes them again.
func copyTree(from, to string) error {
	st, err := os.Lstat(from)
	if err != nil {
		return err
	}
	switch {
	case st.Mode().IsRegular():
		return copyFile(from, to, st.Mode().Perm())
	case st.Mode()&fs.ModeSymlink != 0:
		target, err := os.Readlink(from)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case !st.IsDir():
		return nil
	}
	if err := os.Mkdir(to, 0o700); err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := copyTree(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())); err != nil {
			return err
		}
	}
	if err := os.Chmod(to, st.Mode().Perm()); err != nil {
		return err
	}
	return atomicfile.SyncDir(to)
}

func copyFile(from, to string, mode fs.FileMode) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err == nil {
		err = out.Chmod(mode)
	}
	if err == nil {
		err = out.Sync()
	}
	if err := errors.Join(err, out.Close()); err != nil {
		return fmt.Errorf("copy %s: %w", from, err)
	}
	return nil
}
