package preflight

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/testhost"
)

// goodMachine is one on which every check is content.
func goodMachine() (Config, probes) {
	c := DefaultConfig()
	c.BuildDate = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	files := map[string]string{
		"/proc/self/status":                       "Name:\tkedge\nCapEff:\t000001ffffffffff\n",
		"/proc/sys/user/max_user_namespaces":      "15000\n",
		"/sys/fs/cgroup/cgroup.controllers":       "cpuset cpu io memory hugetlb pids\n",
		"/proc/cgroups":                           "",
		"/proc/meminfo":                           "MemTotal:        2048000 kB\nMemFree: 1 kB\n",
		"/sys/fs/cgroup/memory.max":               "max\n",
		"/proc/swaps":                             "Filename Type Size Used Priority\n",
		"/proc/sys/fs/inotify/max_user_instances": "8192\n",
		"/proc/sys/fs/inotify/max_user_watches":   "524288\n",
	}
	return c, probes{
		readFile: func(path string) ([]byte, error) {
			if text, ok := files[path]; ok {
				return []byte(text), nil
			}
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		},
		statfs: func(path string) (fsInfo, error) {
			if path == "/sys/fs/cgroup" {
				return fsInfo{kind: unix.CGROUP2_SUPER_MAGIC}, nil
			}
			return fsInfo{kind: unix.EXT4_SUPER_MAGIC, size: 100 * gibi, free: 50 * gibi, inodes: 1000, avail: 500}, nil
		},
		euid:          func() int { return 0 },
		hostname:      func() (string, error) { return "Node-1.example", nil },
		now:           func() time.Time { return c.BuildDate.AddDate(0, 1, 0) },
		clockSynced:   func() (bool, error) { return true, nil },
		openFileLimit: func() (uint64, error) { return 1 << 20, nil },
		readable:      func(string) error { return nil },
		writable:      func(string) error { return nil },
		inPath:        func(string) error { return nil },
		tryFiles:      func(string) error { return nil },
		tryNamespace:  func(int) error { return nil },
		tryInotify:    func(int) error { return nil },
		trySeccomp:    func() error { return nil },
		tryOverlay:    func(string) error { return nil },
		tryLink:       func(string) error { return nil },
		tryNft:        func(nftFeature) error { return nil },
		tryConntrack:  func() error { return nil },
		dropsForwards: func() ([]string, error) { return nil, nil },
		defaultRoute:  func() (bool, error) { return true, nil },
		routes:        func() ([]route, error) { return nil, nil },
		listen:        func(string, string) error { return nil },
	}
}

// unreadable makes opening one path fail.
func (p *probes) unreadable(path string, err error) {
	open := p.readable
	p.readable = func(name string) error {
		if name == path {
			return err
		}
		return open(name)
	}
}

// file makes one path read as text.
func (p *probes) file(path, text string) {
	read := p.readFile
	p.readFile = func(name string) ([]byte, error) {
		if name == path {
			return []byte(text), nil
		}
		return read(name)
	}
}

// disk changes what statfs says of everything but the control groups.
func (p *probes) disk(info fsInfo) {
	stat := p.statfs
	p.statfs = func(path string) (fsInfo, error) {
		if strings.HasPrefix(path, "/sys/") {
			return stat(path)
		}
		return info, nil
	}
}

func TestGoodMachine(t *testing.T) {
	c, p := goodMachine()
	results := run(t.Context(), c, p)
	if len(results) != len(checks()) {
		t.Errorf("%d results of %d checks", len(results), len(checks()))
	}
	for _, r := range results {
		if r.Level != OK || r.Message == "" || r.Remedy != "" {
			t.Errorf("%+v", r)
		}
	}
	if err := verdict(results); err != nil {
		t.Error(err)
	}
}

