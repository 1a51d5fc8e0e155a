package appliance

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func make3(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		if err := errors.Join(os.MkdirAll(filepath.Dir(p), 0o755), os.WriteFile(p, []byte("x"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	tree, outside := filepath.Join(dir, "tree"), filepath.Join(dir, "outside", "file")
	make3(t, outside, filepath.Join(tree, "a", "b", "c"), filepath.Join(tree, "d"))
	for link, to := range map[string]string{"link": filepath.Dir(outside), "dangling": "/nowhere"} {
		if err := os.Symlink(to, filepath.Join(tree, link)); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 { // the second time there is nothing
		if err := removeTree(t.Context(), tree); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(tree); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Errorf("a link was followed: %v", err)
	}
	if err := removeTree(t.Context(), filepath.Join(dir, "none", "x")); err != nil {
		t.Error(err)
	}
}

// TestRemoveTreeStopsAtMounts: neither another file system nor a bind mount of the same is entered.
func TestRemoveTreeStopsAtMounts(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	dir := t.TempDir()
	tree, data := filepath.Join(dir, "tree"), filepath.Join(dir, "data")
	precious := filepath.Join(data, "precious")
	make3(t, precious, filepath.Join(tree, "below", "bind", "x"), filepath.Join(tree, "below", "tmpfs", "x"), filepath.Join(tree, "gone", "x"), filepath.Join(tree, "file"))
	mount := func(source, target, kind string, flags uintptr) {
		t.Helper()
		if err := unix.Mount(source, target, kind, flags, ""); err != nil {
			t.Skip(err)
		}
		t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	}
	mount(data, filepath.Join(tree, "below", "bind"), "", unix.MS_BIND)
	mount("tmpfs", filepath.Join(tree, "below", "tmpfs"), "tmpfs", 0)
	mount(precious, filepath.Join(tree, "file"), "", unix.MS_BIND)
	make3(t, filepath.Join(tree, "below", "tmpfs", "kept"))
	err := removeTree(t.Context(), tree)
	if !errors.Is(err, errMounted) {
		t.Errorf("%v", err)
	}
	for _, p := range []string{precious, filepath.Join(tree, "below", "tmpfs", "kept")} {
		if _, err := os.Stat(p); err != nil {
			t.Errorf("%v", err)
		}
	}
	if _, err := os.Stat(filepath.Join(tree, "gone")); err == nil {
		t.Error("what is beside a mount stays")
	}
	points, err := mountsBelow(tree)
	if err != nil || len(points) != 3 {
		t.Errorf("%v, %v", points, err)
	}
}
