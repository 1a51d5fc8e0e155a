package datadir

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var now = time.Date(2026, 6, 1, 0, 0, 0, 0, time.UTC)

func TestOpenAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "new", "dir")
	d, err := Open(path, "n", "v1", now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, "n", "v1", now); !errors.Is(err, ErrInUse) {
		t.Errorf("second open: %v, want ErrInUse", err)
	} else if !strings.Contains(err.Error(), "process") {
		t.Errorf("%v does not name the process", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// The clock has lost a year; what was seen stays.
	d, err = Open(path, "n", "v1", now.AddDate(-1, 0, 0))
	if err != nil {
		t.Fatal(err)
	}
	if !d.LastSeen().Equal(now) {
		t.Errorf("last seen %v, want %v", d.LastSeen(), now)
	}
	d.Close()
	if _, err := Open(path, "other", "v1", now); !errors.Is(err, ErrOtherNode) {
		t.Errorf("other node: %v, want ErrOtherNode", err)
	}
}

func TestOpenRefuses(t *testing.T) {
	path := t.TempDir()
	file := filepath.Join(path, descriptionFile)
	os.WriteFile(file, []byte(`{"format":99,"version":"v9","nodeName":"n"}`), 0o644)
	if _, err := Open(path, "n", "v1", now); !errors.Is(err, ErrNewer) || !strings.Contains(err.Error(), "v9") {
		t.Errorf("newer: %v", err)
	}
	os.WriteFile(file, []byte(`{"form`), 0o644)
	if _, err := Open(path, "n", "v1", now); !errors.Is(err, ErrDamaged) {
		t.Errorf("damaged: %v", err)
	}
	if data, _ := os.ReadFile(file); string(data) != `{"form` {
		t.Error("a refused directory was changed")
	}
	// A file in the directory's place cannot be written into, whoever we are.
	notDir := filepath.Join(path, "file")
	os.WriteFile(notDir, nil, 0o644)
	if _, err := Open(notDir, "n", "v1", now); !errors.Is(err, ErrReadOnly) {
		t.Errorf("unwritable: %v", err)
	}
}
