package appliance

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
)

// Machine is the machine that kedge is installed on.
type Machine struct {
	Root    string // "/"; tests have a directory of their own
	Manager Manager
	// Say is told of each step that is executed.
	Say func(text string)

	// fault is called before each change of the machine. In tests it ends the process at that point.
	fault func(point string) error
}

func (m Machine) path(p string) string { return filepath.Join(m.Root, p) }

func (m Machine) at(point string) error {
	if m.fault != nil {
		return m.fault(point)
	}
	return nil
}

// execute executes steps, each of which is recorded in the journal before it.
func (m Machine) execute(ctx context.Context, j *Journal, steps []step) error {
	j.Restart = j.Restart || has(steps, start, restart)
	for _, s := range steps {
		if err := ctx.Err(); err != nil {
			return err
		}
		if s.do == reload || s.do == enable || s.do == start || s.do == restart {
			if err := m.serviceStep(ctx, j, s); err != nil {
				return err
			}
			continue
		}
		entry, change := m.record(j, s)
		if err := m.save(j); err != nil {
			return err
		}
		if !change {
			continue
		}
		m.Say(s.String())
		if err := m.at(s.String()); err != nil {
			return err
		}
		if err := m.do(s); err != nil {
			return explain(s, err)
		}
		if entry := j.find(entry.Kind, entry.Path); entry.Next != "" { // saved with the next step
			entry.Hash, entry.Next = entry.Next, ""
		}
	}
	return m.save(j)
}

// record puts a step into the journal. change is false if the machine has what the step would make.
func (m Machine) record(j *Journal, s step) (e Entry, change bool) {
	switch s.do {
	case makeDir:
		return *j.entry(DirEntry, s.path), true
	case makeLink:
		entry := j.entry(LinkEntry, s.path)
		entry.Target = s.target
		now, err := os.Readlink(m.path(s.path))
		return *entry, err != nil || now != s.target
	}
	entry := j.entry(FileEntry, s.path)
	entry.Existed = entry.Existed || s.adopt
	if found, err := m.look(s.path); err == nil && found.Exists && found.Kind == 0 && found.Hash == s.file.Hash && found.Mode.Perm() == s.file.Mode.Perm() {
		entry.Hash, entry.Next = s.file.Hash, ""
		return *entry, false
	}
	entry.Next = s.file.Hash
	return *entry, true
}

// do changes the machine.
func (m Machine) do(s step) error {
	path := m.path(s.path)
	switch s.do {
	case makeDir:
		if err := os.Mkdir(path, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		return atomicfile.SyncDir(filepath.Dir(path))
	case makeLink:
		return replaceLink(path, s.target)
	case write:
		return atomicfile.Write(path, s.file.Data, s.file.Mode)
	case copyFile:
		if s.file.Previous != "" {
			if err := m.keepPrevious(path, m.path(s.file.Previous)); err != nil {
				return err
			}
		}
		return copyPart(s.file.Source, s.file.SourceAt, s.file.SourceSize, s.file.Hash, path, s.file.Mode)
	}
	return fmt.Errorf("unknown step %q", s.do)
}

// keepPrevious keeps a copy of the executable that will be replaced.
func (m Machine) keepPrevious(path, to string) error {
	if _, err := os.Lstat(path); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		return err
	}
	return copyTo(path, to, 0o755)
}

// serviceStep executes a step of the service manager.
func (m Machine) serviceStep(ctx context.Context, j *Journal, s step) error {
	j.entry(ServiceEntry, serviceName)
	if err := m.save(j); err != nil {
		return err
	}
	m.Say(s.String())
	if err := m.at(s.String()); err != nil {
		return err
	}
	switch s.do {
	case reload:
		return m.Manager.Reload(ctx)
	case enable:
		return m.Manager.Enable(ctx)
	}
	if err := m.Manager.Restart(ctx); err != nil {
		return err
	}
	j.Restart = false
	return nil
}

// explain says in one sentence why a step has failed.
func explain(s step, err error) error {
	dir := filepath.Dir(s.path)
	switch {
	case errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("the file system of %s is full; free some space and run the command again", dir)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("the file system of %s is read-only; make it writable, and for the executable choose another folder with --bin-dir", dir)
	}
	return err
}

// replaceLink makes a symbolic link atomically.
func replaceLink(path, target string) error {
	tmp := filepath.Join(filepath.Dir(path), ".tmp-"+filepath.Base(path))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, path); err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}

// copyTo copies a file atomically, for files that are too large for package atomicfile.
func copyTo(from, to string, mode fs.FileMode) error { return copyPart(from, 0, 0, "", to, mode) }

// copyPart copies a stretch of a file atomically; with a size of 0 the whole file. If want is not empty, the content must have
// that hash: it was verified before, and the medium that it comes from may be failing.
func copyPart(from string, at, size int64, want, to string, mode fs.FileMode) (err error) {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	tmp := filepath.Join(filepath.Dir(to), ".tmp-"+filepath.Base(to))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	out, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, mode)
	if err != nil {
		return err
	}
	sum, err := hash(io.TeeReader(part(in, at, size), out))
	if err == nil && want != "" && sum != want {
		err = fmt.Errorf("%s has changed while it was copied; run the command again, with another copy if the error stays", from)
	}
	if err == nil {
		err = out.Chmod(mode) // the umask may have cleared bits
	}
	if err == nil {
		err = out.Sync()
	}
	if err = errors.Join(err, out.Close()); err == nil {
		err = os.Rename(tmp, to)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return atomicfile.SyncDir(filepath.Dir(to))
}

// look returns what is at a path.
func (m Machine) look(path string) (Found, error) {
	real := m.path(path)
	st, err := os.Lstat(real)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
		return Found{}, nil
	}
	if err != nil {
		return Found{}, err
	}
	f := Found{Kind: st.Mode().Type(), Exists: true, Mode: st.Mode()}
	switch f.Kind {
	case 0:
		f.Hash, err = hashFile(real)
	case fs.ModeSymlink:
		f.Target, err = os.Readlink(real)
	}
	return f, err
}

// HashFile returns the hash of a file in the form of [Build] and [Entry].
func HashFile(path string) (string, error) { return hashFile(path) }

func hashFile(path string) (string, error) { return hashPart(path, 0, 0) }

// hashPart returns the hash of a stretch of a file.
func hashPart(path string, at, size int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	return hash(part(f, at, size))
}

// part reads a stretch of a file; with a size of 0 the whole file.
func part(f *os.File, at, size int64) io.Reader {
	if size == 0 {
		return f
	}
	return io.NewSectionReader(f, at, size)
}

func hash(r io.Reader) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return "", err
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}

func hashOf(data []byte) string {
	h, _ := hash(bytes.NewReader(data)) // a reader of memory has no errors
	return h
}
