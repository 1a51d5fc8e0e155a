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
	"kedge/internal/overlay"
)

// hostFeatures is what differs between hosts and decides how containers are run.
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

// hasCapability reads our effective capabilities. Sandboxes and nested machines
// take CAP_SYS_RESOURCE away even from root, and runc then cannot write a lower
// oom_score_adj than its parent's.
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

// detectAppArmor wants the kernel's part and the program that compiles profiles:
// the kernel takes profiles only in compiled form, and nothing but AppArmor's own
// parser writes that. It is the one program of the host that may be called.
func detectAppArmor() bool {
	enabled, err := os.ReadFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !bytes.HasPrefix(enabled, []byte("Y")) {
		return false
	}
	_, err = exec.LookPath("apparmor_parser")
	return err == nil
}

// DetectCgroupDriver is systemd where systemd runs the machine on cgroup v2, for
// there it owns the tree, and cgroupfs elsewhere.
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

// chooseSnapshotter returns the wanted snapshotter, or the one this node chose
// before, or overlayfs if a trial mount works, else native. A choice is kept: layers
// of one snapshotter mean nothing to another. The check of the machine makes the same
// trial, and has told the log.
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
	if overlay.Try(c.tempDir(), "overlay") != nil {
		name = SnapshotterNative
	}
	return name, atomicfile.Write(c.SnapshotterFile(), []byte(name+"\n"), 0o600)
}
