package parameters

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// newMachine is the part of a machine that the package knows.
func newMachine(t *testing.T) (root string, write func(name, text string), read func(name string) string) {
	t.Helper()
	root = t.TempDir()
	write = func(name, text string) {
		t.Helper()
		path := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	read = func(name string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(root, name))
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(data))
	}
	for name, text := range map[string]string{
		"net/ipv4/ip_forward": "0\n", "net/ipv6/conf/eth0/accept_ra": "1\n", "fs/inotify/max_user_instances": "128\n", "vm/overcommit_memory": "0\n",
		"kernel/panic": "10\n", "kernel/panic_on_oops": "0\n", "kernel/random/boot_id": "first\n",
	} {
		write("proc/sys/"+name, text)
	}
	write("sys/class/net/eth0/device/vendor", "x")
	write("sys/class/net/lo/mtu", "x")
	write("sys/class/net/bonding_masters", "")
	write("sys/fs/cgroup/system.slice/x", "")
	if err := os.MkdirAll(filepath.Join(root, "run/kedge"), 0o755); err != nil {
		t.Fatal(err)
	}
	return root, write, read
}

// start is a start of a node.
func start(t *testing.T, root string, write func(name, text string)) {
	t.Helper()
	if err := Remember(root, "/run/kedge"); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"net/ipv4/ip_forward": "1", "net/ipv6/conf/eth0/accept_ra": "2", "fs/inotify/max_user_instances": "8192", "vm/overcommit_memory": "1",
		"kernel/panic": "10", "kernel/panic_on_oops": "1",
	} {
		write("proc/sys/"+name, text)
	}
}

func TestRestore(t *testing.T) {
	for name, test := range map[string]struct {
		meanwhile func(write func(name, text string))
		want      string // of ip_forward, accept_ra, overcommit_memory and panic
		note      string
	}{
		"nothing else":                    {func(func(string, string)) {}, "0 1 0 10", ""},
		"another program changed a value": {func(write func(name, text string)) { write("proc/sys/vm/overcommit_memory", "2\n") }, "0 1 2 10", ""},
		"a file sets it": {func(write func(name, text string)) { write("etc/sysctl.d/9.conf", "# x\n-net/ipv4/ip_forward =1\n") }, "1 1 0 10",
			"the kernel parameter net.ipv4.ip_forward stays 1, and was 0: /etc/sysctl.d/9.conf sets it"},
		"a file has it in a comment": {func(write func(name, text string)) {
			write("etc/sysctl.conf", "#net.ipv4.ip_forward=1\nnet.ipv4.ip_forward_use_pmtu=1\n")
		}, "0 1 0 10", ""},
		"Docker": {func(write func(name, text string)) { write("sys/class/net/docker0/bridge/x", "") }, "1 1 0 10",
			"the kernel parameter net.ipv4.ip_forward stays 1, and was 0: the interface docker0 of another program may need it"},
		"another node": {func(write func(name, text string)) { write("sys/fs/cgroup/pids/kedge-n2/cgroup.procs", "") }, "1 2 1 10",
			"another kedge (kedge-n2) is on this machine"},
		"a boot":         {func(write func(name, text string)) { write("proc/sys/kernel/random/boot_id", "second\n") }, "1 2 1 10", ""},
		"a damaged file": {func(write func(name, text string)) { write("run/kedge/parameters.json", "{}") }, "1 2 1 10", ""},
	} {
		root, write, read := newMachine(t)
		start(t, root, write)
		start(t, root, write) // again, when the values are kedge's
		test.meanwhile(write)
		notes, err := Restore(root, "/run/kedge")
		var got []string
		for _, p := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/eth0/accept_ra", "vm/overcommit_memory", "kernel/panic"} {
			got = append(got, read("proc/sys/"+p))
		}
		text := strings.Join(notes, "\n")
		if err != nil || strings.Join(got, " ") != test.want || (test.note == "") != (text == "") || !strings.Contains(text, test.note) {
			t.Errorf("%s: %v, parameters %v, want %s; notes %q", name, err, got, test.want, text)
		}
	}
}

// TestControllers: where systemd has the tree, controllers that it does not know are disabled again.
func TestControllers(t *testing.T) {
	const file = enabledControllers
	for name, test := range map[string]struct {
		systemd        bool
		before, during string
		want           string // the last that is written; during if nothing is
	}{
		"with systemd":            {true, "memory pids", "cpu memory pids misc", "-misc"},
		"enabled before":          {true, "memory misc", "cpu memory misc", "cpu memory misc"},
		"none before":             {true, "", "rdma", "-rdma"},
		"without systemd":         {false, "memory pids", "cpu memory pids misc", "cpu memory pids misc"},
		"only what systemd knows": {true, "", "cpu cpuset io memory pids", "cpu cpuset io memory pids"},
	} {
		root, write, read := newMachine(t)
		if test.systemd {
			write("run/systemd/system/x", "")
		}
		write(file, test.before+"\n")
		start(t, root, write)
		write(file, test.during)
		start(t, root, write)
		if notes, err := Restore(root, "/run/kedge"); err != nil || len(notes) > 0 || read(file) != test.want {
			t.Errorf("%s: %v, %v, %q, want %q", name, notes, err, read(file), test.want)
		}
	}
	// Cgroups of version 1.
	root, write, _ := newMachine(t)
	write("run/systemd/system/x", "")
	start(t, root, write)
	if notes, err := Restore(root, "/run/kedge"); err != nil || len(notes) > 0 {
		t.Errorf("%v, %v", notes, err)
	}
}

// TestDamagedFile: a file with other values than those that were written is not believed, and written again.
func TestDamagedFile(t *testing.T) {
	root, write, read := newMachine(t)
	start(t, root, write)
	file := "run/kedge/" + FileName
	whole := read(file)
	write(file, strings.Replace(whole, `"128"`, `"129"`, 1))
	if notes, err := Restore(root, "/run/kedge"); err != nil || len(notes) > 0 || read("proc/sys/fs/inotify/max_user_instances") != "8192" {
		t.Errorf("%v, %v", notes, err)
	}
	start(t, root, write)
	if now := read(file); !strings.Contains(now, `"8192"`) {
		t.Errorf("the file is\n%s", now)
	}
	// One that cannot be written is an error.
	if err := Remember(root, "/nowhere"); err == nil {
		t.Error("no error")
	}
}
