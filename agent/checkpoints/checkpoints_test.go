package checkpoints

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// good accepts files that say so, and writes beside its copy as upstream's may.
func good(dir, name string) error {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	if string(text) == "panic" {
		panic("index out of range")
	}
	if string(text) != "good" {
		return errors.New("checksum mismatch")
	}
	return os.WriteFile(filepath.Join(dir, name), []byte("rewritten"), 0o600)
}

func TestSetAside(t *testing.T) {
	dir := t.TempDir()
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	var files []File
	for name, content := range map[string]string{"whole": "good", "flipped": "goof", "empty": "", "panics": "panic", "missing": "-", "folder": "-"} {
		files = append(files, File{Name: name, Lost: "the " + name, Check: good})
		if content != "-" {
			os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600)
		}
	}
	os.MkdirAll(filepath.Join(dir, "folder", "in"), 0o700)
	var log bytes.Buffer
	if err := SetAside(dir, files, at, slog.New(slog.NewTextHandler(&log, nil))); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"flipped", "empty", "panics", "folder"} {
		if _, err := os.Lstat(filepath.Join(dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", name, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, name+".damaged-20260102T030405.000Z")); err != nil {
			t.Errorf("%s was not kept: %v", name, err)
		}
		if !strings.Contains(log.String(), "the "+name) {
			t.Errorf("nothing was said of %s", name)
		}
	}
	if text, err := os.ReadFile(filepath.Join(dir, "whole")); err != nil || string(text) != "good" {
		t.Errorf("the whole file holds %q, %v", text, err)
	}
	if strings.Contains(log.String(), "the whole") || strings.Contains(log.String(), "the missing") {
		t.Errorf("too much was said:\n%s", &log)
	}
}

// A disk that damages a file again and again must not be filled with copies.
func TestFewDamagedFilesAreKept(t *testing.T) {
	dir := t.TempDir()
	files := []File{{Name: "state", Check: good}}
	at := time.Now()
	for n := range 6 {
		os.WriteFile(filepath.Join(dir, "state"), []byte{byte(n)}, 0o600)
		if err := SetAside(dir, files, at.Add(time.Duration(n)*time.Second), slog.New(slog.DiscardHandler)); err != nil {
			t.Fatal(err)
		}
	}
	left, _ := filepath.Glob(filepath.Join(dir, "*"))
	if len(left) != kept {
		t.Errorf("%d files are left: %v", len(left), left)
	}
	if text, _ := os.ReadFile(left[len(left)-1]); !bytes.Equal(text, []byte{5}) {
		t.Errorf("the latest is %v", text)
	}
}
