package support

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
)

// kernelFiles are copied as they are.
var kernelFiles = []string{
	"/proc/version", "/proc/meminfo", "/proc/loadavg", "/proc/uptime", "/proc/vmstat", "/proc/swaps", "/proc/filesystems", "/proc/cgroups", "/proc/modules",
	"/proc/pressure/cpu", "/proc/pressure/io", "/proc/pressure/memory", "/proc/net/dev", "/proc/net/snmp", "/proc/net/netstat", "/proc/net/sockstat",
	"/proc/net/ip_tables_names", "/proc/net/stat/nf_conntrack", "/etc/os-release",
}

// sysctls are parameters that matter to kedge, as patterns below /proc/sys.
var sysctls = []string{
	"fs/file-max", "fs/file-nr", "fs/inotify/*", "fs/aio-nr", "fs/aio-max-nr", "kernel/pid_max", "kernel/threads-max", "kernel/panic", "kernel/panic_on_oops", "kernel/osrelease", "kernel/keys/maxkeys",
	"kernel/keys/root_maxkeys", "user/max_user_namespaces", "vm/overcommit_memory", "vm/panic_on_oom", "vm/swappiness", "vm/max_map_count", "vm/min_free_kbytes",
	"net/core/somaxconn", "net/core/rmem_max", "net/core/wmem_max", "net/core/netdev_max_backlog", "net/bridge/*",
	"net/ipv4/ip_forward", "net/ipv4/ip_local_port_range", "net/ipv4/tcp_max_syn_backlog", "net/ipv4/neigh/default/gc_thresh*",
	"net/ipv4/conf/*/forwarding", "net/ipv4/conf/*/rp_filter", "net/ipv4/conf/*/accept_local", "net/ipv4/conf/*/route_localnet",
	"net/ipv6/conf/*/forwarding", "net/ipv6/conf/*/accept_ra", "net/ipv6/conf/*/disable_ipv6", "net/netfilter/nf_conntrack_*",
}

// kernel copies the state of the kernel.
func (c Config) kernel(ctx context.Context, add func(string, []byte)) error {
	for _, path := range kernelFiles {
		if data, err := os.ReadFile(path); err == nil { // not each kernel has all of them
			add("kernel/"+strings.TrimPrefix(strings.ReplaceAll(path, "/", "-"), "-")+".txt", data)
		}
	}
	var b bytes.Buffer
	for _, pattern := range sysctls {
		paths, _ := filepath.Glob("/proc/sys/" + pattern)
		for _, path := range paths {
			if data, err := os.ReadFile(path); err == nil {
				fmt.Fprintf(&b, "%s = %s\n", strings.TrimPrefix(path, "/proc/sys/"), strings.TrimSpace(string(data)))
			}
		}
	}
	add("kernel/sysctls.txt", b.Bytes())
	text, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return err
	}
	add("kernel/mounts.txt", mounts(string(text)))
	return ctx.Err()
}

// mountOptions are copied of mounts; others may be names of users or keys of a network file system.
var mountOptions = []string{"rw", "ro", "nosuid", "nodev", "noexec", "noatime", "nodiratime", "relatime", "strictatime", "sync", "dirsync", "bind", "discard", "errors", "data", "commit", "size", "mode", "nr_inodes", "prjquota", "usrquota", "grpquota", "index", "metacopy", "userxattr", "volatile", "compress", "subvol"}

// mounts returns mounts without the options that are not known.
func mounts(text string) []byte {
	var b bytes.Buffer
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 4 {
			continue
		}
		var options []string
		for o := range strings.SplitSeq(f[3], ",") {
			name, _, _ := strings.Cut(o, "=")
			if slices.Contains(mountOptions, name) {
				options = append(options, o)
			}
		}
		fmt.Fprintf(&b, "%s %s %s %s\n", f[0], f[1], f[2], strings.Join(options, ","))
	}
	return b.Bytes()
}

// network describes interfaces, routes and rules.
func (c Config) network(_ context.Context, add func(string, []byte)) error {
	var b bytes.Buffer
	var errs []error
	links, err := netlink.LinkList()
	errs = append(errs, complete(err))
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		fmt.Fprintf(&b, "%d: %s type %s mtu %d state %s flags %s address %s parent %d\n", a.Index, a.Name, l.Type(), a.MTU, a.OperState, a.Flags, a.HardwareAddr, a.ParentIndex)
		if s := a.Statistics; s != nil {
			fmt.Fprintf(&b, "    received %d packets, %d errors, %d dropped; sent %d packets, %d errors, %d dropped\n", s.RxPackets, s.RxErrors, s.RxDropped, s.TxPackets, s.TxErrors, s.TxDropped)
		}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		errs = append(errs, complete(err))
		for _, addr := range addrs {
			fmt.Fprintf(&b, "    %s scope %d flags %#x\n", addr.IPNet, addr.Scope, addr.Flags)
		}
	}
	add("network/links.txt", bytes.Clone(b.Bytes()))
	b.Reset()
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: 0}, netlink.RT_FILTER_TABLE)
		errs = append(errs, complete(err))
		for _, r := range routes {
			fmt.Fprintf(&b, "table %d type %d protocol %d dst %s via %s dev %s src %s metric %d tos %#x\n", r.Table, r.Type, r.Protocol, destination(r.Dst), r.Gw, names[r.LinkIndex], r.Src, r.Priority, r.Tos)
		}
	}
	add("network/routes.txt", bytes.Clone(b.Bytes()))
	b.Reset()
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	errs = append(errs, complete(err))
	for _, r := range rules {
		fmt.Fprintln(&b, r)
	}
	add("network/rules.txt", b.Bytes())
	return errors.Join(errs...)
}

