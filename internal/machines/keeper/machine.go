package keeper

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// keepMachine has two lives. The first joins the machine's control group and makes
// that the root of a control group namespace, which a process with several threads
// can do for one of them only; so it then becomes the second, which does the rest.
func keepMachine(args []string) error {
	ready := os.NewFile(readyFile, "ready")
	if len(args) == 1 {
		err := firstLife()
		fmt.Fprint(ready, err)
		return err
	}
	var m Machine
	if err := json.Unmarshal([]byte(args[1]), &m); err != nil {
		return err
	}
	orders := os.NewFile(specFile, "orders")
	unix.CloseOnExec(specFile)
	unix.CloseOnExec(readyFile)
	k, err := setUp(m)
	if err == nil {
		_, err = io.WriteString(ready, "ready")
	}
	if err != nil {
		fmt.Fprint(ready, err)
		return err
	}
	ready.Close()
	// Until now the tool may have died without anybody noticing.
	if _, err := io.ReadFull(orders, make([]byte, 1)); err != nil {
		return nil
	}
	if m.Tethered {
		go func() {
			_, _ = io.Copy(io.Discard, orders)
			k.socket.Close() // which ends run
		}()
	} else {
		orders.Close()
	}
	return k.run()
}

func firstLife() error {
	runtime.LockOSThread() // what follows is of this thread, and so is what it becomes
	spec, err := readSpec()
	if err != nil {
		return err
	}
	var m Machine
	if err := json.Unmarshal(spec, &m); err != nil {
		return err
	}
	if err := join(m.Cgroups); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		return fmt.Errorf("make a control group namespace: %w", err)
	}
	for _, fd := range []uintptr{specFile, readyFile} {
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil {
			return err
		}
	}
	return unix.Exec("/proc/self/exe", []string{MachineName, string(spec)}, os.Environ())
}

// readSpec reads the first line of what the tool says, and no byte more: the rest is
// for the second life.
func readSpec() ([]byte, error) {
	var line []byte
	one := make([]byte, 1)
	for {
		n, err := unix.Read(specFile, one)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if n == 0 {
			return nil, io.ErrUnexpectedEOF
		}
		if one[0] == '\n' {
			return line, nil
		}
		line = append(line, one[0])
	}
}

// join moves this process into control groups.
func join(dirs []string) error {
	for _, dir := range dirs {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter control group %s: %w", dir, err)
		}
	}
	return nil
}

// hostFolders are the machine's programs, which a machine has too, unchangeable.
// kedge needs none of them; people do.
var hostFolders = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "nix",
	"etc/alternatives", "etc/ca-certificates", "etc/pki", "etc/ssl", "etc/terminfo"}

// setUp makes the inside of the machine. Mounts are of this process's own namespace.
func setUp(m Machine) (*keeper, error) {
	if err := unix.Sethostname([]byte(m.Hostname)); err != nil {
		return nil, fmt.Errorf("set the host name: %w", err)
	}
	groups, err := cgroupMounts()
	if err != nil {
		return nil, err
	}
	if err := mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, err
	}
	if err := mount(m.Root, m.Root, "", unix.MS_BIND, ""); err != nil {
		return nil, err
	}
	at := func(parts ...string) string { return filepath.Join(append([]string{m.Root}, parts...)...) }
	for _, name := range hostFolders {
		if err := takeFolder(name, at(name)); err != nil {
			return nil, err
		}
	}
	for inside, host := range map[string]string{ProgramPath: m.Program, KeeperPath: m.Keeper} {
		if err := bindFile(host, at(inside)); err != nil {
			return nil, err
		}
	}
	if err := os.RemoveAll(at("tmp")); err != nil { // what a reboot empties
		return nil, err
	}
	for dir, mode := range map[string]os.FileMode{"tmp": 0o1777, "proc": 0o555, "sys": 0o555, "dev": 0o755, "run": 0o755} {
		if err := os.MkdirAll(at(dir), 0o755); err != nil {
			return nil, err
		}
		if err := unix.Chmod(at(dir), uint32(mode)); err != nil {
			return nil, err
		}
	}
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, mt := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"/dev", "dev", "", unix.MS_BIND, ""},
		{"devpts", "dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"},
		{"tmpfs", "dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"proc", "proc", "proc", plain, ""},
		{"sysfs", "sys", "sysfs", plain, ""}, // it shows the links of our network
		{"tmpfs", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := mount(mt.source, at(mt.target), mt.kind, mt.flags, mt.data); err != nil {
			return nil, err
		}
	}
	// Where the kernel has them.
	for _, mt := range [][2]string{{"mqueue", "dev/mqueue"}, {"securityfs", "sys/kernel/security"}, {"bpf", "sys/fs/bpf"}} {
		if _, err := os.Stat(at(mt[1])); err == nil {
			if err := mount(mt[0], at(mt[1]), mt[0], plain, ""); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EBUSY) {
				return nil, err
			}
		}
	}
	if err := mountCgroups(groups, at("sys/fs/cgroup")); err != nil {
		return nil, err
	}
	if err := newBootID(at("run/boot-id"), at("proc/sys/kernel/random/boot_id")); err != nil {
		return nil, err
	}
	if err := unix.Chdir(m.Root); err != nil {
		return nil, err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return nil, fmt.Errorf("make %s the root: %w", m.Root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return nil, fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return nil, err
	}
	// Volumes that containers share with the machine need it, as systemd does it.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return nil, err
	}
	if err := intoLeaf(groups); err != nil {
		return nil, err
	}
	return listen()
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source+kind, target, err)
	}
	return nil
}

