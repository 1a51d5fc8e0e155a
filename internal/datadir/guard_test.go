package datadir

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// A run directory that is removed under a running kedge is still taken: by it, or else it
// says by whom.
func TestRunDirectoryIsTakenAgain(t *testing.T) {
	base := t.TempDir()
	open := func(name string) (*Dir, error) {
		return Open(filepath.Join(base, name), filepath.Join(base, "run"), "n", "v1", time.Now())
	}
	d, err := open("data")
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	guard := func(t *testing.T, change func()) (said int, err error) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			time.AfterFunc(time.Second, change)
			err = d.Guard(ctx, func(string) { said++ })
		})
		return said, err
	}
	t.Run("removed", func(t *testing.T) {
		if said, err := guard(t, func() { os.RemoveAll(filepath.Join(base, "run")) }); said != 1 || err != nil {
			t.Errorf("said %d times, %v", said, err)
		}
		if other, err := open("other"); !errors.Is(err, ErrRunInUse) {
			t.Errorf("another opens it: %v", err)
			other.Close()
		}
	})
	t.Run("taken by another", func(t *testing.T) {
		var other *Dir
		defer func() { other.Close() }()
		_, err := guard(t, func() {
			os.RemoveAll(filepath.Join(base, "run"))
			var err error
			if other, err = open("third"); err != nil {
				t.Error(err)
			}
		})
		if !errors.Is(err, ErrRunInUse) {
			t.Errorf("Guard: %v", err)
		}
	})
}
