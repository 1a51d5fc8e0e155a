package e2e

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
)

// runsOnCopies runs a pod and fails the test if its layers are not copied.
func (n *node) runsOnCopies(t *testing.T) {
	t.Helper()
	ns := n.namespace(t)
	if out := n.runPod(t, ns, "copied", "test -f /bin/probe && echo there", ""); out != "there\n" {
		t.Errorf("the pod says %q", out)
	}
	for kind, want := range map[string]bool{"native": true, "overlayfs": false} {
		layers, err := filepath.Glob(filepath.Join(n.dataDir(), "containerd", "io.containerd.snapshotter.v1."+kind, "snapshots", "*"))
		if err != nil || len(layers) > 0 != want {
			t.Errorf("%d layers of %s, %v", len(layers), kind, err)
		}
	}
}

// diskKnown fails the test unless the kubelet knows the disk that its directory is on.
func (n *node) diskKnown(t *testing.T) {
	t.Helper()
	var disk unix.Statfs_t
	if err := unix.Statfs(n.dataDir(), &disk); err != nil {
		t.Fatal(err)
	}
	var summary struct {
		Node struct {
			FS struct{ CapacityBytes, Inodes uint64 }
		}
	}
	path := "/api/v1/nodes/" + n.name + "/proxy/stats/summary"
	eventually(t, 30*time.Second, func() error {
		out, err := n.client.CoreV1().RESTClient().Get().AbsPath(path).DoRaw(t.Context())
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
	n := own(t)
	lower, upper, work := filepath.Join(n.dir, "lower"), filepath.Join(n.dir, "upper"), filepath.Join(n.dir, "work")
	if err := errors.Join(prepareImages(lower), os.MkdirAll(upper, 0o755), os.MkdirAll(work, 0o755), os.MkdirAll(n.dataDir(), 0o755)); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("overlay", n.dataDir(), "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.signal(syscall.SIGTERM, 15*time.Second); err != nil {
			t.Error(err)
		}
		if out, err := n.command("killall"); err != nil {
			t.Errorf("killall: %v\n%s", err, out)
		}
		if err := unix.Unmount(n.dataDir(), 0); err != nil {
			t.Error(err)
		}
	})
	covered := filepath.Join(n.dir, "covered")
	hidden := filepath.Join(covered, "hidden")
	if err := errors.Join(os.MkdirAll(hidden, 0o755), unix.Mount(n.dataDir(), hidden, "", unix.MS_BIND, ""), unix.Mount("tmpfs", covered, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(covered, 0), unix.Unmount(hidden, 0)); err != nil {
			t.Error(err)
		}
	})
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	n.diskKnown(t)
	n.runsOnCopies(t)
	if lines := n.logLines(t, "images cannot be layered in "+n.dataDir()); len(lines) != 1 || !strings.Contains(lines[0], "level=WARN") || !strings.Contains(lines[0], "they are copied, which needs more disk and time") {
		t.Errorf("the log says %d times that layers are copied:\n%s", len(lines), strings.Join(lines, "\n"))
	}
	n.stop(t, syscall.SIGTERM, 10*time.Second)

	before := n.flags
	n.flags = append(before, "--snapshotter=overlayfs")
	said := n.refusal(t)
	n.flags = before
	if want := "kedge: this machine cannot run kedge\n  overlayfs: images cannot be layered in " + n.dataDir() + ": invalid argument; the directory is inside a container's own layers: mount a volume there; or leave out --snapshotter=overlayfs\n"; said != want {
		t.Errorf("with --snapshotter=overlayfs it said\n%s\nwant\n%s", said, want)
	}
}

// TestSnapshotterFlag: layers are copied where that is asked for, and no choice of the
// node is left behind.
func TestSnapshotterFlag(t *testing.T) {
	t.Parallel()
	n := own(t, "--snapshotter=native")
	if err := prepareImages(n.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	n.runsOnCopies(t)
	if lines := n.logLines(t, "layered"); len(lines) > 0 {
		t.Errorf("the log complains:\n%s", strings.Join(lines, "\n"))
	}
	if _, err := os.Stat(filepath.Join(n.dataDir(), "containerd", "snapshotter")); err == nil {
		t.Error("the flag was kept as the node's own choice")
	}
}
