package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
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
