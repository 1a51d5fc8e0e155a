package cgroup

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestFreezeAndClear: processes of a group and of one below it stop, go on, and end
// while they are stopped.
func TestFreezeAndClear(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making control groups needs root")
	}
	const root = "/kedge-test-tree"
	t.Cleanup(func() { _ = Clear(root) })
	if err := EnsureGroup(root + "/machine"); err != nil {
		t.Fatal(err)
	}
	dirs, err := Dirs(root + "/machine")
	if err != nil || len(dirs) == 0 {
		t.Fatalf("folders %v, %v", dirs, err)
	}
	out := filepath.Join(t.TempDir(), "out")
	cmd := exec.Command("/bin/sh", "-c", "while :; do echo x >> "+out+"; sleep 0.01; done")
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for _, d := range dirs {
		if err := os.WriteFile(filepath.Join(d, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
			_ = cmd.Process.Kill()
			t.Fatal(err)
		}
	}
	if pids, err := Processes(root + "/machine"); err != nil || len(pids) == 0 || pids[0] != cmd.Process.Pid {
		t.Errorf("processes %v, %v, want %d", pids, err, cmd.Process.Pid)
	}
	size := func() int {
		data, _ := os.ReadFile(out)
		return strings.Count(string(data), "x")
	}
	grows := func() bool {
		before := size()
		for range 100 {
			if size() > before {
				return true
			}
			time.Sleep(10 * time.Millisecond)
		}
		return false
	}
	if !grows() {
		t.Fatal("the process does nothing")
	}
	if err := Freeze(root, true); err != nil {
		t.Fatal(err)
	}
	if grows() {
		t.Error("a frozen process goes on")
	}
	if err := Freeze(root, false); err != nil {
		t.Fatal(err)
	}
	if !grows() {
		t.Error("a thawed process does not go on")
	}
	if err := Freeze(root+"/machine", true); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time it is gone
		if err := Clear(root); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-ended; err == nil {
		t.Error("the process ended by itself")
	}
	if left, err := Dirs(root); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
