package storage

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/scripts/e2e/harness"
)

// runsOnCopies runs a pod and fails the test if its layers are not copied.
func runsOnCopies(t *testing.T, n *harness.Node) {
	t.Helper()
	ns := n.Namespace(t)
	if out := n.RunPod(t, ns, "copied", "test -f /bin/probe && echo there", ""); out != "there\n" {
		t.Errorf("the pod says %q", out)
	}
	for kind, want := range map[string]bool{"native": true, "overlayfs": false} {
		layers, err := filepath.Glob(filepath.Join(n.DataDir(), "containerd", "io.containerd.snapshotter.v1."+kind, "snapshots", "*"))
		if err != nil || len(layers) > 0 != want {
			t.Errorf("%d layers of %s, %v", len(layers), kind, err)
		}
	}
}

// diskKnown fails the test unless the kubelet knows the disk that its directory is on.
func diskKnown(t *testing.T, n *harness.Node) {
	t.Helper()
	var disk unix.Statfs_t
	if err := unix.Statfs(n.DataDir(), &disk); err != nil {
		t.Fatal(err)
	}
	var summary struct {
		Node struct {
			FS struct{ CapacityBytes, Inodes uint64 }
		}
	}
	path := "/api/v1/nodes/" + n.Name + "/proxy/stats/summary"
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := n.Client.CoreV1().RESTClient().Get().AbsPath(path).DoRaw(t.Context())
		if err != nil {
			return err
		}
		return json.Unmarshal(out, &summary)
	})
	want := disk.Blocks * uint64(disk.Frsize)
	if fs := summary.Node.FS; fs.CapacityBytes != want || fs.Inodes != disk.Files {
		t.Errorf("the kubelet says that its disk has %d bytes and %d inodes; they are %d and %d", fs.CapacityBytes, fs.Inodes, want, disk.Files)
	}
}

// TestDataDirectoryWithoutOverlayfs: where overlayfs cannot have its upper layer, as on
// overlayfs itself, a node copies the layers and says so; a node that is to use
// overlayfs refuses. Of the mounts that the file system has by then, such as containers'
// roots, none needs to be within reach.
func TestDataDirectoryWithoutOverlayfs(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	lower, upper, work := filepath.Join(n.Dir, "lower"), filepath.Join(n.Dir, "upper"), filepath.Join(n.Dir, "work")
	if err := errors.Join(harness.PrepareImages(lower), os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), os.MkdirAll(n.DataDir(), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", n.DataDir(), "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
			t.Error(err)
		}
		if out, err := n.Command("killall"); err != nil {
			t.Errorf("killall: %v\n%s", err, out)
		}
		if err := unix.Unmount(n.DataDir(), 0); err != nil {
			t.Error(err)
		}
	})
	covered := filepath.Join(n.Dir, "covered")
	hidden := filepath.Join(covered, "hidden")
	if err := errors.Join(os.MkdirAll(hidden, 0o755), unix.Mount(n.DataDir(), hidden, "", unix.MS_BIND, ""), unix.Mount("tmpfs", covered, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(covered, 0), unix.Unmount(hidden, 0)); err != nil {
			t.Error(err)
		}
	})
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	diskKnown(t, n)
	runsOnCopies(t, n)
	if lines := n.LogLines(t, "image layers cannot be stacked in "+n.DataDir()); len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "they are copied, which needs more disk and time") {
		t.Errorf("the log says %d times that layers are copied:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	n.Stop(t, syscall.SIGTERM, 10*time.Second)

	before := n.Flags
	n.Flags = append(before, "--snapshotter=overlayfs")
	said := n.Refusal(t)
	n.Flags = before
	if want := "kedge: this machine cannot run kedge\n  overlayfs: image layers cannot be stacked in " + n.DataDir() + ": invalid argument; the directory is inside a container's own layers: mount a volume there; or leave out --snapshotter=overlayfs\n"; said != want {
		t.Errorf("with --snapshotter=overlayfs it said\n%s\nwant\n%s", said, want)
	}
}

// TestSnapshotterFlag: layers are copied where that is asked for, and no choice of the
// node is left behind.
func TestSnapshotterFlag(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--snapshotter=native")
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	runsOnCopies(t, n)
	if lines := n.LogLines(t, "stacked"); len(lines) > 0 {
		t.Errorf("the log complains:\n%s", strings.Join(lines, "\n"))
	}
	if _, err := os.Stat(filepath.Join(n.DataDir(), "containerd", "snapshotter")); err == nil {
		t.Error("the flag was kept as the node's own choice")
	}
}
