package packedprogram

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"
)

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	for _, id := range []string{"old", "own", ".tmp-1"} {
		os.Mkdir(filepath.Join(dir, id), 0o755)
		os.WriteFile(filepath.Join(dir, id, ProgramName), []byte("x"), 0o755)
	}
	program := filepath.Join(dir, "own", ProgramName)
	if err := Keep(dir, "/usr/bin/kedge", 0); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "old")); err != nil {
		t.Error("a program from elsewhere cleaned up here")
	}
	for range 2 {
		if err := Keep(dir, program, 0); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]bool{"own/kedge": true, "own/synced": true, "old": false, ".tmp-1": true} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s: %v, want there: %v", name, err, want)
		}
	}
}

func TestPrune(t *testing.T) {
	dir := t.TempDir()
	for i, id := range []string{"oldest", "older", "own", "old"} {
		os.Mkdir(filepath.Join(dir, id), 0o755)
		at := time.Unix(int64(1000+i), 0)
		if err := os.Chtimes(filepath.Join(dir, id), at, at); err != nil {
			t.Fatal(err)
		}
	}
	left := func() (names []string) {
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return names
	}
	for _, step := range []struct {
		others int
		want   []string
	}{
		{5, []string{"old", "older", "oldest", "own"}},
		{1, []string{"old", "own"}},
		{0, []string{"own"}},
	} {
		if err := Prune(dir, "own", step.others); err != nil {
			t.Error(err)
		}
		if got := left(); !slices.Equal(got, step.want) {
			t.Errorf("with %d others: %v, want %v", step.others, got, step.want)
		}
	}
}
