package runtime

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

// hostPaths are where containerd, its shim and runc write by default, and where
// temporary files go.
var hostPaths = []string{
	"/run/containerd", "/var/lib/containerd", "/etc/containerd", "/opt/containerd", "/opt/cni",
	"/run/runc", "/run/netns", "/var/run/netns", "/etc/cni", "/run/cni", "/etc/cdi", "/var/run/cdi",
	"/var/lib/cni", "/run/nri", "/var/run/nri", "/opt/nri", "/etc/nri",
}

// hostState is what a node must leave as it found it.
func hostState(t *testing.T) map[string]bool {
	t.Helper()
	state := map[string]bool{}
	for _, root := range hostPaths {
		filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if err == nil {
				state["file "+path] = true
			}
			return nil
		})
	}
	for _, pattern := range []string{"/tmp/containerd*", "/tmp/ovl-*", "/tmp/ctd-*", "/tmp/ctrd-*"} {
		found, _ := filepath.Glob(pattern)
		for _, path := range found {
			state["file "+path] = true
		}
	}
	return state
}

// compare reports what came to be outside the node's directories, and what mounts
// and processes are left of it.
func (n *node) compare(before, after map[string]bool) {
	n.t.Helper()
	for what := range after {
		if !before[what] {
			n.t.Errorf("left on the host: %s", what)
		}
	}
	base := filepath.Dir(n.cfg.DataDir)
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(base))
	if err != nil {
		n.t.Fatal(err)
	}
	for _, m := range mounts {
		n.t.Errorf("left mounted: %s", m.Mountpoint)
	}
	programs, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, exe := range programs {
		if target, err := os.Readlink(exe); err == nil && strings.HasPrefix(target, base) {
			n.t.Errorf("left running: %s", target)
		}
	}
}

// statusLine returns the value of one line of a file like /proc/PID/status.
func statusLine(t *testing.T, file, key string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if v, ok := strings.CutPrefix(line, key); ok {
			return strings.TrimSpace(v)
		}
	}
	t.Fatalf("%s has no %s", file, key)
	return ""
}
