package appliance

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/control"
	"kedge/scripts/e2e/harness"
)

// diskSize is the size of the disk of a data directory, in MiB: room for two versions, their images, and an upgrade.
const diskSize = 1600

// onSmallDisk moves the data directory to a disk of its own. The disk is mounted on the machine, and where the test looks for
// the machine's files.
func onSmallDisk(s *upgradeSite) {
	t := s.t
	t.Helper()
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := exec.Command(name, args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, out)
		}
		return strings.TrimSpace(string(out))
	}
	image, dir := filepath.Join(s.Dir, "disk"), s.DataDir()
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, diskSize<<20); err != nil {
		t.Fatal(err)
	}
	run("mkfs.ext4", "-q", "-m", "0", image)
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		harness.SkipLacking(t, "there is no loop device: %v: %s", err, out)
	}
	device := strings.TrimSpace(string(out))
	// Its last user may be the machine, which is switched off later: it is detached then.
	t.Cleanup(func() { run("losetup", "--detach", device) })
	// What the node has so far is moved.
	before := filepath.Join(s.Dir, "before")
	if err := os.Rename(dir, before); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run("mount", device, dir)
	t.Cleanup(func() {
		_ = os.Remove(filepath.Join(dir, filler)) // the end of the node needs a little room
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount the disk: %v", err)
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
	run("cp", "-a", before+"/.", dir)
	if err := os.RemoveAll(before); err != nil {
		t.Fatal(err)
	}
	if out, err := s.Machine.Output(t.Context(), "mount", device, "/var/lib/kedge"); err != nil {
		t.Fatalf("mount the disk on the machine: %v\n%s", err, out)
	}
}

// filler is the file in the data directory that fills its disk.
const filler = "filler"

// fill leaves this much of the disk of the data directory, in bytes.
func (s *upgradeSite) fill(leave int64) {
	s.t.Helper()
	f, err := os.OpenFile(filepath.Join(s.DataDir(), filler), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		if err.(*os.PathError).Err == unix.ENOSPC {
			return
		}
		s.t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		s.t.Fatal(err)
	}
	size := st.Size()
	for step := int64(256 << 20); step >= 4096; {
		var free unix.Statfs_t
		if err := unix.Statfs(s.DataDir(), &free); err != nil {
			s.t.Fatal(err)
		}
		more := min(int64(free.Bavail)*free.Bsize-leave, step) &^ 4095
		if more <= 0 {
			return
		}
		switch err := unix.Fallocate(int(f.Fd()), 0, size, more); err {
		case nil:
			size += more
		case unix.ENOSPC:
			step /= 4
		default:
			s.t.Fatal(err)
		}
	}
}

func (s *upgradeSite) empty() {
	s.t.Helper()
	if err := os.Remove(filepath.Join(s.DataDir(), filler)); err != nil {
		s.t.Fatal(err)
	}
}

// TestUpgradeOnAFullDisk: on a full disk an upgrade is refused before the node is touched. On one that fills up during the trial
// one of the two versions runs, nothing that was acknowledged is lost, no container is restarted, and with room again the
// upgrade ends and the next succeeds. KEDGE_TEST_LONG enables it.
func TestUpgradeOnAFullDisk(t *testing.T) {
	requireLong(t)
	// The kubelet would evict the pods, whatever the upgrade does.
	s := newUpgradeSiteOn(t, onSmallDisk, "--kubelet-arg=eviction-hard=memory.available<10Mi")
	good := s.newer("good")
	status, err := control.GetReport(t.Context(), s.RunDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, leave := range []int64{0, 250 << 20} {
		s.fill(leave)
		out, err := s.RunKedge("upgrade", "--file="+good)
		if err == nil || !strings.Contains(out, "free some space") && !strings.Contains(out, "no space left") || strings.Count(out, "\n") > 2 {
			t.Errorf("%d MiB free: %v\n%s", leave>>20, err, out)
		}
		after, err := control.GetReport(t.Context(), s.RunDir())
		if err != nil || after.PID != status.PID {
			t.Errorf("the process was %d and is %d: %v", status.PID, after.PID, err)
		}
		for _, pattern := range []string{"upgrade/*", "snapshots/*"} {
			if left, err := filepath.Glob(filepath.Join(s.DataDir(), pattern)); err != nil || len(left) > 0 {
				t.Errorf("left: %v, %v", left, err)
			}
		}
		s.empty()
	}
	if err := s.WaitReady(time.Minute); err != nil { // without the complaint about the disk
		t.Fatal(err)
	}

	t.Run("before the start", func(t *testing.T) {
		s.t = t
		s.write("before")
		s.upgrade("--file=" + good)
		s.fill(0)
		o := s.supervise(nil)
		if o.Result != "went back" || !strings.Contains(o.Reason, "its start could not be recorded") {
			t.Errorf("%+v", o)
		}
		s.empty()
		s.healthy("before")
	})
	t.Run("on trial", func(t *testing.T) {
		s.t = t
		s.write("trial")
		// The disk stays full for longer than the new version may take.
		o, written := s.fullOnTrial(good, 20*time.Second, "--wait=8s")
		t.Logf("with %d objects written meanwhile: %+v", len(written), o)
		s.healthy("trial")
		have := s.Kubectl(t, "get", "configmap", "-n", s.ns, "-o", `jsonpath={range .items[*]} {.metadata.name} {end}`)
		for _, name := range written {
			if !strings.Contains(have, " "+name+" ") {
				t.Errorf("%s was acknowledged and is lost", name)
			}
		}
	})
	s.t = t
	s.write("after")
	s.upgrade("--file=" + s.newer("better"))
	if o := s.supervise(nil); o.Result != "upgraded" {
		t.Errorf("with room: %+v", o)
	}
	s.healthy("after")
}

// fullOnTrial upgrades, keeps the disk full for a while from the first start of the new version on, and returns the objects
// whose writes were acknowledged meanwhile.
func (s *upgradeSite) fullOnTrial(file string, lasts time.Duration, args ...string) (o outcome, written []string) {
	s.t.Helper()
	s.upgrade(append([]string{"--file=" + file}, args...)...)
	var since time.Time
	emptied := false
	o = s.supervise(func() {
		switch {
		case emptied:
		case since.IsZero():
			if st := s.status(); st.Trial != nil && st.Trial.Starts > 0 {
				since = time.Now()
				s.fill(0)
			}
		case time.Since(since) < lasts:
			s.fill(0) // also what the datastore has kept in reserve
			name := fmt.Sprint("full-", len(written))
			if _, err := s.TryKubectl(nil, "create", "configmap", "-n", s.ns, name, "--from-literal=text="+name, "--request-timeout=2s"); err == nil {
				written = append(written, name)
			}
		default:
			emptied = true
			s.empty()
		}
	})
	if !emptied && !since.IsZero() {
		s.empty()
	}
	return o, written
}