// takeFolder shows a folder of the host at target, read-only, or repeats the link
// that the host has there. One that the host has not the machine has not either.
func takeFolder(name, target string) error {
	host := "/" + name
	st, err := os.Lstat(host)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSymlink != 0 {
		to, err := os.Readlink(host)
		if err != nil {
			return err
		}
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := os.Symlink(to, target); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		return nil
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	return bind(host, target, unix.MS_REC)
}

func bindFile(host, target string) error {
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(target, os.O_CREATE|os.O_RDONLY, 0o755)
	if err != nil {
		return err
	}
	f.Close()
	return bind(host, target, 0)
}

// bind shows a file or folder of the host read-only.
func bind(host, target string, flags uintptr) error {
	if err := mount(host, target, "", unix.MS_BIND|flags, ""); err != nil {
		return err
	}
	how := uint(0)
	if flags&unix.MS_REC != 0 {
		how = unix.AT_RECURSIVE
	}
	if err := unix.MountSetattr(unix.AT_FDCWD, target, how, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}); err != nil {
		return fmt.Errorf("make %s read-only: %w", target, err)
	}
	return nil
}

// newBootID gives the machine a boot of its own: programs compare its number to know
// that there was a reboot.
func newBootID(file, target string) error {
	id, err := os.ReadFile("/proc/sys/kernel/random/uuid")
	if err != nil {
		return err
	}
	if err := os.WriteFile(file, id, 0o444); err != nil {
		return err
	}
	return bind(file, target, 0)
}

// cgroupMount is one hierarchy as the host has it mounted, relative to
// /sys/fs/cgroup; the empty name is the unified hierarchy in its place.
type cgroupMount struct{ name, kind, options string }

const cgroupRoot = "/sys/fs/cgroup"

func cgroupMounts() ([]cgroupMount, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	known, err := os.ReadFile("/proc/cgroups")
	if err != nil {
		return nil, err
	}
	controllers := map[string]bool{}
	for line := range strings.Lines(string(known)) {
		controllers[strings.Fields(line)[0]] = true
	}
	var out []cgroupMount
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		left, right, _ := strings.Cut(lines.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if len(l) < 5 || len(r) < 3 || r[0] != "cgroup" && r[0] != "cgroup2" {
			continue
		}
		name, below := strings.CutPrefix(l[4], cgroupRoot)
		if !below {
			continue
		}
		// Of the options only those that name the hierarchy: the others are no
		// machine's to set.
		var options []string
		for o := range strings.SplitSeq(r[2], ",") {
			if r[0] == "cgroup" && (controllers[o] || strings.HasPrefix(o, "name=")) {
				options = append(options, o)
			}
		}
		out = append(out, cgroupMount{strings.TrimPrefix(name, "/"), r[0], strings.Join(options, ",")})
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("no control groups are mounted at %s", cgroupRoot)
	}
	return out, lines.Err()
}

// mountCgroups mounts the same hierarchies at target. Their roots are the machine's
// control group, because of the namespace.
func mountCgroups(groups []cgroupMount, target string) error {
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if groups[0].name == "" {
		return mount("cgroup2", target, "cgroup2", plain, "")
	}
	if err := mount("tmpfs", target, "tmpfs", plain, "mode=755"); err != nil {
		return err
	}
	for _, g := range groups {
		dir := filepath.Join(target, g.name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := mount(g.kind, dir, g.kind, plain, g.options); err != nil {
			return err
		}
	}
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return err
	}
	for _, e := range entries { // such as cpu, of cpu,cpuacct
		if e.Type()&os.ModeSymlink == 0 {
			continue
		}
		to, err := os.Readlink(filepath.Join(cgroupRoot, e.Name()))
		if err != nil {
			return err
		}
		if err := os.Symlink(to, filepath.Join(target, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// intoLeaf moves this process out of the machine's root control group, where the
// unified hierarchy allows none once controllers are handed down.
func intoLeaf(groups []cgroupMount) error {
	for _, g := range groups {
		root := filepath.Join(cgroupRoot, g.name)
		leaf := filepath.Join(root, Leaf)
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make control group %s: %w", leaf, err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // v1: empty ones take no process
			have, err := os.ReadFile(filepath.Join(root, file))
			if err != nil || g.kind != "cgroup" {
				continue
			}
			if err := os.WriteFile(filepath.Join(leaf, file), have, 0o644); err != nil {
				return fmt.Errorf("set %s of control group %s: %w", file, leaf, err)
			}
		}
		if err := join([]string{leaf}); err != nil {
			return err
		}
	}
	return nil
}

// enter joins the machine's leaf and becomes the command: what is started in a
// machine by [machines.Machine.Start] does so here.
func enter(command []string) error {
	groups, err := cgroupMounts()
	if err != nil {
		return err
	}
	for _, g := range groups {
		if err := join([]string{filepath.Join(cgroupRoot, g.name, Leaf)}); err != nil {
			return err
		}
	}
	path, err := lookPath(command[0])
	if err != nil {
		return err
	}
	return fmt.Errorf("run %s: %w", command[0], unix.Exec(path, command, os.Environ()))
}

func lookPath(name string) (string, error) {
	if strings.Contains(name, "/") {
		return name, nil
	}
	for _, dir := range filepath.SplitList(os.Getenv("PATH")) {
		path := filepath.Join(dir, name)
		if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	return "", fmt.Errorf("there is no program %q on this machine", name)
}