func TestFindings(t *testing.T) {
	room := fsInfo{kind: unix.EXT4_SUPER_MAGIC, size: 100 * gibi, free: 50 * gibi, inodes: 1000, avail: 500}
	with := func(change func(*fsInfo)) fsInfo { f := room; change(&f); return f }
	for _, tc := range []struct {
		name   string
		change func(*Config, *probes)
		check  string
		level  Level
		says   string // part of message or remedy
	}{
		{"not root", func(_ *Config, p *probes) { p.euid = func() int { return 1000 } }, "privileges", Error, "sudo"},
		{"capabilities missing", func(_ *Config, p *probes) { p.file("/proc/self/status", "CapEff:\t00000000a80425fb\n") }, "privileges", Error, "CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN"},
		{"resource capability missing", func(_ *Config, p *probes) { p.file("/proc/self/status", "CapEff:\t000001fffeffffff\n") }, "privileges", Warning, "CAP_SYS_RESOURCE"},
		{"no pid namespaces", func(_ *Config, p *probes) {
			p.tryNamespace = func(flag int) error {
				if flag == unix.CLONE_NEWPID {
					return unix.EINVAL
				}
				return nil
			}
		}, "namespaces", Error, "pid (invalid argument)"},
		{"user namespaces off", func(_ *Config, p *probes) { p.file("/proc/sys/user/max_user_namespaces", "0\n") }, "namespaces", Warning, "hostUsers"},
		{"memory controller off", func(_ *Config, p *probes) { p.file("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n") }, "cgroups", Error, "cgroup_enable=memory"},
		{"memory controller off on a Raspberry Pi", func(_ *Config, p *probes) {
			p.file("/sys/fs/cgroup/cgroup.controllers", "cpuset cpu io pids\n")
			p.file("/proc/device-tree/model", "Raspberry Pi 4 Model B Rev 1.4\x00")
		}, "cgroups", Error, "/boot/firmware/cmdline.txt"},
		{"control groups v1", func(_ *Config, p *probes) {
			p.statfs = func(string) (fsInfo, error) { return with(func(f *fsInfo) { f.kind = unix.TMPFS_MAGIC }), nil }
			p.file("/proc/cgroups", "#subsys_name hierarchy num_cgroups enabled\ncpuset 3 8 1\ncpu 1 8 1\nmemory 4 27 1\npids 8 8 1\n")
		}, "cgroups", Warning, "version 1"},
		{"control groups v1, one not mounted", func(_ *Config, p *probes) {
			p.statfs = func(string) (fsInfo, error) { return with(func(f *fsInfo) { f.kind = unix.TMPFS_MAGIC }), nil }
			p.file("/proc/cgroups", "cpuset 3 8 1\ncpu 1 8 1\nmemory 4 27 1\npids 0 8 1\n")
		}, "cgroups", Error, "lack: pids"},
		{"control groups read-only", func(_ *Config, p *probes) {
			p.statfs = func(path string) (fsInfo, error) {
				return with(func(f *fsInfo) {
					if path == "/sys/fs/cgroup" {
						f.kind, f.flags = unix.CGROUP2_SUPER_MAGIC, unix.ST_RDONLY
					}
				}), nil
			}
		}, "cgroups", Error, "read-only"},
		{"no seccomp", func(_ *Config, p *probes) { p.trySeccomp = func() error { return unix.ENOSYS } }, "seccomp", Error, "CONFIG_SECCOMP_FILTER"},
		{"AppArmor", func(_ *Config, p *probes) { p.file("/sys/module/apparmor/parameters/enabled", "Y\n") }, "apparmor", OK, "with apparmor_parser"},
		{"AppArmor without its parser", func(_ *Config, p *probes) {
			p.file("/sys/module/apparmor/parameters/enabled", "Y\n")
			p.inPath = func(string) error { return exec.ErrNotFound }
		}, "apparmor", Warning, "pods run without a profile\ninstall the package apparmor"},
		{"AppArmor off", func(_ *Config, p *probes) {
			p.file("/sys/module/apparmor/parameters/enabled", "N\n")
			p.inPath = func(string) error { return exec.ErrNotFound }
		}, "apparmor", OK, "not in use"},
		{"no kernel log", func(_ *Config, p *probes) { p.unreadable("/dev/kmsg", fs.ErrPermission) }, "kernel-log", Error, "/dev/kmsg"},
		{"parameters read-only", func(_ *Config, p *probes) { p.writable = func(string) error { return unix.EROFS } }, "kernel-parameters", Error, "/proc/sys"},
		{"IPv6 disabled", func(c *Config, p *probes) {
			c.IPv6 = true
			p.writable = func(path string) error {
				if strings.Contains(path, "ipv6") {
					return fs.ErrNotExist
				}
				return nil
			}
		}, "kernel-parameters", Error, "ipv6.disable=1"},
		{"data directory read-only", func(c *Config, p *probes) {
			p.tryFiles = func(dir string) error {
				if dir == c.DataDir {
					return unix.EROFS
				}
				return nil
			}
		}, "data-directory", Error, "--data-dir"},
		{"data directory noexec", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.flags = unix.ST_NOEXEC })) }, "data-directory", Error, "noexec"},
		{"data directory in memory", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.kind = unix.TMPFS_MAGIC })) }, "data-directory", Warning, "reboot"},
		{"data directory on NFS", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.kind = unix.NFS_SUPER_MAGIC })) }, "data-directory", Warning, "local disk"},
		{"no overlay", func(_ *Config, p *probes) { p.tryOverlay = func(string) error { return unix.ENODEV } }, "overlayfs", Warning, "CONFIG_OVERLAY_FS"},
		{"overlay on overlay", func(_ *Config, p *probes) {
			p.tryOverlay = func(string) error { return unix.EINVAL }
			p.disk(with(func(f *fsInfo) { f.kind = unix.OVERLAYFS_SUPER_MAGIC }))
		}, "overlayfs", Warning, "more disk and time\nthe directory is inside a container's own layers: mount a volume there"},
		{"overlay asked for", func(c *Config, p *probes) {
			c.Snapshotter = "overlayfs"
			p.tryOverlay = func(string) error { return unix.EINVAL }
		}, "overlayfs", Error, "; or leave out --snapshotter=overlayfs"},
		{"overlay chosen before", func(c *Config, p *probes) {
			c.SnapshotterFile = "/chosen"
			p.file("/chosen", "overlayfs\n")
			p.tryOverlay = func(string) error { return unix.EINVAL }
		}, "overlayfs", Error, "--snapshotter=native"},
		{"copies chosen before", func(c *Config, p *probes) {
			c.SnapshotterFile = "/chosen"
			p.file("/chosen", "native\n")
			p.tryOverlay = func(string) error { return unix.EINVAL }
		}, "overlayfs", Warning, "copied"},
		{"copies asked for", func(c *Config, p *probes) {
			c.Snapshotter = "native"
			p.tryOverlay = func(string) error { return unix.EINVAL }
		}, "overlayfs", OK, "copied"},
		{"disk full", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.free = 100 * mebi })) }, "disk-space", Error, "only 100 MiB free of 100 GiB"},
		{"disk small", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.free = gibi })) }, "disk-space", Warning, "1.0 GiB"},
		{"disk nearly full", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.free = 14 * gibi })) }, "disk-space", Warning, "evicted"},
		{"few inodes", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.avail = 10 })) }, "disk-space", Warning, "inodes"},
		{"little memory", func(_ *Config, p *probes) { p.file("/proc/meminfo", "MemTotal: 98304 kB\n") }, "memory", Error, "only 96 MiB"},
		{"container's memory limit", func(_ *Config, p *probes) { p.file("/sys/fs/cgroup/memory.max", "268435456\n") }, "memory", Warning, "this container has only 256 MiB"},
		{"swap", func(_ *Config, p *probes) { p.file("/proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2\n") }, "swap", OK, "swap is on"},
		{"few open files", func(_ *Config, p *probes) { p.openFileLimit = func() (uint64, error) { return 1024, nil } }, "open-files", Error, "LimitNOFILE"},
		{"inotify used up", func(_ *Config, p *probes) { p.tryInotify = func(int) error { return unix.EMFILE } }, "inotify", Error, "to 512"},
		{"inotify at its default", func(_ *Config, p *probes) { p.file("/proc/sys/fs/inotify/max_user_instances", "128\n") }, "inotify", Warning, "to 512"},
		{"no VXLAN", func(_ *Config, p *probes) {
			p.tryLink = func(kind string) error {
				if kind == "vxlan" {
					return unix.EOPNOTSUPP
				}
				return nil
			}
		}, "links", Error, "--flannel-backend"},
		{"no masquerading", func(_ *Config, p *probes) {
			p.tryNft = func(f nftFeature) error {
				if f.name == "masquerading" {
					return unix.ENOENT
				}
				return nil
			}
		}, "nftables", Error, "lacks: masquerading"},
		{"no nftables", func(_ *Config, p *probes) { p.tryNft = func(nftFeature) error { return unix.EPROTONOSUPPORT } }, "nftables", Error, "does not work"},
		{"no connection tracking", func(_ *Config, p *probes) { p.tryConntrack = func() error { return unix.EOPNOTSUPP } }, "connection-tracking", Error, "CONFIG_NF_CT_NETLINK"},
		{"firewall", func(_ *Config, p *probes) {
			p.dropsForwards = func() ([]string, error) { return []string{"firewalld/filter_FORWARD"}, nil }
		}, "firewall", Warning, "firewalld/filter_FORWARD"},
		{"no hosts file", func(_ *Config, p *probes) { p.unreadable("/etc/hosts", fs.ErrNotExist) }, "hosts-file", Error, "127.0.0.1 localhost"},
		{"no users file", func(_ *Config, p *probes) { p.unreadable("/etc/passwd", fs.ErrNotExist) }, "users-file", Error, "root:x:0:0"},
		{"tunnel into the pods' range", func(c *Config, p *probes) {
			c.Ranges, c.OwnLinks = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, "kdg1"
			p.routes = func() ([]route, error) {
				return []route{{netip.MustParsePrefix("0.0.0.0/0"), "eth0"}, {netip.MustParsePrefix("10.42.0.7/32"), "kdg1abc"}, {netip.MustParsePrefix("10.42.9.0/24"), "tun0"}}, nil
			}
		}, "ranges", Warning, "--cluster-cidr"},
		{"routes that lead nowhere else", func(c *Config, p *probes) {
			c.Ranges, c.OwnLinks = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, "kdg1"
			p.routes = func() ([]route, error) {
				return []route{{netip.MustParsePrefix("10.42.0.0/24"), ""}, {netip.MustParsePrefix("10.42.0.1/32"), "lo"}, {netip.MustParsePrefix("10.42.0.7/32"), "kdg1abc"}}, nil
			}
		}, "ranges", OK, "no route"},
		{"offline", func(_ *Config, p *probes) { p.defaultRoute = func() (bool, error) { return false, nil } }, "default-route", Warning, "--node-ip"},
		{"port in use", func(_ *Config, p *probes) {
			p.listen = func(network, addr string) error {
				if addr == ":6443" {
					return &os.SyscallError{Syscall: "bind", Err: unix.EADDRINUSE}
				}
				return nil
			}
		}, "ports", Error, "port 6443/tcp, for the API server, is in use"},
		{"bad host name", func(_ *Config, p *probes) { p.hostname = func() (string, error) { return "my_host", nil } }, "node-name", Error, "rename"},
		{"bad node name", func(c *Config, p *probes) { c.NodeName = "Node" }, "node-name", Error, "--node-name"},
		{"host name of everybody", func(_ *Config, p *probes) {
			p.hostname = func() (string, error) { return "localhost.localdomain", nil }
		}, "node-name", Warning, "join"},
		{"clock wrong", func(_ *Config, p *probes) { p.now = func() time.Time { return time.Unix(0, 0) } }, "clock", Warning, "1970-01-01"},
		{"clock not kept", func(_ *Config, p *probes) { p.clockSynced = func() (bool, error) { return false, nil } }, "clock", Warning, "NTP"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, p := goodMachine()
			tc.change(&c, &p)
			var hit bool
			for _, r := range run(t.Context(), c, p) {
				if r.Level == Error && r.Remedy == "" {
					t.Errorf("an error without a remedy: %+v", r)
				}
				if r.Check == tc.check && r.Level == tc.level && strings.Contains(r.Message+"\n"+r.Remedy, tc.says) {
					hit = true
				} else if r.Level == Error && r.Check != tc.check {
					t.Errorf("unexpected: %+v", r)
				}
			}
			if !hit {
				t.Errorf("no result %s %s that says %q: %+v", tc.check, tc.level, tc.says, run(t.Context(), c, p))
			}
		})
	}
}

