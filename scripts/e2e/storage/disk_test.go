package storage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// mountDisk mounts a new file system of this size as the node's data directory: one on a
// disk, or in memory where there are no loop devices.
func mountDisk(t *testing.T, n *harness.Node, mebi int64) {
	t.Helper()
	if err := os.MkdirAll(n.DataDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := loopDisk(filepath.Join(n.Dir, "disk"), n.DataDir(), mebi<<20); err != nil {
		t.Logf("the disk is one in memory: %v", err)
		if err := unix.Mount("tmpfs", n.DataDir(), "tmpfs", 0, fmt.Sprint("size=", mebi, "m")); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if n.Cmd != nil {
			_ = n.Signal(syscall.SIGKILL, 5*time.Second)
		}
		_ = os.Remove(filepath.Join(n.DataDir(), "filler")) // killall needs a little room
		if out, err := n.Command("killall"); err != nil {
			t.Errorf("killall: %v\n%s", err, out)
		}
		if err := unix.Unmount(n.DataDir(), 0); err != nil {
			t.Errorf("unmount the disk: %v", err)
			_ = unix.Unmount(n.DataDir(), unix.MNT_DETACH)
		}
	})
}

func loopDisk(image, dir string, size int64) error {
	f, err := os.Create(image)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	for _, args := range [][]string{{"mkfs.ext4", "-q", "-m", "0", image}, {"mount", "-o", "loop", image, dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", args[0], err, out)
		}
	}
	return nil
}

// fillDisk uses all of the disk but this much.
func fillDisk(t *testing.T, n *harness.Node, leave uint64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(n.DataDir(), "filler"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var size int64
	if st, err := f.Stat(); err == nil {
		size = st.Size()
	}
	for range 1000 {
		var s unix.Statfs_t
		if err := unix.Statfs(n.DataDir(), &s); err != nil {
			t.Fatal(err)
		}
		free := s.Bavail * uint64(s.Bsize)
		if free <= leave {
			return
		}
		more := int64(max(min(free-leave, 64<<20), 4096))
		if err := unix.Fallocate(int(f.Fd()), 0, size, more); err != nil {
			if more > 4096 && err == unix.ENOSPC {
				more /= 2
			} else if err == unix.ENOSPC {
				return
			} else {
				t.Fatal(err)
			}
			if err := unix.Fallocate(int(f.Fd()), 0, size, more); err != nil && err != unix.ENOSPC {
				t.Fatal(err)
			} else if err != nil {
				return
			}
		}
		size += more
	}
}

func emptyDisk(t *testing.T, n *harness.Node) {
	t.Helper()
	if err := os.Remove(filepath.Join(n.DataDir(), "filler")); err != nil {
		t.Fatal(err)
	}
}

// TestDiskFull: a disk without room is named before anything is started, and one that
// fills up while the node runs costs nothing that was acknowledged.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	mountDisk(t, n, 1024)

	fillDisk(t, n, 0)
	if got, want := n.Refusal(t), fmt.Sprintf("kedge: the data directory cannot be written: %s: the disk is full; free some space\n", n.DataDir()); got != want {
		t.Errorf("on a full disk at the first boot it said\n%s\nwant\n%s", got, want)
	}
	emptyDisk(t, n)
	// Room for the program, and for nothing that it would want to keep.
	fillDisk(t, n, 300<<20)
	if got := n.Refusal(t); !strings.HasPrefix(got, "kedge: this machine cannot run kedge\n  disk-space: only ") || !strings.HasSuffix(got, "less than 256 MiB; make room, or choose a larger disk with --data-dir\n") {
		t.Errorf("with little room it said\n%s", got)
	}
	emptyDisk(t, n)
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}

	// Changes until one is refused; every one that is acknowledged counts.
	ns := n.Namespace(t)
	acknowledged := map[string]bool{}
	add := func(i int) error {
		name := fmt.Sprint("c", i)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := n.Client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name},
			Data: map[string]string{"data": strings.Repeat(name, 200_000/len(name))}}, metav1.CreateOptions{})
		if err == nil {
			acknowledged[name] = true
		}
		return err
	}
	for i := range 5 {
		if err := add(i); err != nil {
			t.Fatal(err)
		}
	}
	fillDisk(t, n, 0)
	refused := 0
	for i := 5; i < 400 && refused < 3; i++ {
		if add(i) != nil {
			refused++
		}
	}
	t.Logf("%d changes were acknowledged, %d refused", len(acknowledged), refused)
	if refused == 0 {
		t.Error("nothing was refused: the disk is not full")
	}
	if log := n.Tail(1000); !strings.Contains(log, "the API takes no changes but deletions until there is room") {
		t.Errorf("it does not say that the disk is full:\n%s", n.Tail(30))
	}
	served := func() error {
		_, err := n.Client.CoreV1().ConfigMaps(ns).Get(context.Background(), "c1", metav1.GetOptions{})
		return err
	}
	if err := served(); err != nil {
		t.Errorf("a read on a full disk: %v", err)
	}
	if err := n.Client.CoreV1().ConfigMaps(ns).Delete(context.Background(), "c0", metav1.DeleteOptions{}); err != nil {
		t.Errorf("a deletion on a full disk: %v", err)
	}
	delete(acknowledged, "c0")
	n.Stop(t, syscall.SIGTERM, 15*time.Second)
	// A node that exists starts on a disk that is still full, and answers.
	if err := n.Launch(); err != nil {
		t.Fatal(err)
	}
	eventuallyRunning(t, n, time.Minute, "the API on a full disk", served)
	if err := add(999); err == nil {
		t.Error("a change is taken on a full disk after a start")
	}
	emptyDisk(t, n)
	eventuallyRunning(t, n, 30*time.Second, "a change with room again", func() error { return add(1000) })
	if err := n.WaitReady(time.Minute); err != nil {
		t.Error(err)
	}
	list, err := n.Client.CoreV1().ConfigMaps(ns).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range list.Items {
		if want := strings.Repeat(c.Name, 200_000/len(c.Name)); acknowledged[c.Name] && c.Data["data"] == want {
			delete(acknowledged, c.Name)
		}
	}
	if len(acknowledged) > 0 {
		t.Errorf("acknowledged and lost: %v", acknowledged)
	}
}

