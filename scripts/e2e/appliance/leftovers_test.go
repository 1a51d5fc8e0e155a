package appliance

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/scripts/e2e/harness"
)

// TestUninstallLeavesNothing: after an installation, a day of use and "kedge uninstall --purge", the files of the machine and
// the objects of its kernel are as they were before.
func TestUninstallLeavesNothing(t *testing.T) {
	s := onSystemdMachine(t)
	s.neverUsed()
	// The kernel has no parameters of modules that are not loaded, and modules stay.
	for _, module := range []string{"nf_conntrack", "nf_tables", "br_netfilter"} {
		s.must("modprobe", module)
	}
	s.must("systemctl", "stop", "--all", "*.timer") // they run when the clock is set
	before := s.everything()
	harness.Eventually(t, time.Minute, func() error { // services of the system still start
		again := s.everything()
		changed := difference(before, again)
		before = again
		if len(changed) > 0 {
			return fmt.Errorf("the machine changes by itself:\n%s", strings.Join(changed, "\n"))
		}
		return nil
	})
	s.importedByKedge()
	s.kedge(0, "install", "server", "--wait=20m")
	s.useForADay()
	if during := difference(before, s.everything()); len(during) < 100 {
		t.Errorf("kedge in use changes only\n%s", strings.Join(during, "\n"))
	}
	if out := s.kedge(0, "uninstall", "--purge"); !strings.HasSuffix(out, "kedge is removed\n") {
		t.Errorf("uninstall: %s", out)
	}
	if left := difference(before, s.everything()); len(left) > 0 {
		t.Errorf("left:\n%s", strings.Join(left, "\n"))
	}
}

// useForADay has pods with volumes, services, host ports and policies, a restart, killall, and renewed certificates.
func (s systemdMachine) useForADay() {
	s.Helper()
	s.pod(harness.ShellWith("web", "echo text >/cache/file; echo text >/host/file; exec probe serve :8080 'from a pod'",
		"volumes: [{name: c, configMap: {name: c}}, {name: s, secret: {secretName: s}}, {name: m, emptyDir: {medium: Memory}}, {name: e, emptyDir: {}}, {name: h, hostPath: {path: /var/lib/kubelet-of-a-test, type: DirectoryOrCreate}}],",
		"ports: [{containerPort: 8080, hostPort: 8093}, {containerPort: 8081, hostPort: 8093, protocol: UDP}], volumeMounts: [{name: c, mountPath: /c}, {name: s, mountPath: /s}, {name: m, mountPath: /m}, {name: e, mountPath: /cache, subPath: a/b}, {name: h, mountPath: /host}],"))
	s.pod(harness.Shell("client", "exec sleep 1000000", ""))
	s.apply(`
{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {key: value}}
---
{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {key: secret}}
---
{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {type: LoadBalancer, sessionAffinity: ClientIP, selector: {app: web}, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 8081, protocol: UDP}]}}
---
{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: p}, spec: {podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [{podSelector: {}}, {ipBlock: {cidr: 0.0.0.0/0}}]}], egress: [{}]}}
`)
	s.podsAnswer()
	pods := s.containers()
	s.systemctl("restart")
	s.kedge(0, "install", "server", "--wait=20m")
	s.podsAnswer()
	if now := s.containers(); now != pods {
		s.Errorf("a restart changes the pods: they were\n%s\nand are\n%s", pods, now)
	}
	s.systemctl("stop")
	s.kedge(0, "killall")
	// After most of a year, certificates are renewed at the start.
	certificates := s.certificates()
	s.must("date", "--set=+340 days")
	s.kedge(0, "install", "server", "--wait=20m")
	if now := s.certificates(); now == certificates {
		s.Error("no certificate was renewed")
	}
	s.podsAnswer()
	s.kedge(0, "kubectl", "delete", "pod", "client", "--now")
	if err := os.RemoveAll("/var/lib/kubelet-of-a-test"); err != nil { // of the user
		s.Error(err)
	}
}

// certificates has the hashes of the certificates of the server.
func (s systemdMachine) certificates() string {
	s.Helper()
	files, err := filepath.Glob("/var/lib/kedge/server/tls/*.crt")
	if err != nil || len(files) == 0 {
		s.Fatalf("no certificates: %v", err)
	}
	var all strings.Builder
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			s.Fatal(err)
		}
		fmt.Fprintf(&all, "%s %x\n", f, sha256.Sum256(data))
	}
	return all.String()
}

// everything is what programs can leave on a machine, by its kind and name.
func (s systemdMachine) everything() map[string]string {
	s.Helper()
	// What was written is to be counted as the file system has it.
	unix.Sync()
	all := map[string]string{}
	s.addFiles(all)
	s.addKernel(all)
	s.addNetwork(all)
	return all
}