func TestMissingNamesEverything(t *testing.T) {
	c, p := goodMachine()
	p.unreadable("/dev/kmsg", unix.EPERM)
	p.trySeccomp = func() error { return unix.ENOSYS }
	err := verdict(run(t.Context(), c, p))
	var missing *Missing
	if !errors.As(err, &missing) || len(missing.Results) != 2 {
		t.Fatalf("verdict: %v", err)
	}
	for _, part := range []string{"kernel-log: ", "/dev/kmsg", "seccomp: ", "CONFIG_SECCOMP_FILTER"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error does not say %q: %v", part, err)
		}
	}
}

func TestWithoutPrivilegesNothingElseIsSaid(t *testing.T) {
	c, p := goodMachine()
	p.euid = func() int { return 1 }
	p.trySeccomp = func() error { return unix.EPERM }
	var missing *Missing
	if err := verdict(run(t.Context(), c, p)); !errors.As(err, &missing) || len(missing.Results) != 1 || missing.Results[0].Check != privileges {
		t.Errorf("verdict: %v", err)
	}
}

func TestResultAsJSON(t *testing.T) {
	got, err := json.Marshal([]Result{{"ports", Error, "m", "r"}, {"swap", OK, "m", ""}})
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"check":"ports","level":"error","message":"m","remedy":"r"},{"check":"swap","level":"ok","message":"m"}]`
	if string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c, p := goodMachine()
	if results := run(ctx, c, p); len(results) != 0 {
		t.Errorf("%d results after cancellation", len(results))
	}
}

func TestDefaultRouteTables(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       bool
	}{
		{"IPv4", "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\neth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n", true},
		{"IPv4, link only", "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n", false},
		{"IPv6", strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n", true},
		{"IPv6, unreachable", strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " ffffffff 00000001 00000000 00200200       lo\n", false},
	} {
		if got := hasDefaultRoute(tc.text); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestThisMachine does the real trials: they must work where the tests of the
// network do, and leave nothing behind.
func TestThisMachine(t *testing.T) {
	testhost.RequireIsolation(t)
	dir := t.TempDir()
	before := countFiles(t, dir)
	c := Config{DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), VXLAN: true, IPv6: true,
		Ports: []Port{{6443, "tcp", "API server"}, {8472, "udp", "VXLAN"}}}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	results := Run(t.Context(), c)
	for _, r := range results {
		t.Logf("%-20s %-8s %s; %s", r.Check, r.Level, r.Message, r.Remedy)
	}
	for _, name := range []string{"namespaces", "seccomp", "data-directory", "run-directory", "links", "nftables", "connection-tracking", "ports"} {
		for _, r := range results {
			if r.Check == name && r.Level == Error {
				t.Errorf("%s: %s", name, r.Message)
			}
		}
	}
	if after := countFiles(t, dir); after != before {
		t.Errorf("%d files and directories, %d before", after, before)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Error("a mount is left behind")
	}
	// The trials meant to fail do.
	if err := tryLink("nonsense"); err == nil {
		t.Error("an interface of no kind can be made")
	}
	l, err := listenSomewhere()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := Config{DataDir: dir, RunDir: dir, Ports: []Port{{l.port, "tcp", "test"}}}
	var found bool
	for _, r := range Run(t.Context(), busy) {
		found = found || r.Check == "ports" && r.Level == Error
	}
	if !found {
		t.Error("a port in use is not found")
	}
}

func countFiles(t *testing.T, dir string) int {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { n++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestValidate(t *testing.T) {
	c := DefaultConfig()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	c.Ports = append(c.Ports, Port{0, "tcp", "x"}, Port{1, "icmp", "x"})
	if err := c.Validate(); err == nil || strings.Count(fmt.Sprint(err), "does not exist") != 2 {
		t.Errorf("Validate: %v", err)
	}
}

type busyPort struct {
	net.Listener
	port int
}

func listenSomewhere() (busyPort, error) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		return busyPort{}, err
	}
	return busyPort{l, l.Addr().(*net.TCPAddr).Port}, nil
}

func BenchmarkRun(b *testing.B) {
	testhost.RequireIsolation(b)
	c := Config{DataDir: b.TempDir(), RunDir: b.TempDir(), VXLAN: true}
	for b.Loop() {
		Run(b.Context(), c)
	}
}

// What a trial left that was cut short goes with the next; one that is under way is left alone.
func TestTrialsSweep(t *testing.T) {
	dir := t.TempDir()
	old, young := filepath.Join(dir, trialFile+"1"), filepath.Join(dir, trialFile+"2")
	for _, d := range []string{old, young} {
		if err := os.MkdirAll(filepath.Join(d, "work"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	hourAgo := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, hourAgo, hourAgo); err != nil {
		t.Fatal(err)
	}
	if err := tryFiles(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != filepath.Base(young) {
		t.Errorf("left are %v, %v", left, err)
	}
}
