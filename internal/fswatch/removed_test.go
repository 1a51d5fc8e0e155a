package fswatch

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

func TestRemoved(t *testing.T) {
	for name, change := range map[string]func(name string) error{
		"removed":                 os.Remove,
		"its directory is":        func(name string) error { return os.RemoveAll(filepath.Dir(name)) },
		"replaced":                func(name string) error { return os.Rename(name+".other", name) },
		"written, and so is kept": func(name string) error { return os.WriteFile(name, []byte("more"), 0o600) },
	} {
		t.Run(name, func(t *testing.T) {
			kept, file := filepath.Join(t.TempDir(), "kept"), filepath.Join(t.TempDir(), "file")
			for _, f := range []string{kept, file, file + ".other"} {
				if err := os.WriteFile(f, nil, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
				defer cancel()
				time.AfterFunc(time.Minute, func() {
					if err := change(file); err != nil {
						t.Error(err)
					}
				})
				begin := time.Now()
				want := file
				if name == "written, and so is kept" {
					want = ""
				}
				if got := Removed(ctx, kept, file); got != want {
					t.Errorf("%q, want %q", got, want)
				}
				if took := time.Since(begin); want != "" && took > time.Minute+Interval {
					t.Errorf("it took %s", took)
				}
			})
		})
	}
}
