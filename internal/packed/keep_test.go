package packed

import (
	"os"
	"path/filepath"
	"testing"
)

func TestKeep(t *testing.T) {
	dir := t.TempDir()
	for _, id := range []string{"old", "own", ".tmp-1"} {
		os.Mkdir(filepath.Join(dir, id), 0o755)
		os.WriteFile(filepath.Join(dir, id, ProgramName), []byte("x"), 0o755)
	}
	program := filepath.Join(dir, "own", ProgramName)
	if err := Keep(dir, "/usr/bin/kedge"); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "old")); err != nil {
		t.Error("a program from elsewhere cleaned up here")
	}
	for range 2 {
		if err := Keep(dir, program); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]bool{"own/kedge": true, "own/synced": true, "old": false, ".tmp-1": true} {
		if _, err := os.Stat(filepath.Join(dir, name)); (err == nil) != want {
			t.Errorf("%s: %v, want there: %v", name, err, want)
		}
	}
}
