package runtime

import (
	"bufio"
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/seccomp"
	"golang.org/x/sys/unix"

	"kedge/internal/atomicfile"
	"kedge/internal/mounts"
)

// hostFeatures are the features of the host that decide how containers run.
type hostFeatures struct {
	mayLowerOOMScore bool
	appArmor         bool
	seccomp          bool
}

func detectHost() hostFeatures {
	return hostFeatures{
		mayLowerOOMScore: hasCapability(unix.CAP_SYS_RESOURCE),
		appArmor:         detectAppArmor(),
		seccomp:          seccomp.IsEnabled(),
	}
}

// hasCapability reports whether this process has a capability in its effective set. Sandboxes and nested
// machines take CAP_SYS_RESOURCE away even from root; runc then cannot write an oom_score_adj below its
// parent's.
func hasCapability(number uint) bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	lines := bufio.NewScanner(bytes.NewReader(status))
	for lines.Scan() {
		if text, ok := strings.CutPrefix(lines.Text(), "CapEff:"); ok {
			caps, err := strconv.ParseUint(strings.TrimSpace(text), 16, 64)
			return err == nil && caps&(1<<number) != 0
		}
	}
	return false
}

// detectAppArmor reports whether the kernel has AppArmor and the host has apparmor_parser. The kernel accepts
// only compiled profiles, and only apparmor_parser compiles them. It is the only program of the host that kedge
// runs.
func detectAppArmor() bool {
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !bytes.HasPrefix(enabled, []byte("Y")) {
		return false
	}
	_, err = exec.LookPath("apparmor_parser")
	return err == nil
}

// DetectCgroupDriver returns systemd if systemd runs the machine on cgroup v2, where systemd owns the tree, and
// cgroupfs otherwise.
func DetectCgroupDriver() string {
	var st unix.Statfs_t
	if unix.Statfs("/sys/fs/cgroup", &st) != nil || st.Type != unix.CGROUP2_SUPER_MAGIC {
		return CgroupDriverCgroupfs
	}
	if info, err := os.Lstat("/run/systemd/system"); err != nil || !info.IsDir() {
		return CgroupDriverCgroupfs
	}
	return CgroupDriverSystemd
}

// chooseSnapshotter returns the configured snapshotter, or the snapshotter that this node chose before, or
// overlayfs if a trial mount works, and native otherwise. The choice is permanent, because snapshotters cannot
// read each other's layers. The machine check (internal/preflight) makes the same trial and logs its result.
func chooseSnapshotter(c Config) (string, error) {
	if c.Snapshotter != "" {
		return c.Snapshotter, nil
	}
	before, err := os.ReadFile(c.SnapshotterFile())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", err
	}
	switch s := strings.TrimSpace(string(before)); s {
	case SnapshotterOverlayFS, SnapshotterNative:
		return s, nil
	}
	name := SnapshotterOverlayFS
	if mounts.TryOverlay(c.tempDir(), "overlay") != nil {
		name = SnapshotterNative
	}
	return name, atomicfile.Write(c.SnapshotterFile(), []byte(name+"\n"), 0o600)
}
