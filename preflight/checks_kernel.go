package preflight

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// capability is a capability that kedge or its containers need.
type capability struct {
	bit  uint
	name string
}

var (
	neededCapabilities = []capability{
		{unix.CAP_CHOWN, "CAP_CHOWN"}, {unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
		{unix.CAP_FOWNER, "CAP_FOWNER"}, {unix.CAP_FSETID, "CAP_FSETID"}, {unix.CAP_KILL, "CAP_KILL"},
		{unix.CAP_SETGID, "CAP_SETGID"}, {unix.CAP_SETUID, "CAP_SETUID"}, {unix.CAP_SETPCAP, "CAP_SETPCAP"},
		{unix.CAP_NET_BIND_SERVICE, "CAP_NET_BIND_SERVICE"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"},
		{unix.CAP_NET_RAW, "CAP_NET_RAW"}, {unix.CAP_SYS_CHROOT, "CAP_SYS_CHROOT"},
		{unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"},
		{unix.CAP_MKNOD, "CAP_MKNOD"}, {unix.CAP_SETFCAP, "CAP_SETFCAP"},
	}
	resourceCapability = capability{unix.CAP_SYS_RESOURCE, "CAP_SYS_RESOURCE"}
)

func checkPrivileges(_ context.Context, _ Config, p probes) []finding {
	if p.euid() != 0 {
		return fail("kedge does not run as root", "run it as root, for instance with sudo")
	}
	status, err := p.readFile("/proc/self/status")
	if err != nil {
		return fail("the process cannot read its own capabilities: "+err.Error(), "mount /proc")
	}
	have, err := effectiveCapabilities(string(status))
	if err != nil {
		return warn("capabilities are unknown: "+err.Error(), "")
	}
	var missing []string
	for _, c := range neededCapabilities {
		if have>>c.bit&1 == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fail("root lacks "+strings.Join(missing, ", "), "start the container or service with all capabilities, in Docker with --privileged")
	}
	if have>>resourceCapability.bit&1 == 0 {
		return warn("root lacks CAP_SYS_RESOURCE: kedge cannot tell the kernel which containers to spare when memory runs out",
			"add the capability if the machine's operator allows it")
	}
	return fine("root with all required capabilities")
}

func effectiveCapabilities(status string) (uint64, error) {
	for line := range strings.Lines(status) {
		if hex, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(hex), 16, 64)
		}
	}
	return 0, errors.New("no line CapEff")
}

func checkNamespaces(_ context.Context, _ Config, p probes) []finding {
	var missing []string
	for _, ns := range []struct {
		name string
		flag int
	}{
		{"mount", unix.CLONE_NEWNS}, {"uts", unix.CLONE_NEWUTS}, {"ipc", unix.CLONE_NEWIPC},
		{"network", unix.CLONE_NEWNET}, {"pid", unix.CLONE_NEWPID},
	} {
		if err := p.tryNamespace(ns.flag); err != nil {
			missing = append(missing, fmt.Sprintf("%s (%v)", ns.name, err))
		}
	}
	if len(missing) > 0 {
		return fail("cannot create namespaces: "+strings.Join(missing, ", "),
			"use a kernel with all kinds of namespaces (CONFIG_NAMESPACES), and in a container start it with --privileged")
	}
	// User namespaces cannot be tried by a program with several threads.
	limit, err := p.readFile("/proc/sys/user/max_user_namespaces")
	if err != nil || strings.TrimSpace(string(limit)) == "0" {
		return warn("user namespaces are missing or switched off: pods with hostUsers: false will not start",
			"set the kernel parameter user.max_user_namespaces to 15000, or use a kernel with CONFIG_USER_NS")
	}
	return fine("mount, uts, ipc, network, pid and user namespaces")
}

// Control groups that the kubelet and the limits of pods need.
var neededControllers = []string{"cpu", "cpuset", "memory", "pids"}

func checkCgroups(_ context.Context, _ Config, p probes) []finding {
	const root = "/sys/fs/cgroup"
	fs, err := p.statfs(root)
	if err != nil {
		return fail("control groups are not mounted: "+err.Error(), "mount cgroup2 at "+root+", as systemd and most init programs do")
	}
	if fs.flags&unix.ST_RDONLY != 0 {
		return fail("control groups are mounted read-only", "in a container start it with --privileged")
	}
	if fs.kind == unix.CGROUP2_SUPER_MAGIC {
		text, err := p.readFile(root + "/cgroup.controllers")
		if err != nil {
			return fail("control groups cannot be read: "+err.Error(), "mount cgroup2 at "+root)
		}
		if found := missingControllers(p, strings.Fields(string(text)), "v2"); found != nil {
			return found
		}
		return fine("control groups v2 with %s", strings.Join(neededControllers, ", "))
	}
	text, err := p.readFile("/proc/cgroups")
	if err != nil {
		return fail("control groups v1 cannot be read: "+err.Error(), "use a kernel with CONFIG_CGROUPS")
	}
	if found := missingControllers(p, mountedControllers(string(text)), "v1"); found != nil {
		return found
	}
	return warn("control groups are of version 1, which Kubernetes has deprecated",
		"boot with systemd.unified_cgroup_hierarchy=1, set rc_cgroup_mode=unified in /etc/rc.conf of OpenRC, or update the operating system")
}

// mountedControllers reads /proc/cgroups. In version 1 a controller without a hierarchy is not
// mounted, and cannot be used.
func mountedControllers(text string) []string {
	var names []string
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) == 4 && f[1] != "0" && f[3] == "1" {
			names = append(names, f[0])
		}
	}
	return names
}

