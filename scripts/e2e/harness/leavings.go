package harness

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
	"kedge/internal/mounts"
	"kedge/throwaway/machine"
)

// Cgroups is where the kernel shows control groups.
const Cgroups = "/sys/fs/cgroup"

// Leftovers says what a node that was killed has left on the machine.
func (n *Node) Leftovers() error {
	var found []string
	if data, err := os.ReadFile("/proc/self/mountinfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			if strings.Contains(line, n.Dir+"/") {
				found = append(found, "mount "+strings.TrimSpace(line))
			}
		}
	}
	for _, name := range n.CgroupNames() {
		for _, pattern := range []string{name, "*/" + name} {
			groups, _ := filepath.Glob(filepath.Join(Cgroups, pattern))
			for _, g := range groups {
				found = append(found, "cgroup "+g)
			}
		}
	}
	for _, p := range ProcessesWith(n.Dir + "/") {
		found = append(found, "process "+p.String())
	}
	return leftBehind(found)
}

func leftBehind(found []string) error {
	if len(found) == 0 {
		return nil
	}
	return fmt.Errorf("left behind:\n%s", strings.Join(found, "\n"))
}

// CgroupNames are what the node's own control group may be called: by the kernel's
// path, or as a slice where systemd owns the tree.
func (n *Node) CgroupNames() []string {
	root := "kedge-" + n.Name
	return []string{root, cgroup.Slice(root)}
}

// networkLeftovers says what a node has left in its network that was not there before.
// A machine of its own takes its network with it.
func (n *Node) networkLeftovers() error {
	if n.Machine != nil || n.networkBefore == nil {
		return nil
	}
	now, err := n.networkTraces()
	return errors.Join(err, leftBehind(slices.DeleteFunc(now, func(trace string) bool { return slices.Contains(n.networkBefore, trace) })))
}