// difference describes what two states do not have in common.
func difference(before, after map[string]string) (found []string) {
	for _, name := range slices.Sorted(maps.Keys(after)) {
		if was, ok := before[name]; !ok {
			found = append(found, name+" is new: "+after[name])
		} else if was != after[name] {
			found = append(found, name+" was "+was+" and is "+after[name])
		}
	}
	for _, name := range slices.Sorted(maps.Keys(before)) {
		if _, ok := after[name]; !ok {
			found = append(found, name+" is gone: "+before[name])
		}
	}
	return found
}

// ofTheSystem are folders in which the system itself, or this test, always changes something; kubectl has its cache in one.
var ofTheSystem = []string{"/proc", "/sys", "/dev/pts", "/run/systemd", "/run/udev", "/run/log", "/run/user", "/run/utmp", "/run/agetty.reload", "/var/log/wtmp", "/var/log/journal", "/var/lib/systemd", "/var/lib/dbus", "/var/backups", "/root/.kube", "/tmp", "/var/tmp", "/kedge"}

// addFiles adds the files.
func (s systemdMachine) addFiles(all map[string]string) {
	s.Helper()
	err := filepath.WalkDir("/", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(ofTheSystem, path) {
			if d.IsDir() {
				return filepath.SkipDir
			}
			return nil
		}
		st, err := d.Info()
		if err != nil {
			return err
		}
		what := st.Mode().String()
		switch {
		case st.Mode().IsRegular() && !strings.HasPrefix(path, "/dev/"):
			what += fmt.Sprint(" ", st.Size(), " bytes of ", st.ModTime().UTC().Format(time.RFC3339Nano))
		case st.Mode().Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if err != nil {
				return err
			}
			what += " to " + to
		}
		all["file "+path] = what
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
}

// addKernel adds mounts, cgroups, processes with their namespaces, and parameters.
func (s systemdMachine) addKernel(all map[string]string) {
	s.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		s.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line) // ID, parent, device, root, mount point, options, ...
		all["mount "+f[4]] += f[3] + " " + strings.Join(f[5:], " ") + "; "
	}
	err = filepath.WalkDir(harness.Cgroups, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return err
		}
		if path != harness.Cgroups && !strings.Contains(path, "kedge") && filepath.Dir(path) != harness.Cgroups {
			return filepath.SkipDir // services of the system start and stop
		}
		all["cgroup "+path] = harness.FileContent(path, "cgroup.controllers")
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
	for _, p := range harness.ProcessesWith("") {
		if text := p.String(); strings.Contains(text, "kedge") && !strings.Contains(text, "/kedge/run") {
			all["process "+text] = "is there"
		}
	}
	err = filepath.WalkDir("/proc/sys", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, "/proc/sys/")
		for _, pattern := range countedByTheKernel {
			if ok, _ := filepath.Match(pattern, name); ok {
				return nil
			}
		}
		if st, err := d.Info(); err != nil || st.Mode().Perm()&0o222 == 0 {
			return err
		}
		all["parameter "+name] = harness.FileContent(path)
		return nil
	})
	if err != nil {
		s.Fatal(err)
	}
}

// countedByTheKernel are parameters that change by themselves.
var countedByTheKernel = []string{"kernel/ns_last_pid", "kernel/random/*", "kernel/sched_domain/*/*/max_newidle_lb_cost", "net/ipv4/tcp_*_available*", "fs/binfmt_misc/*"}

// addNetwork adds interfaces, addresses, routes, rules of routing and nftables, ipsets and named network namespaces.
func (s systemdMachine) addNetwork(all map[string]string) {
	s.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		s.Fatal(err)
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		addresses, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			s.Fatal(err)
		}
		var nets []*net.IPNet
		for _, address := range addresses {
			nets = append(nets, address.IPNet)
		}
		all["interface "+a.Name] = fmt.Sprint(l.Type(), a.Flags, a.MTU, a.OperState, nets)
	}
	routes, err := netlink.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	if err != nil {
		s.Fatal(err)
	}
	for _, r := range routes {
		all[fmt.Sprintf("route %v by %s, table %d, type %d, protocol %d", r.Dst, names[r.LinkIndex], r.Table, r.Type, r.Protocol)] = fmt.Sprint(r.Src, r.Gw, r.Priority)
	}
	rules, err := netlink.RuleList(netlink.FAMILY_ALL)
	if err != nil {
		s.Fatal(err)
	}
	for _, r := range rules {
		all["routing rule "+r.String()] = fmt.Sprint("family ", r.Family)
	}
	all["nftables"] = s.must("nft", "--stateless", "list", "ruleset")
	sets, err := netlink.IpsetListAll()
	if err != nil && err != unix.EINVAL && err != unix.ENOENT { // the kernel has no ipsets
		s.Logf("ipsets cannot be listed: %v", err)
	}
	for _, set := range sets {
		all["ipset "+set.SetName] = set.TypeName
	}
}