func missingControllers(p probes, have []string, version string) []finding {
	var missing []string
	for _, c := range neededControllers {
		if !slices.Contains(have, c) {
			missing = append(missing, c)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	message := fmt.Sprintf("control groups %s lack: %s", version, strings.Join(missing, ", "))
	if slices.Contains(missing, "memory") {
		remedy := "add cgroup_enable=memory cgroup_memory=1 to the kernel command line and reboot"
		if model, err := p.readFile("/proc/device-tree/model"); err == nil && strings.HasPrefix(string(model), "Raspberry Pi") {
			remedy = "add cgroup_enable=memory cgroup_memory=1 to the line in /boot/firmware/cmdline.txt (older systems: /boot/cmdline.txt) and reboot"
		}
		return fail(message, remedy)
	}
	if version == "v1" {
		return fail(message, "mount each of them below /sys/fs/cgroup")
	}
	return fail(message, "use a kernel with these controllers; in a container, start it with --cgroupns=private and --privileged")
}

func checkSeccomp(_ context.Context, _ Config, p probes) []finding {
	if err := p.trySeccomp(); err != nil {
		return fail(fmt.Sprintf("seccomp filters are missing (%v): no pod with a seccomp profile starts", err), "use a kernel with CONFIG_SECCOMP_FILTER")
	}
	return fine("seccomp filters")
}

// checkAppArmor looks for apparmor_parser, the only program of the host that kedge uses: the
// kernel accepts only compiled profiles, and no other program compiles them.
func checkAppArmor(_ context.Context, _ Config, p probes) []finding {
	enabled, err := p.readFile("/sys/module/apparmor/parameters/enabled")
	if err != nil || !strings.HasPrefix(string(enabled), "Y") {
		return fine("AppArmor is not in use")
	}
	if p.inPath("apparmor_parser") != nil {
		return warn("AppArmor is on, and its program apparmor_parser is not in PATH: pods run without a profile", "install the package apparmor")
	}
	return fine("AppArmor with apparmor_parser")
}

func checkKernelLog(_ context.Context, _ Config, p probes) []finding {
	if err := p.readable("/dev/kmsg"); err != nil {
		return fail("the kubelet cannot read the kernel's log: "+err.Error(), "in a container start it with --privileged or pass it the device /dev/kmsg")
	}
	return fine("/dev/kmsg is readable")
}

func checkKernelParameters(_ context.Context, c Config, p probes) []finding {
	names := []string{"net/ipv4/ip_forward", "vm/overcommit_memory", "kernel/panic"}
	if c.IPv6 {
		names = append(names, "net/ipv6/conf/all/forwarding")
	}
	for _, name := range names {
		if err := p.writable("/proc/sys/" + name); err != nil {
			if strings.HasPrefix(name, "net/ipv6") {
				return fail("IPv6 is missing or disabled: "+err.Error(), "boot without ipv6.disable=1, or give pods IPv4 ranges only")
			}
			return fail("kernel parameters cannot be set: "+err.Error(), "in a container start it with --privileged, so that /proc/sys is writable")
		}
	}
	return fine("/proc/sys is writable")
}
