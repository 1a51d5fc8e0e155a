package preflight

import (
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kedge/internal/hostfirewall"

	"golang.org/x/sys/unix"
)

// findingCase is a change of a good machine, and what is found then.
type findingCase struct {
	name   string
	change func(*Config, *probes)
	check  string
	level  Level
	says   string // part of message or remedy
}

func TestFindings(t *testing.T) {
	for subject, findings := range map[string][]findingCase{
		"kernel":   kernelFindings,
		"storage":  storageFindings,
		"limit":    limitFindings,
		"network":  networkFindings,
		"identity": identityFindings,
	} {
		t.Run(subject, func(t *testing.T) {
			for _, tc := range findings {
				t.Run(tc.name, tc.run)
			}
		})
	}
}

// run makes the change and looks for the finding, and for errors that nobody expects.
func (tc findingCase) run(t *testing.T) {
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
}

// with changes a disk with room.
func with(change func(*fsInfo)) fsInfo {
	f := fsInfo{kind: unix.EXT4_SUPER_MAGIC, size: 100 * gibi, free: 50 * gibi, inodes: 1000, avail: 500}
	change(&f)
	return f
}

// kernelFindings are of what kedge may do and what the kernel has.
var kernelFindings = []findingCase{
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
}

// storageFindings are of disks and file systems.
var storageFindings = []findingCase{
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
	{"disk full of a node that exists", func(c *Config, p *probes) {
		c.Exists = true
		p.disk(with(func(f *fsInfo) { f.free = 100 * mebi }))
	}, "disk-space", Warning, "takes no changes but deletions"},
	{"disk small", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.free = gibi })) }, "disk-space", Warning, "1.0 GiB"},
	{"disk nearly full", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.free = 14 * gibi })) }, "disk-space", Warning, "evicted"},
	{"few inodes", func(_ *Config, p *probes) { p.disk(with(func(f *fsInfo) { f.avail = 10 })) }, "disk-space", Warning, "inodes"},
}

// limitFindings are of memory and limits of resources.
var limitFindings = []findingCase{
	{"a machine of 128 MiB", func(_ *Config, p *probes) { p.file("/proc/meminfo", "MemTotal: 108000 kB\n") }, "memory", Error, "kedge needs 176 MiB"},
	{"a control group of 128 MiB", func(_ *Config, p *probes) { p.memoryLimit = func() (int64, bool) { return 128 << 20, true } }, "memory", Warning, "only 128 MiB"},
	{"a control group of 112 MiB", func(_ *Config, p *probes) { p.memoryLimit = func() (int64, bool) { return 112 << 20, true } }, "memory", Error, "kedge needs 128 MiB"},
	{"a control group of 112 MiB for a control plane alone", func(c *Config, p *probes) {
		c.NoNode = true
		p.memoryLimit = func() (int64, bool) { return 112 << 20, true }
	}, "memory", Warning, "only 112 MiB"},
	{"little memory", func(_ *Config, p *probes) { p.file("/proc/meminfo", "MemTotal: 98304 kB\n") }, "memory", Error, "only 96 MiB"},
	{"container's memory limit", func(_ *Config, p *probes) { p.memoryLimit = func() (int64, bool) { return 256 << 20, true } }, "memory", Warning, "the control group of this process has only 256 MiB"},
	{"swap", func(_ *Config, p *probes) { p.file("/proc/swaps", "Filename\n/dev/sda2 partition 1 0 -2\n") }, "swap", OK, "swap is on"},
	{"few open files", func(_ *Config, p *probes) { p.openFileLimit = func() (uint64, error) { return 1024, nil } }, "open-files", Error, "LimitNOFILE"},
	{"inotify used up", func(_ *Config, p *probes) { p.tryInotify = func(int) error { return unix.EMFILE } }, "inotify", Error, "to 512"},
	{"inotify at its default", func(_ *Config, p *probes) { p.file("/proc/sys/fs/inotify/max_user_instances", "128\n") }, "inotify", Warning, "to 512"},
}

