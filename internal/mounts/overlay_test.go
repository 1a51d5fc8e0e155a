package mounts

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/internal/test/host"
)

// TestTryOverlay: on the file system of the tests, on one that overlayfs does not take for its
// upper layer, which is overlayfs itself, and on one that cannot be written.
func TestTryOverlay(t *testing.T) {
	host.RequireIsolation(t)
	dir := t.TempDir()
	mount := func(name, kind string, flags uintptr, options string) string {
		t.Helper()
		at := filepath.Join(dir, name)
		if err := errors.Join(os.Mkdir(at, 0o755), unix.Mount(kind, at, kind, flags, options)); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Unmount(at, unix.MNT_DETACH) })
		return at
	}
	memory := mount("memory", "tmpfs", 0, "")
	for _, name := range []string{"lower", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(memory, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	stacked := mount("stacked", "overlay", 0, "lowerdir="+memory+"/lower,upperdir="+memory+"/upper,workdir="+memory+"/work")
	for _, c := range []struct {
		dir  string
		want error
	}{
		{memory, nil},
		{stacked, unix.EINVAL},
		{mount("read-only", "tmpfs", unix.MS_RDONLY, ""), unix.EROFS},
	} {
		if err := TryOverlay(c.dir, "try-"); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", c.dir, err, c.want)
		}
		if left, _ := filepath.Glob(filepath.Join(c.dir, "try-*")); len(left) > 0 {
			t.Errorf("it leaves %v", left)
		}
	}
	if err := hasTypes(memory); err != nil {
		t.Error(err)
	}
}

func TestTypesIn(t *testing.T) {
	entry := func(kind byte) []byte {
		b := make([]byte, 24)
		binary.NativeEndian.PutUint16(b[16:], uint16(len(b)))
		b[18], b[19] = kind, 'x'
		return b
	}
	if err := typesIn(append(entry(unix.DT_DIR), entry(unix.DT_REG)...)); err != nil {
		t.Errorf("with types: %v", err)
	}
	if err := typesIn(append(entry(unix.DT_DIR), entry(unix.DT_UNKNOWN)...)); err != errNoTypes {
		t.Errorf("without: %v", err)
	}
}
