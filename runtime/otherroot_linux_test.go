package runtime

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
)

// TestShimsOfOtherRoots: a shim at the path of this node's shims, but below another root, is that of a node in a container
// or in a machine of a throwaway cluster.
func TestShimsOfOtherRoots(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: changes the root of a process")
	}
	p, err := embeddedPayload()
	if err != nil {
		t.Fatal(err)
	}
	var pause bytes.Buffer // it does nothing, and needs no library
	if err := p.program(&pause, programPause); err != nil {
		t.Fatal(err)
	}
	c := DefaultConfig()
	c.DataDir = t.TempDir()
	shim := filepath.Join(c.payloadRoot(), "x", programShim)
	start := func(root string) int {
		t.Helper()
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(shim)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, shim), pause.Bytes(), 0o755); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(shim)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: root}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
		return cmd.Process.Pid
	}
	ours := start("/")
	// The root of a container is mounted in another mount namespace. As for a mount that was detached, the kernel shows paths
	// in it without those of its mount points.
	other := t.TempDir()
	if err := syscall.Mount("tmpfs", other, "tmpfs", 0, ""); err != nil {
		t.Skip(err)
	}
	theirs := start(other)
	if err := syscall.Unmount(other, syscall.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	found, err := shimsOf(c)
	if err != nil || !slices.Equal(found, []int{ours}) {
		t.Errorf("shims %v, %v; want only %d, and not %d", found, err, ours, theirs)
	}
}
