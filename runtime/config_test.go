package runtime

import (
	"path/filepath"
	"strings"
	"testing"

	"github.com/pelletier/go-toml/v2"
)

func TestValidate(t *testing.T) {
	if err := DefaultConfig().Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
	bad := DefaultConfig()
	bad.DataDir = "relative"
	bad.RunDir = "/" + strings.Repeat("long", 20)
	bad.Snapshotter = "zfs"
	bad.CgroupDriver = "cgmanager"
	err := bad.Validate()
	if err == nil {
		t.Fatal("a bad configuration passes")
	}
	for _, want := range []string{"data directory", "run directory", "zfs", "cgmanager"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v says nothing about %s", err, want)
		}
	}
}

// TestConfigStaysAtHome wants no path in containerd's configuration outside the two
// directories, except those that are only read.
func TestConfigStaysAtHome(t *testing.T) {
	c := DefaultConfig()
	c.DataDir, c.RunDir = "/home/data", "/home/run"
	c.CNIConfDir, c.CNIBinDir = "/home/run/cni/net.d", "/home/run/cni/bin"
	for _, s := range []settings{
		{snapshotter: SnapshotterOverlayFS, cgroup: CgroupDriverSystemd, shim: "/home/data/shim", runc: "/home/data/runc", pauseImage: "kedge.local/pause:1"},
		{snapshotter: SnapshotterNative, cgroup: CgroupDriverCgroupfs, shim: "/home/data/shim", runc: "/home/data/runc", pauseImage: "kedge.local/pause:1",
			host: hostFeatures{mayLowerOOMScore: true, appArmor: true, seccomp: true}},
	} {
		text, err := toml.Marshal(containerdConfig(c, s))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(text)) {
			for _, word := range strings.FieldsFunc(line, func(r rune) bool { return strings.ContainsRune("'\"[], \n", r) }) {
				if filepath.IsAbs(word) && !strings.HasPrefix(word, "/home/") && word != "/etc/cdi" && word != "/var/run/cdi" {
					t.Errorf("path outside: %s", line)
				}
			}
		}
		config := string(text)
		for _, want := range []string{"stream_server_address = '127.0.0.1'", "disable_tcp_service = true", "netns_mounts_under_state_dir = true"} {
			if !strings.Contains(config, want) {
				t.Errorf("configuration lacks %s", want)
			}
		}
		if got := strings.Contains(config, "unset_seccomp_profile"); got != s.host.seccomp {
			t.Errorf("default seccomp profile set: %v, host has seccomp: %v", got, s.host.seccomp)
		}
		if got := strings.Contains(config, "SystemdCgroup = true"); got != (s.cgroup == CgroupDriverSystemd) {
			t.Errorf("SystemdCgroup is %v with driver %s", got, s.cgroup)
		}
	}
}