// networkFindings are of the network.
var networkFindings = []findingCase{
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
		p.dropsPods = func(Config) ([]hostfirewall.Drop, error) {
			return []hostfirewall.Drop{{Family: "inet", Table: "firewalld", Chain: "filter_FORWARD", Hook: hostfirewall.Forward}}, nil
		}
	}, "firewall", Warning, "chain filter_FORWARD of nftables table inet firewalld"},
	{"Docker's firewall", func(c *Config, p *probes) {
		c.OwnLinks = "kdg1"
		p.dropsPods = func(Config) ([]hostfirewall.Drop, error) {
			return []hostfirewall.Drop{{Family: "ip", Table: "filter", Chain: "FORWARD", Hook: hostfirewall.Forward, Policy: true, Docker: true}}, nil
		}
	}, "firewall", Warning, "iptables -I DOCKER-USER -i kdg1+ -j ACCEPT; iptables -I DOCKER-USER -o kdg1+ -j ACCEPT"},
	{"tunnel into the pods' range", func(c *Config, p *probes) {
		c.Ranges, c.OwnLinks = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, "kdg1"
		p.routes = func() ([]route, error) {
			return []route{{to: netip.MustParsePrefix("0.0.0.0/0"), link: "eth0"}, {to: netip.MustParsePrefix("10.42.0.7/32"), link: "kdg1abc"}, {to: netip.MustParsePrefix("10.42.9.0/24"), link: "tun0"}}, nil
		}
	}, "ranges", Warning, "--cluster-cidr"},
	{"routes to other nodes, beside a running kedge", func(c *Config, p *probes) {
		c.Ranges, c.Running = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, 1
		p.routes = func() ([]route, error) {
			return []route{{to: netip.MustParsePrefix("10.42.1.0/24"), link: "eth0", ours: true}, {to: netip.MustParsePrefix("10.43.0.10/32"), link: "lo", ours: true}}, nil
		}
	}, "ranges", OK, "no route"},
	{"another's tunnel, beside a running kedge", func(c *Config, p *probes) {
		c.Ranges, c.Running = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, 1
		p.routes = func() ([]route, error) {
			return []route{{to: netip.MustParsePrefix("10.42.1.0/24"), link: "tun0"}}, nil
		}
	}, "ranges", Warning, "tun0"},
	{"ports of a running kedge", func(c *Config, p *probes) {
		c.Running = 77
		p.listen = func(string, string) error { return &os.SyscallError{Syscall: "bind", Err: unix.EADDRINUSE} }
	}, "ports", OK, "process 77"},
	{"routes that lead nowhere else", func(c *Config, p *probes) {
		c.Ranges, c.OwnLinks = []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, "kdg1"
		p.routes = func() ([]route, error) {
			return []route{{to: netip.MustParsePrefix("10.42.0.0/24"), link: ""}, {to: netip.MustParsePrefix("10.42.0.1/32"), link: "lo"}, {to: netip.MustParsePrefix("10.42.0.7/32"), link: "kdg1abc"}}, nil
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
}

// identityFindings are of files, names and time.
var identityFindings = []findingCase{
	{"no hosts file", func(_ *Config, p *probes) { p.unreadable("/etc/hosts", fs.ErrNotExist) }, "hosts-file", Error, "127.0.0.1 localhost"},
	{"no users file", func(_ *Config, p *probes) { p.unreadable("/etc/passwd", fs.ErrNotExist) }, "users-file", Error, "root:x:0:0"},
	{"bad host name", func(_ *Config, p *probes) { p.hostname = func() (string, error) { return "my_host", nil } }, "node-name", Error, "rename"},
	{"bad node name", func(c *Config, p *probes) { c.NodeName = "Node" }, "node-name", Error, "--node-name"},
	{"host name of everybody", func(_ *Config, p *probes) {
		p.hostname = func() (string, error) { return "localhost.localdomain", nil }
	}, "node-name", Warning, "join"},
	{"clock wrong", func(_ *Config, p *probes) { p.now = func() time.Time { return time.Unix(0, 0) } }, "clock", Warning, "1970-01-01"},
	{"clock not kept", func(_ *Config, p *probes) { p.clockSynced = func() (bool, error) { return false, nil } }, "clock", Warning, "NTP"},
}