// complete returns nil for a dump that changed while it was read: its content is good enough.
func complete(err error) error {
	if errors.Is(err, netlink.ErrDumpInterrupted) {
		return nil
	}
	return err
}

func destination(n *net.IPNet) string {
	if n == nil {
		return "default"
	}
	return n.String()
}

// nftables describes the tables of kedge with their chains, rules and sets, and of other tables the chains that see all
// packets.
func (c Config) nftables(ctx context.Context, add func(string, []byte)) error {
	conn, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := conn.ListChains()
	if err != nil {
		return err
	}
	var b bytes.Buffer
	sets := map[string]bool{}
	for _, ch := range chains {
		if ctx.Err() != nil || b.Len() > mostFile {
			break
		}
		own := strings.HasPrefix(ch.Table.Name, "kedge-")
		if !own && ch.Hooknum == nil {
			continue
		}
		fmt.Fprintf(&b, "table %s (family %d) chain %s", ch.Table.Name, ch.Table.Family, ch.Name)
		if ch.Hooknum != nil {
			fmt.Fprintf(&b, " type %s hook %d priority %d", ch.Type, *ch.Hooknum, *ch.Priority)
		}
		if ch.Policy != nil {
			fmt.Fprintf(&b, " policy %d", *ch.Policy)
		}
		b.WriteByte('\n')
		rules, err := conn.GetRules(ch.Table, ch)
		if err != nil {
			return err
		}
		if !own {
			fmt.Fprintf(&b, "    %d rules of another program\n", len(rules))
			continue
		}
		for _, r := range rules {
			b.WriteString("   ")
			for _, e := range r.Exprs {
				fmt.Fprintf(&b, " %s%+v", strings.TrimPrefix(fmt.Sprintf("%T", e), "*expr."), e)
			}
			b.WriteByte('\n')
		}
		if key := fmt.Sprint(ch.Table.Family, ch.Table.Name); !sets[key] {
			sets[key] = true
			if err := describeSets(&b, conn, ch.Table); err != nil {
				return err
			}
		}
	}
	add("network/nftables.txt", b.Bytes())
	return ctx.Err()
}

func describeSets(b *bytes.Buffer, conn *nftables.Conn, table *nftables.Table) error {
	sets, err := conn.GetSets(table)
	if err != nil {
		return err
	}
	for _, s := range sets {
		elements, err := conn.GetSetElements(s)
		if err != nil {
			return err
		}
		fmt.Fprintf(b, "table %s set %s map %t %d elements\n", table.Name, s.Name, s.IsMap, len(elements))
		for i, e := range elements {
			const most = 200
			if i == most {
				b.WriteString("    ...\n")
				break
			}
			fmt.Fprintf(b, "    %x : %x", e.Key, e.Val)
			if e.VerdictData != nil {
				fmt.Fprintf(b, " %+v", *e.VerdictData)
			}
			b.WriteByte('\n')
		}
	}
	return nil
}

// cgroupFiles are copied of each cgroup of version 2 or 1.
var cgroupFiles = []string{
	"cgroup.controllers", "cgroup.subtree_control", "cgroup.events", "cpu.max", "cpu.stat", "cpu.pressure", "memory.current", "memory.max", "memory.high", "memory.events", "memory.pressure", "io.pressure", "pids.current", "pids.max",
	"memory.usage_in_bytes", "memory.limit_in_bytes", "memory.failcnt", "memory.oom_control", "cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares",
}

// cgroups copies the limits and the use of the cgroups of pods, and of their parents.
func (c Config) cgroups(ctx context.Context, add func(string, []byte)) error {
	const mounted, deepest = "/sys/fs/cgroup", 4
	var b bytes.Buffer
	roots := []string{mounted}
	if entries, err := os.ReadDir(mounted); err == nil { // the hierarchies of version 1
		for _, e := range entries {
			if slices.Contains([]string{"memory", "cpu", "pids", "unified"}, e.Name()) {
				roots = append(roots, filepath.Join(mounted, e.Name()))
			}
		}
	}
	for _, root := range roots {
		for _, group := range c.CgroupRoots {
			top := filepath.Join(root, group)
			err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
				switch {
				case ctx.Err() != nil || b.Len() > mostFile:
					return fs.SkipAll
				case err != nil || !d.IsDir():
					return nil // a group that was removed meanwhile
				case strings.Count(strings.TrimPrefix(path, top), "/") > deepest:
					return fs.SkipDir
				}
				for _, name := range cgroupFiles {
					if data, err := os.ReadFile(filepath.Join(path, name)); err == nil {
						fmt.Fprintf(&b, "%s/%s: %s\n", path, name, strings.Join(strings.Fields(string(data)), " "))
					}
				}
				return nil
			})
			if err != nil {
				return err
			}
		}
	}
	add("kernel/cgroups.txt", b.Bytes())
	return ctx.Err()
}
