package datadir

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func TestOpenAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "dir")
	if name, err := NodeName(path); name != "" || err != nil {
		t.Errorf("before it is anybody's it is of %q, %v", name, err)
	}
	d, err := Open(path, t.TempDir(), "n", "v1", now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, t.TempDir(), "n", "v1", now); !errors.Is(err, ErrInUse) {
		t.Errorf("second open: %v, want ErrInUse", err)
	} else if !strings.Contains(err.Error(), "process") {
		t.Errorf("%v does not name the process", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// The clock has lost a year; what was seen stays.
	d, err = Open(path, t.TempDir(), "n", "v1", now.AddDate(-1, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	if !d.LastSeen().Equal(now) {
		t.Errorf("last seen %v, want %v", d.LastSeen(), now)
	}
	d.Close()
	if _, err := Open(path, t.TempDir(), "other", "v1", now); !errors.Is(err, ErrOtherNode) {
		t.Errorf("other node: %v, want ErrOtherNode", err)
	}
	if name, err := NodeName(path); name != "n" || err != nil {
		t.Errorf("it is of %q, %v", name, err)
	}
}

func TestOpenRefuses(t *testing.T) {
	path := t.TempDir()
	file := filepath.Join(path, descriptionFile)
	os.WriteFile(file, []byte(`{"format":99,"version":"v9","nodeName":"n"}`), 0o644)
	if _, err := Open(path, t.TempDir(), "n", "v1", now); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "v9") {
		t.Errorf("newer: %v", err)
	}
	os.WriteFile(file, []byte(`{"form`), 0o644)
	if _, err := Open(path, t.TempDir(), "n", "v1", now); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if data, _ := os.ReadFile(file); string(data) != `{"form` {
		t.Error("a refused directory was changed")
	}
	// A file in the directory's place cannot be written into, whoever we are.
	notDir := filepath.Join(path, "file")
	os.WriteFile(notDir, nil, 0o644)
	if _, err := Open(notDir, t.TempDir(), "n", "v1", now); !errors.Is(err, ErrReadOnly) {
		t.Errorf("unwritable: %v", err)
	}
}

// TestRunDirectory: two nodes with data directories of their own and one run directory.
func TestRunDirectory(t *testing.T) {
	run, first, second := filepath.Join(t.TempDir(), "new", "run"), t.TempDir(), t.TempDir()
	d, err := Open(first, run, "n", "v1", now)
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(second, run, "m", "v1", now)
	if want := fmt.Sprintf("the run directory is in use: another kedge (process %d) runs with %s; stop it, or choose another with --run-dir", os.Getpid(), run); !errors.Is(err, ErrRunInUse) || err.Error() != want {
		t.Errorf("second node: %v, want %s", err, want)
	}
	// The second node may come again under another name: the directory is nobody's yet.
	if _, err := os.Stat(filepath.Join(second, descriptionFile)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the refused node's data directory has a description: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = Open(second, run, "m", "v1", now); err != nil {
		t.Fatal(err)
	}
	d.Close()

	notDir := filepath.Join(first, "file")
	os.WriteFile(notDir, nil, 0o644)
	if _, err := Open(second, notDir, "m", "v1", now); err == nil || !strings.Contains(err.Error(), "choose another with --run-dir") {
		t.Errorf("unwritable: %v", err)
	}
	// What was refused holds no lock, and one directory can be both.
	if d, err = Open(second, second, "m", "v1", now); err != nil {
		t.Fatal(err)
	}
	d.Close()
	if d, err = Open(second, run, "m", "v1", now); err != nil {
		t.Fatal(err)
	}
	d.Close()
}

// TestStoreIsRemembered: that there was a datastore is known to the next start, until it is forgotten on purpose.
func TestStoreIsRemembered(t *testing.T) {
	path := t.TempDir()
	var has bool
	reopen := func(change func(*Dir) error) {
		t.Helper()
		d, err := Open(path, path, "n", "v1", now)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if d.HadStore() != has {
			t.Errorf("there was a store: %v, want %v", d.HadStore(), has)
		}
		if err := change(d); err != nil {
			t.Fatal(err)
		}
		has = d.HadStore()
	}
	// What an earlier kedge wrote does not say.
	os.WriteFile(filepath.Join(path, descriptionFile), []byte(`{"format":1,"version":"v0","nodeName":"n"}`), 0o644)
	reopen((*Dir).NoteStore)
	if !has {
		t.Error("not noted")
	}
	reopen((*Dir).NoteStore)
	reopen((*Dir).ForgetStore)
	reopen(func(*Dir) error { return nil })
}

// TestJoiningIsRemembered: that the server joined others is known to the next start.
func TestJoiningIsRemembered(t *testing.T) {
	path := t.TempDir()
	for _, joined := range []bool{false, true, true} {
		d, err := Open(path, path, "n", "v1", now)
		if err != nil {
			t.Fatal(err)
		}
		if d.HasJoined() != joined {
			t.Errorf("it has joined: %v, want %v", d.HasJoined(), joined)
		}
		if err := d.NoteJoined(); err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
}

// TestDescriptionOfNobody: a description without content is damaged, not one of a first boot.
func TestDescriptionOfNobody(t *testing.T) {
	for _, content := range []string{"", "{}", "null", `{"format":1}`} {
		path := t.TempDir()
		os.WriteFile(filepath.Join(path, descriptionFile), []byte(content), 0o644)
		if _, err := Open(path, path, "n", "v1", now); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), filepath.Join(path, descriptionFile)) {
			t.Errorf("%q: %v", content, err)
		}
	}
}

// TestExternalIsRemembered: a server's part in an external datastore is known to the next start, and to commands before it.
func TestExternalIsRemembered(t *testing.T) {
	path := t.TempDir()
	for _, to := range []External{ExternalUsed, ExternalRemoved, ExternalUsed} {
		d, err := Open(path, t.TempDir(), "n", "v1", now)
		if err != nil {
			t.Fatal(err)
		}
		if err := d.SetExternal(to); err != nil {
			t.Fatal(err)
		}
		d.Close()
		if d, err = Open(path, t.TempDir(), "n", "v1", now); err != nil {
			t.Fatal(err)
		}
		if got := d.External(); got != to {
			t.Errorf("it is %q, want %q", got, to)
		}
		d.Close()
		if desc, err := Read(path); err != nil || desc.External != to || desc.NodeName != "n" {
			t.Errorf("read %+v, %v", desc, err)
		}
	}
	if desc, err := Read(t.TempDir()); err != nil || desc != (Description{}) {
		t.Errorf("nobody's: %+v, %v", desc, err)
	}
}
