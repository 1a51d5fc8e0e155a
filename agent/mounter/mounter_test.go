package mounter

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
}

// dir is a folder in which everything that gets mounted is detached afterwards.
func dir(t *testing.T, m *Mounter, name string) string {
	t.Helper()
	d := filepath.Join(t.TempDir(), name)
	if err := os.Mkdir(d, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(d, unix.MNT_DETACH) })
	return d
}

func TestParseOptions(t *testing.T) {
	for _, tc := range []struct {
		in    string
		flags uintptr
		data  string
		prop  int
	}{
		{"ro,nosuid", unix.MS_RDONLY | unix.MS_NOSUID, "", 0},
		{"ro,rw", 0, "", 0},
		{"rbind,rslave", unix.MS_BIND | unix.MS_REC, "", 1},
		{"size=10m,mode=0755,_netdev,noexec", unix.MS_NOEXEC, "size=10m,mode=0755", 0},
		{"defaults", 0, "", 0},
	} {
		o := parseMountOptions(strings.Split(tc.in, ","))
		if o.flags != tc.flags || o.data != tc.data || len(o.propagate) != tc.prop {
			t.Errorf("%q: %+v", tc.in, o)
		}
		if whole := parseMountOptions([]string{tc.in}); whole.flags != o.flags || whole.data != o.data {
			t.Errorf("%q as one option differs", tc.in)
		}
	}
}

func TestTmpfsAndUnmount(t *testing.T) {
	needRoot(t)
	m := &Mounter{}
	d := dir(t, m, "a b") // a space is escaped in /proc
	if err := m.Mount("tmpfs", d, "tmpfs", []string{"size=65536"}); err != nil {
		t.Fatal(err)
	}
	if ok, err := m.IsMountPoint(d); err != nil || !ok {
		t.Errorf("is a mount point: %v, %v", ok, err)
	}
	if err := os.WriteFile(filepath.Join(d, "big"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("the size option has no effect: %v", err)
	}
	if err := m.Unmount(d); err != nil {
		t.Fatal(err)
	}
	if ok, _ := m.IsMountPoint(d); ok {
		t.Error("is still a mount point")
	}
	if err := m.Unmount(d); err != nil {
		t.Errorf("unmounting what is not mounted: %v", err)
	}
	if err := m.Unmount(d + "/gone"); err != nil {
		t.Errorf("unmounting what is not there: %v", err)
	}
}

func TestBindReadOnly(t *testing.T) {
	needRoot(t)
	m := &Mounter{}
	from, to := dir(t, m, "from"), dir(t, m, "to")
	if err := m.Mount("tmpfs", from, "tmpfs", []string{"nodev", "nosuid"}); err != nil {
		t.Fatal(err)
	}
	if err := m.Mount(from, to, "", []string{"bind", "ro"}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(to, "f"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing through a read-only bind mount: %v", err)
	}
	if err := os.WriteFile(filepath.Join(from, "f"), nil, 0o600); err != nil {
		t.Errorf("the source became read-only: %v", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(to, &st); err != nil || st.Flags&unix.MS_NODEV == 0 || st.Flags&unix.MS_NOSUID == 0 {
		t.Errorf("the restrictions of the source were lost: %x, %v", st.Flags, err)
	}
	if refs, err := m.GetMountRefs(from); err != nil || len(refs) != 1 || refs[0] != to {
		t.Errorf("references %v, %v", refs, err)
	}
}

func TestErrorsDoNotTellSecrets(t *testing.T) {
	needRoot(t)
	m := &Mounter{}
	err := m.MountSensitive("//server/share", dir(t, m, "d"), "nosuchfs", []string{"ro"}, []string{"password=hunter2"})
	if err == nil || strings.Contains(err.Error(), "hunter2") || !strings.Contains(err.Error(), "nosuchfs") {
		t.Errorf("error %v", err)
	}
}