// networkTraces are the tables and interfaces that carry the node's name, and routes and
// rules of addresses in its ranges, which another run's nodes may have too.
func (n *Node) networkTraces() ([]string, error) {
	found := []string{}
	err := n.Inside(func() error {
		conn, err := nftables.New()
		if err != nil {
			return err
		}
		tables, err := conn.ListTables()
		if err != nil {
			return err
		}
		for _, t := range tables {
			if rest, ok := strings.CutPrefix(t.Name, "kedge-"+n.Name); ok && (rest == "" || rest[0] == '/') {
				found = append(found, "nftables table "+t.Name)
			}
		}
		links, err := netlink.LinkList()
		if err != nil {
			return err
		}
		for _, l := range links {
			if strings.Contains(l.Attrs().Alias, n.Name) {
				found = append(found, "interface "+l.Attrs().Name+" ("+l.Attrs().Alias+")")
			}
		}
		ranges, err := n.ranges()
		if err != nil {
			return err
		}
		ours := func(p *net.IPNet) bool {
			for _, r := range ranges {
				if p != nil && r.Contains(p.IP) {
					return true
				}
			}
			return false
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err != nil {
			return err
		}
		for _, r := range routes {
			if ours(r.Dst) {
				found = append(found, "route "+r.String())
			}
		}
		rules, err := netlink.RuleList(netlink.FAMILY_ALL)
		if err != nil {
			return err
		}
		for _, r := range rules {
			if ours(r.Src) || ours(r.Dst) {
				found = append(found, "routing rule "+r.String())
			}
		}
		return nil
	})
	return found, err
}

// ranges are those of the node's pods and services; none where they are the usual ones,
// and this run's port says that there may be another run, which has them too.
func (n *Node) ranges() ([]*net.IPNet, error) {
	var pods, services string
	if os.Getenv(portVar) == "" {
		pods, services = "10.42.0.0/16", "10.43.0.0/16"
	}
	for _, f := range n.Flags {
		if v, ok := strings.CutPrefix(f, "--cluster-cidr="); ok {
			pods = v
		} else if v, ok := strings.CutPrefix(f, "--service-cidr="); ok {
			services = v
		}
	}
	var out []*net.IPNet
	for _, r := range strings.FieldsFunc(pods+","+services, func(r rune) bool { return r == ',' }) {
		_, p, err := net.ParseCIDR(r)
		if err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

// Process is a process of this machine.
type Process struct {
	pid  int
	args []string
}

// String is for people.
func (p Process) String() string { return fmt.Sprint(p.pid, " ", strings.Join(p.args, " ")) }

// ProcessesWith are those in whose command line, its words separated by spaces, text is.
func ProcessesWith(text string) []Process {
	var out []Process
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, c := range commands {
		data, err := os.ReadFile(c)
		if err != nil {
			continue // it has ended
		}
		p := Process{args: strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00")}
		if p.pid, err = strconv.Atoi(filepath.Base(filepath.Dir(c))); err == nil && p.pid != os.Getpid() && strings.Contains(strings.Join(p.args, " "), text) {
			out = append(out, p)
		}
	}
	return out
}

// Processes are the numbers of those whose command line has text in it.
func Processes(text string) []int {
	var out []int
	for _, p := range ProcessesWith(text) {
		out = append(out, p.pid)
	}
	return out
}

// A run of the tests that is ended by a signal, by go test's time limit or by a panic
// does not come to its clean-ups. What it leaves is all named in its folder, which it
// has locked for as long as it lives: a signal's handler clears the folder, and else
// the next run.
const (
	lockFile    = "lock"    // of a run's folder
	killallFile = "killall" // of a node's folder: the arguments that killall needs
	keepFile    = "keep"    // of a run's folder that is to stay
)

// takeBaseDir makes the folder of this run, and locks it until the process ends.
func takeBaseDir() (string, error) {
	// Short, because unix sockets are below it.
	dir, err := os.MkdirTemp("/tmp", "ke2e")
	if err != nil {
		return "", err
	}
	_, err = lock(filepath.Join(dir, lockFile), unix.O_CREAT)
	return dir, err
}

// lock says whether it could lock the file; that lasts as long as the process.
func lock(path string, flags int) (bool, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|flags, 0o600)
	if err != nil {
		return false, fmt.Errorf("open %s: %w", path, err)
	}
	if err := unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return false, unix.Close(fd)
	}
	return true, nil
}

// clearUpOnSignal makes an interrupted run clear up before it ends.
func clearUpOnSignal(dir string) {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		fmt.Println("FAIL:", <-signals, "- clearing up")
		if err := clearUp(dir); err != nil {
			fmt.Println("FAIL:", err)
		}
		os.Exit(130)
	}()
}

// sweep clears the folders of runs that have ended without doing so.
func sweep() error {
	locks, err := filepath.Glob(filepath.Join("/tmp/ke2e*", lockFile))
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range locks {
		dir := filepath.Dir(l)
		if _, err := os.Stat(filepath.Join(dir, keepFile)); err == nil {
			continue
		}
		ended, err := lock(l, 0)
		if ended {
			fmt.Println("clearing up after a run that did not:", dir)
			err = clearUp(dir)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// clearUp ends what a run has started and removes what it has made, by its folder.
func clearUp(dir string) error {
	var errs []error
	for _, p := range ProcessesWith(dir + "/") {
		// Not the shims: killall ends containers by way of them.
		if len(p.args) > 1 && (p.args[1] == "server" || p.args[1] == "agent") {
			errs = append(errs, end(p.pid))
		}
	}
	clusters, _ := filepath.Glob(filepath.Join(dir, "up*", "clusters"))
	for _, c := range clusters {
		cmd := exec.Command(Binary(), "down", "--all")
		cmd.Env = append(os.Environ(), "KEDGE_CLUSTERS="+c, "KUBECONFIG="+filepath.Join(filepath.Dir(c), "kubeconfig"))
		if out, err := cmd.CombinedOutput(); err != nil {
			errs = append(errs, fmt.Errorf("kedge down --all: %w: %s", err, out))
		}
	}
	sites, _ := filepath.Glob(filepath.Join(dir, "fleet*", "site"))
	for _, s := range sites {
		errs = append(errs, machine.Remove(s))
	}
	nodes, _ := filepath.Glob(filepath.Join(dir, "*", killallFile))
	for _, file := range nodes {
		errs = append(errs, killallOf(file))
	}
	for _, p := range ProcessesWith(dir + "/") {
		errs = append(errs, end(p.pid))
	}
	errs = append(errs, mounts.DetachBelow(dir), removeRun(dir))
	return errors.Join(errs...)
}

// removeRun removes a run's folder, its lock last: without it nobody would clear up what
// could not be removed.
func removeRun(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if e.Name() != lockFile {
			errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}

// end kills a process and waits until it has ended.
func end(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil // it has ended
	}
	defer unix.Close(fd)
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("process %d does not end", pid)
		default:
			return nil
		}
	}
}

// Remember notes what clearUp needs to know of a node on this machine.
func (n *Node) Remember() error {
	if n.Machine != nil {
		return nil
	}
	data, err := json.Marshal(n.Args())
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.Dir, killallFile), data, 0o600)
}

func killallOf(file string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var args []string
	if err := json.Unmarshal(data, &args); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if out, err := exec.Command(Binary(), append([]string{"killall"}, args...)...).CombinedOutput(); err != nil {
		return fmt.Errorf("kedge killall: %w: %s", err, out)
	}
	return nil
}
