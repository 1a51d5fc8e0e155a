package appliance

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// peakMemory is the largest resident memory of a process so far, in bytes; 0 if it has ended.
func peakMemory(pid int) int {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmHWM:" {
			n, _ := strconv.Atoi(f[1])
			return n << 10
		}
	}
	return 0
}

// measured runs a program as [bundled.run] does, and returns how long it took and its peak memory.
func (b *bundled) measured(t *testing.T, program string, args ...string) (took time.Duration, peak int) {
	t.Helper()
	var out bytes.Buffer
	cmd := b.World.Command(append(harness.BareEnv(), "KEDGE_BIN="+program), args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	begin := time.Now()
	if err := b.Inside(cmd.Start); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%s: %v\n%s", strings.Join(args, " "), err, &out)
			}
			return time.Since(begin), peak
		case <-time.After(5 * time.Millisecond):
			// The test's own program, which becomes kedge, is not meant.
			if exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", cmd.Process.Pid)); err == nil && filepath.Base(exe) == "kedge" {
				peak = max(peak, peakMemory(cmd.Process.Pid))
			}
		}
	}
}

// untilImported starts kedge, and returns how long it takes until all of it is ready, which the import of images is part of, and
// kedge's peak memory.
func (b *bundled) untilImported(t *testing.T, image string) (took time.Duration, peak int) {
	t.Helper()
	begin := time.Now()
	b.Env = append(harness.BareEnv(), "KEDGE_BIN="+b.bin+"/kedge")
	back := b.outside()
	err := b.Launch()
	back()
	if err == nil {
		err = b.WaitReady(10 * time.Minute)
	}
	if err != nil {
		t.Fatal(err)
	}
	took = time.Since(begin)
	if out, err := b.Run("images", "ls", "--run-dir="+b.RunDir()); err != nil || !strings.Contains(pinnedLine(out, image), "pinned") {
		t.Fatalf("%v\n%s", err, out)
	}
	return took, peakMemory(b.Cmd.Process.Pid)
}

// TestBundleFigures measures the installation of a bundle of 1 GB, the same again, and a newer bundle with one more image of 10 MB.
func TestBundleFigures(t *testing.T) {
	harness.OnlyMeasures(t, "make bench-appliance")
	b := newBundled(t)
	large, newer := filepath.Join(b.Dir, "large"), filepath.Join(b.Dir, "newer")
	writeLayout(t, filepath.Join(b.Dir, "layout"), "example.org/large:1", 4, 250_000_000)
	writeLayout(t, filepath.Join(b.Dir, "small"), "example.org/small:1", 1, 10_000_000)
	b.file(t, "bundle.yaml", "images: [./layout]\n")
	report := func(what string, took time.Duration, peak int) {
		t.Logf("%s: %s, peak memory %d MB", what, took.Round(10*time.Millisecond), peak/1e6)
	}
	took, peak := b.measured(t, harness.Binary(), "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", large)
	report("create a bundle of 1 GB", took, peak)
	b.file(t, "bundle.yaml", "images: [./layout, ./small]\n")
	b.measured(t, harness.Binary(), "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", newer)

	t.Logf("copy it with dd: %s", copySpeed(t, large).Round(10*time.Millisecond))
	took, peak = b.measured(t, large, b.install()...)
	report("install it", took, peak)
	took, peak = b.untilImported(t, "example.org/large:1")
	report("start kedge, until its image is imported", took, peak)
	took, peak = b.measured(t, large, b.install()...)
	report("install it again", took, peak)
	took, peak = b.measured(t, newer, b.install()...)
	report("install a newer one with 10 MB more", took, peak)
	if err := b.Signal(syscall.SIGTERM, 30*time.Second); err != nil {
		t.Fatal(err)
	}
	took, peak = b.untilImported(t, "example.org/small:1")
	report("start kedge, until the new image is imported", took, peak)
	if err := b.Signal(syscall.SIGTERM, 30*time.Second); err != nil {
		t.Fatal(err)
	}
}

// copySpeed is for comparison: how long the machine takes to copy a file to its disk.
func copySpeed(t *testing.T, file string) time.Duration {
	t.Helper()
	begin := time.Now()
	to := file + ".copy"
	if out, err := exec.Command("dd", "if="+file, "of="+to, "bs=1M", "conv=fsync").CombinedOutput(); err != nil {
		t.Fatalf("dd: %v\n%s", err, out)
	}
	took := time.Since(begin)
	if err := os.Remove(to); err != nil {
		t.Fatal(err)
	}
	return took
}
