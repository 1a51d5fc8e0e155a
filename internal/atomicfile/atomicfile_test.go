package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

func TestWriteReplacesContentAndMode(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("a long old content"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil || string(got) != "new" {
		t.Errorf("read %q, %v", got, err)
	}
	st, _ := os.Stat(path)
	if st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600", st.Mode())
	}
	entries, _ := os.ReadDir(filepath.Dir(path))
	if len(entries) != 1 {
		t.Errorf("left behind: %v", entries)
	}
}

func TestWriteSurvivesALeftoverTemporaryFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), ".tmp-f"), []byte("half of something longer"), 0o777); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, _ := os.ReadFile(path)
	st, _ := os.Stat(path)
	if string(got) != "x" || st.Mode().Perm() != 0o600 {
		t.Errorf("read %q with mode %v", got, st.Mode())
	}
}

// TestWriteDoesNotFollowLinks: what is in the temporary file's place is replaced, and not written into.
func TestWriteDoesNotFollowLinks(t *testing.T) {
	dir := t.TempDir()
	path, victim, tmp := filepath.Join(dir, "f"), filepath.Join(dir, "victim"), filepath.Join(dir, ".tmp-f")
	for name, plant := range map[string]func() error{
		"a link":      func() error { return os.Symlink(victim, tmp) },
		"a hard link": func() error { return os.Link(victim, tmp) },
	} {
		if err := os.WriteFile(victim, []byte("precious"), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := plant(); err != nil {
			t.Fatal(err)
		}
		if err := Write(path, []byte("secret"), 0o600); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got, _ := os.ReadFile(victim)
		if st, err := os.Lstat(path); err != nil || !st.Mode().IsRegular() || string(got) != "precious" {
			t.Errorf("%s: it was written through: %q", name, got)
		}
	}
}

func TestWriteIntoAMissingDirectory(t *testing.T) {
	err := Write(filepath.Join(t.TempDir(), "no", "f"), nil, 0o600)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v, want ErrNotExist", err)
	}
}

func TestWriteIfChanged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	for i, want := range []bool{true, false} {
		wrote, err := WriteIfChanged(path, []byte("x"), 0o600)
		if err != nil || wrote != want {
			t.Errorf("call %d: wrote %v, %v; want %v", i, wrote, err, want)
		}
	}
	os.Chmod(path, 0o644)
	if wrote, _ := WriteIfChanged(path, []byte("x"), 0o600); !wrote {
		t.Error("a loosened mode was left as it was")
	}
}

// TestWriteReplacesNoDevice: a pipe stands for all that is no file; /dev/null is the one that matters.
func TestWriteReplacesNoDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, []byte("x"), 0o600); err == nil {
		t.Error("a pipe was replaced")
	}
	if st, err := os.Lstat(path); err != nil || st.Mode()&fs.ModeNamedPipe == 0 {
		t.Errorf("the pipe is %v, %v", st, err)
	}
	if entries, err := os.ReadDir(filepath.Dir(path)); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}
