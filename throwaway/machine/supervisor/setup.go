package supervisor

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

// superviseMachine runs twice, as one process. The first time it joins the machine's control
// group and makes it the root of a control group namespace, which changes only the calling
// thread; then it executes itself again, and the second time does everything else.
func superviseMachine(args []string) error {
	ready := os.NewFile(readyFile, "ready")
	if len(args) == 1 {
		err := enterCgroup()
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
	s, err := setUp(m)
	if err == nil {
		_, err = io.WriteString(ready, "ready")
	}
	if err != nil {
		fmt.Fprint(ready, err)
		return err
	}
	ready.Close()
	// The tool may have died unnoticed until now.
	if _, err := io.ReadFull(orders, make([]byte, 1)); err != nil {
		return nil
	}
	if m.Tethered {
		go func() {
			_, _ = io.Copy(io.Discard, orders)
			s.socket.Close() // which ends run
		}()
	} else {
		orders.Close()
	}
	return s.run()
}

func enterCgroup() error {
	runtime.LockOSThread() // the namespace is the thread's, and exec keeps the calling thread's
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

// readSpec reads the first line from the tool, and no byte more: the next byte is read after
// the setup.
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

// hostFolders are the folders of the host's programs, which machines see read-only. People
// need them on a machine; kedge does not.
var hostFolders = []string{"bin", "sbin", "lib", "lib32", "lib64", "libx32", "usr", "nix",
	"etc/alternatives", "etc/ca-certificates", "etc/pki", "etc/ssl", "etc/terminfo"}

// setUp makes the inside of the machine. Its mounts are in this process's own namespace.
func setUp(m Machine) (*supervisor, error) {
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
		if err := bindHostFolder(name, at(name)); err != nil {
			return nil, err
		}
	}
	for inside, host := range map[string]string{ProgramPath: m.Program, SupervisorPath: m.Supervisor} {
		if err := bindFile(host, at(inside)); err != nil {
			return nil, err
		}
	}
	if err := os.RemoveAll(at("tmp")); err != nil { // a reboot empties it
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
	if err := mountKernels(at); err != nil {
		return nil, err
	}
	if err := mountCgroups(groups, at("sys/fs/cgroup")); err != nil {
		return nil, err
	}
	if err := newBootID(at("run/boot-id"), at("proc/sys/kernel/random/boot_id")); err != nil {
		return nil, err
	}
	if err := enterRoot(m.Root); err != nil {
		return nil, err
	}
	// Mount propagation of volumes needs a shared root, as systemd makes it.
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return nil, err
	}
	if err := intoLeaf(groups); err != nil {
		return nil, err
	}
	return listen()
}

// mountKernels mounts the file systems that the kernel makes the content of, and devices. at is the place of a path of the
// machine before the machine's root is entered.
func mountKernels(at func(parts ...string) string) error {
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
		{"sysfs", "sys", "sysfs", plain, ""}, // it shows the links of the machine's network namespace
		{"tmpfs", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := mount(mt.source, at(mt.target), mt.kind, mt.flags, mt.data); err != nil {
			return err
		}
	}
	// File systems that not every kernel has.
	for _, mt := range [][2]string{{"mqueue", "dev/mqueue"}, {"securityfs", "sys/kernel/security"}, {"bpf", "sys/fs/bpf"}} {
		if _, err := os.Stat(at(mt[1])); err == nil {
			if err := mount(mt[0], at(mt[1]), mt[0], plain, ""); err != nil && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EBUSY) {
				return err
			}
		}
	}
	return nil
}

// enterRoot makes a mounted folder the root of this process, and detaches the old root.
func enterRoot(root string) error {
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("make %s the root: %w", root, err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	return unix.Chdir("/")
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", source+kind, target, err)
	}
	return nil
}

// bindHostFolder makes a folder of the host visible at target, read-only. If it is a symbolic
// link on the host, the machine gets the same link; if it does not exist, the machine gets none.
func bindHostFolder(name, target string) error {
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

// newBootID gives the machine a boot ID of its own, by which programs notice a reboot.
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

// cgroupMount is a hierarchy mounted on the host, with its path relative to /sys/fs/cgroup; the
// empty name is the unified hierarchy mounted there.
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
		// Only the options that name the hierarchy: a machine may not set the others.
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

// intoLeaf moves this process out of the machine's root control group: the unified hierarchy
// allows no processes in a group that delegates controllers.
func intoLeaf(groups []cgroupMount) error {
	for _, g := range groups {
		root := filepath.Join(cgroupRoot, g.name)
		leaf := filepath.Join(root, Leaf)
		if err := os.Mkdir(leaf, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return fmt.Errorf("make control group %s: %w", leaf, err)
		}
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} { // v1: a group without them takes no process
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

// enter joins the machine's leaf and executes the command. Commands that are started by
// [machine.Machine.Start] go through it.
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