// eventuallyRunning waits until check succeeds, while the node runs.
func eventuallyRunning(t *testing.T, n *harness.Node, limit time.Duration, what string, check func() error) {
	t.Helper()
	for deadline := time.Now().Add(harness.Patient(limit)); ; time.Sleep(200 * time.Millisecond) {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-n.Done:
			t.Fatalf("%s: kedge ended: %v\n%s", what, n.Err, n.Tail(30))
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v\n%s", what, err, n.Tail(30))
		}
	}
}

// TestDiskStalls freezes the file system of a running node. Log and status name it while it
// lasts, and do not accuse what only waits for it; afterwards all is as before.
func TestDiskStalls(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	mountDisk(t, n, 2000)
	if data, err := os.ReadFile("/proc/mounts"); err != nil || !strings.Contains(string(data), n.DataDir()+" ext4") {
		t.Skip("needs a loop device: what is in memory cannot be frozen")
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	const freeze, thaw = 0xC0045877, 0xC0045878 // FIFREEZE, FITHAW of linux/fs.h
	dir, err := os.Open(n.DataDir())
	if err != nil {
		t.Fatal(err)
	}
	ask := func(request uint) error { return unix.IoctlSetInt(int(dir.Fd()), request, 0) }
	undo := harness.UndoOnce(t, func() error { return errors.Join(ask(thaw), dir.Close()) })
	if err := ask(freeze); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		if d := n.StatusOf(t, "disk"); !strings.Contains(d.Error, "the disk of "+n.DataDir()+" stalls") {
			return fmt.Errorf("the disk is %+v", d)
		}
		return nil
	})
	for _, name := range []string{"containerd", "kubelet", "dns", "network", "images"} {
		if c := n.StatusOf(t, name); c.Error != "" {
			t.Errorf("%s is accused: %s", name, c.Error)
		}
	}
	harness.Eventually(t, 60*time.Second, func() error {
		if len(n.LogLines(t, "the disk stalls: it does not finish a write")) == 0 {
			return errors.New("the log does not name the disk")
		}
		return nil
	})
	undo()
	if err := n.WaitReady(90 * time.Second); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		if len(n.LogLines(t, "the disk has finished a write again")) != 1 {
			return errors.New("the log does not say that it is over")
		}
		return nil
	})
}
