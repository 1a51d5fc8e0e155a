package e2e

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
)

// disk mounts a new file system of this size as the node's data directory: one on a
// disk, or in memory where there are no loop devices.
func (n *node) disk(t *testing.T, mebi int64) {
	t.Helper()
	if err := os.MkdirAll(n.dataDir(), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := loopDisk(filepath.Join(n.dir, "disk"), n.dataDir(), mebi<<20); err != nil {
		t.Logf("the disk is one in memory: %v", err)
		if err := unix.Mount("tmpfs", n.dataDir(), "tmpfs", 0, fmt.Sprint("size=", mebi, "m")); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if n.cmd != nil {
			_ = n.signal(syscall.SIGKILL, 5*time.Second)
		}
		_ = os.Remove(filepath.Join(n.dataDir(), "filler")) // killall needs a little room
		if out, err := n.command("killall"); err != nil {
			t.Errorf("killall: %v\n%s", err, out)
		}
		if err := unix.Unmount(n.dataDir(), 0); err != nil {
			t.Errorf("unmount the disk: %v", err)
			_ = unix.Unmount(n.dataDir(), unix.MNT_DETACH)
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

// fill uses all of the disk but this much.
func (n *node) fill(t *testing.T, leave uint64) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(n.dataDir(), "filler"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
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
		if err := unix.Statfs(n.dataDir(), &s); err != nil {
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

func (n *node) empty(t *testing.T) {
	t.Helper()
	if err := os.Remove(filepath.Join(n.dataDir(), "filler")); err != nil {
		t.Fatal(err)
	}
}

// TestDiskFull: a disk without room is named before anything is started, and one that
// fills up while the node runs costs nothing that was acknowledged.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	n := own(t)
	n.disk(t, 1024)

	n.fill(t, 0)
	if got, want := n.refusal(t), fmt.Sprintf("kedge: the data directory cannot be written: %s: the disk is full; free some space\n", n.dataDir()); got != want {
		t.Errorf("on a full disk at the first boot it said\n%s\nwant\n%s", got, want)
	}
	n.empty(t)
	// Room for the program, and for nothing that it would want to keep.
	n.fill(t, 300<<20)
	if got := n.refusal(t); !strings.HasPrefix(got, "kedge: this machine cannot run kedge\n  disk-space: only ") || !strings.HasSuffix(got, "less than 256 MiB; make room, or choose a larger disk with --data-dir\n") {
		t.Errorf("with little room it said\n%s", got)
	}
	n.empty(t)
	if err := n.start(); err != nil {
		t.Fatal(err)
	}

	// Changes until one is refused; every one that is acknowledged counts.
	ns := n.namespace(t)
	acknowledged := map[string]bool{}
	add := func(i int) error {
		name := fmt.Sprint("c", i)
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_, err := n.client.CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name},
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
	n.fill(t, 0)
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
	// It may end; in either case it says why nothing is taken any more.
	if log := n.tail(1000); !strings.Contains(log, "no space left on device") && !strings.Contains(log, "disk is full") {
		t.Errorf("it does not say that the disk is full:\n%s", n.tail(30))
	}
	select {
	case <-n.done:
	case <-time.After(5 * time.Second):
		if err := n.signal(syscall.SIGTERM, 15*time.Second); err != nil {
			t.Errorf("%v\n%s", err, n.tail(10))
		}
	}
	if got := n.refusal(t); !strings.Contains(got, "free some space\n") && !strings.Contains(got, "make room") {
		t.Errorf("on a disk that is still full it said\n%s", got)
	}
	n.empty(t)
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	list, err := n.client.CoreV1().ConfigMaps(ns).List(context.Background(), metav1.ListOptions{})
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
	if err := add(1000); err != nil {
		t.Errorf("with room again: %v", err)
	}
}
