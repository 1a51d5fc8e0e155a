package doctor

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
)

// tunnelPrefixes begin the names of the links to other nodes.
var tunnelPrefixes = []string{"kedge-", "kedge6-"}

func (s *subject) isTunnel(link string) bool {
	return slices.ContainsFunc(tunnelPrefixes, func(p string) bool { return strings.HasPrefix(link, p) })
}

func (s *subject) isPod(link string) bool {
	return s.Preflight.OwnLinks != "" && strings.HasPrefix(link, s.Preflight.OwnLinks)
}

func readForwarding(_ context.Context, s *subject) (forwarding, error) {
	if !s.node() {
		return forwarding{}, skip("no node runs on this machine")
	}
	f := forwarding{sysctls: map[string]string{}, ipv6: s.Preflight.IPv6, writable: setSysctl}
	links, err := net.Interfaces()
	if err != nil {
		return f, fmt.Errorf("list interfaces: %w", err)
	}
	names := []string{ipForward, ip6Forward, bridgeCall, "net/ipv4/conf/all/rp_filter"}
	for _, l := range links {
		if s.isPod(l.Name) {
			f.pods++
		} else if !s.isTunnel(l.Name) {
			continue
		}
		f.links = append(f.links, l.Name)
		names = append(names, "net/ipv4/conf/"+l.Name+"/rp_filter")
	}
	for _, name := range names {
		data, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return f, err
		}
		f.sysctls[name] = strings.TrimSpace(string(data))
	}
	return f, nil
}

func readClock(ctx context.Context, _ *subject) (clock, error) {
	const timeError = 5 // TIME_ERROR
	var t unix.Timex
	state, err := unix.Adjtimex(&t)
	if err != nil {
		return clock{}, fmt.Errorf("adjtimex: %w", err)
	}
	c := clock{now: time.Now(), synced: state != timeError && t.Status&unix.STA_UNSYNC == 0, maxError: time.Duration(t.Maxerror) * time.Microsecond}
	for pid := range processes(ctx) {
		if name := processName(pid); slices.Contains(clockDaemons, name) {
			c.daemon = name
			break
		}
	}
	return c, nil
}

// processes yields the processes of the machine until ctx ends.
func processes(ctx context.Context) func(yield func(pid int) bool) {
	return func(yield func(int) bool) {
		entries, _ := os.ReadDir("/proc")
		for _, e := range entries {
			pid, err := strconv.Atoi(e.Name())
			if err != nil {
				continue
			}
			if ctx.Err() != nil || !yield(pid) {
				return
			}
		}
	}
}

func processName(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// openFiles calls do with each open file of a process, and returns how many there are.
func openFiles(pid int, do func(fd, target string)) int {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0 // the process has exited
	}
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil {
			do(e.Name(), target)
		}
	}
	return len(entries)
}

func readCgroup(_ context.Context, s *subject) (cgroupFacts, error) {
	c := cgroupFacts{root: s.CgroupRoot}
	switch {
	case s.CgroupRoot == "":
		return c, skip("no node runs on this machine")
	case s.state != Running:
		return c, skip("kedge is not running")
	}
	const mounted = "/sys/fs/cgroup"
	if cgroup.Unified() {
		data, err := os.ReadFile(filepath.Join(mounted, c.root, "cgroup.controllers"))
		if errors.Is(err, fs.ErrNotExist) {
			c.missing = []string{"all controllers"}
			return c, nil
		}
		have := strings.Fields(string(data))
		for _, name := range []string{"cpu", "memory", "pids"} {
			if !slices.Contains(have, name) {
				c.missing = append(c.missing, name)
			}
		}
		return c, err
	}
	for _, name := range []string{"cpu", "memory", "pids"} {
		if _, err := os.Stat(filepath.Join(mounted, name, c.root)); errors.Is(err, fs.ErrNotExist) {
			c.missing = append(c.missing, name)
		} else if err != nil {
			return c, err
		}
	}
	return c, nil
}

func readMemory(context.Context, *subject) (memory, error) {
	var m memory
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return m, err
	}
	m.total, m.available = meminfo(data, "MemTotal"), meminfo(data, "MemAvailable")
	pressure, err := os.ReadFile("/proc/pressure/memory")
	if err == nil { // the kernel may lack it, or be booted with psi=0
		m.pressure, m.some, m.full = true, share(string(pressure), "some"), share(string(pressure), "full")
	}
	return m, nil
}

// meminfo returns a value of /proc/meminfo in bytes.
func meminfo(data []byte, name string) uint64 {
	for line := range bytes.Lines(data) {
		var kib uint64
		if _, err := fmt.Sscanf(string(line), name+": %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	return 0
}

// share returns the share of the last minute of a line of /proc/pressure/memory.
func share(text, kind string) float64 {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) < 3 || f[0] != kind {
			continue
		}
		if v, ok := strings.CutPrefix(f[2], "avg60="); ok {
			n, _ := strconv.ParseFloat(v, 64)
			return n
		}
	}
	return 0
}

func readLimits(ctx context.Context, s *subject) (limits, error) {
	l := limits{set: setSysctl}
	var err error
	if l.instances.limit, err = number("/proc/sys/fs/inotify/max_user_instances"); err != nil {
		return l, err
	}
	if l.watches.limit, err = number("/proc/sys/fs/inotify/max_user_watches"); err != nil {
		return l, err
	}
	data, err := os.ReadFile("/proc/sys/fs/file-nr") // allocated, unused, and the most
	if err != nil {
		return l, err
	}
	var unused uint64
	if _, err := fmt.Sscan(string(data), &l.allFiles.used, &unused, &l.allFiles.limit); err != nil {
		return l, fmt.Errorf("read /proc/sys/fs/file-nr: %w", err)
	}
	for pid := range processes(ctx) {
		st, err := os.Stat(fmt.Sprintf("/proc/%d", pid))
		if err != nil {
			continue
		}
		if owner, ok := st.Sys().(*syscall.Stat_t); !ok || owner.Uid != 0 {
			continue
		}
		openFiles(pid, func(fd, target string) {
			if target == "anon_inode:inotify" {
				l.instances.used++
				l.watches.used += countWatches(pid, fd)
			}
		})
	}
	if s.state == Running {
		l.files.used = uint64(openFiles(s.report.PID, func(string, string) {}))
		l.files.limit = fileLimit(s.report.PID)
	}
	return l, ctx.Err()
}

func countWatches(pid int, fd string) (n uint64) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd))
	if err != nil {
		return 0
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if strings.HasPrefix(lines.Text(), "inotify ") {
			n++
		}
	}
	return n
}

// fileLimit returns how many files a process may open.
func fileLimit(pid int) uint64 {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/limits", pid))
	for line := range bytes.Lines(data) {
		if rest, ok := bytes.CutPrefix(line, []byte("Max open files")); ok {
			if f := strings.Fields(string(rest)); len(f) > 0 {
				n, _ := strconv.ParseUint(f[0], 10, 64) // 0 for unlimited
				return n
			}
		}
	}
	return 0
}

// number reads a file with one number.
func number(path string) (uint64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read %s: %w", path, err)
	}
	return n, nil
}

func readConntrack(context.Context, *subject) (u use, err error) {
	if u.used, err = number("/proc/sys/net/netfilter/nf_conntrack_count"); errors.Is(err, fs.ErrNotExist) {
		return u, skip("the kernel tracks no connections yet")
	}
	if err == nil {
		u.limit, err = number("/proc/sys/net/netfilter/nf_conntrack_max")
	}
	return u, err
}
