package node

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// refuses is [harness.Node.Refusal] of a node that leaves nothing behind.
func refuses(t *testing.T, n *harness.Node) string {
	t.Helper()
	said := n.Refusal(t)
	if err := n.Leftovers(); err != nil {
		t.Error(err)
	}
	return said
}

// TestMachineLacks: a machine on which pods cannot run is refused with what is missing
// and how to get it, before anything is started.
func TestMachineLacks(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		w    harness.World
		want string
	}{
		{"net-admin", harness.World{Without: []uintptr{unix.CAP_NET_ADMIN}},
			"  privileges: root lacks CAP_NET_ADMIN; start the container or service with all capabilities, in Docker with --privileged\n"},
		{"sys-admin", harness.World{Without: []uintptr{unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE}},
			"  privileges: root lacks CAP_SYS_PTRACE, CAP_SYS_ADMIN; start the container or service with all capabilities, in Docker with --privileged\n"},
		{"sysctl", harness.World{ReadOnly: []string{"/proc/sys"}},
			"  kernel-parameters: kernel parameters cannot be set: open /proc/sys/net/ipv4/ip_forward: read-only file system; in a container start it with --privileged, so that /proc/sys is writable\n"},
		{"cgroups", harness.World{ReadOnly: []string{"/sys/fs/cgroup"}},
			"  cgroups: control groups are mounted read-only; in a container start it with --privileged\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			n := harness.Own(t)
			n.World = &c.w
			if got, want := refuses(t, n), "kedge: this machine cannot run kedge\n"+c.want; got != want {
				t.Errorf("it said\n%s\nwant\n%s", got, want)
			}
			for _, path := range []string{"data/server", "data/containerd", "data/kubelet", "kubeconfig"} {
				if _, err := os.Stat(filepath.Join(n.Dir, path)); err == nil {
					t.Errorf("%s was written", path)
				}
			}
		})
	}
}

// TestInotifyUsedUp: without inotify instances the kubelet would end the process in
// the middle of its start. The limit is each user namespace's own, so that a lower one
// disturbs nobody else; it is tried with the check alone.
func TestInotifyUsedUp(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := errors.Join(os.MkdirAll(n.DataDir(), 0o755), os.WriteFile(filepath.Join(n.Dir, "config.yaml"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("/bin/sh", "-c", `echo 3 >/proc/sys/user/max_inotify_instances && exec "$0" "$@"`, harness.Binary(), "check")
	cmd.Args = append(cmd.Args, n.Args()...)
	root := []syscall.SysProcIDMap{{Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWUSER, UidMappings: root, GidMappings: root}
	out, err := cmd.CombinedOutput()
	if err != nil && strings.Contains(string(out), "max_inotify_instances") {
		harness.SkipLacking(t, "this kernel counts them otherwise: %s", out)
	}
	if want := "error    inotify: fewer than 24 inotify instances are left: other programs use the rest; set the kernel parameter fs.inotify.max_user_instances to 512, or stop some of them\n"; err == nil || !strings.Contains(string(out), want) {
		t.Errorf("check said\n%s\nwant\n%s", out, want)
	}
}

func TestReadOnlyDirectories(t *testing.T) {
	t.Parallel()
	for _, dir := range []string{"data", "run"} {
		t.Run(dir, func(t *testing.T) {
			t.Parallel()
			n := harness.Own(t)
			path := filepath.Join(n.Dir, dir)
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			n.World = &harness.World{ReadOnly: []string{path}}
			got := refuses(t, n)
			if !strings.Contains(got, "read-only file system; make") || !strings.Contains(got, "choose another with --"+dir+"-dir\n") || strings.Count(got, "\n") > 2 {
				t.Errorf("it said\n%s", got)
			}
		})
	}
}

// TestReadOnlyDirectoryOfNode: the same when the program is there already.
func TestReadOnlyDirectoryOfNode(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--disable-agent")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	if err := n.Signal(syscall.SIGTERM, 10*time.Second); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(n.LogFile(), 0); err != nil {
		t.Fatal(err)
	}
	n.World = &harness.World{ReadOnly: []string{n.DataDir()}}
	got := refuses(t, n)
	if want := "kedge: the data directory cannot be written: open " + n.DataDir() + "/kedge.lock: read-only file system; make it writable, or choose another with --data-dir\n"; got != want {
		t.Errorf("it said\n%s\nwant\n%s", got, want)
	}
}

func TestNotRoot(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	dir, err := os.MkdirTemp("/tmp", "ke2e-nobody")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	// A copy, for the way to the original may be closed to others.
	program, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "kedge")
	if err := os.WriteFile(copied, program, 0o755); err != nil {
		t.Fatal(err)
	}
	const nobody = 65534
	if err := errors.Join(os.Chmod(copied, 0o755), os.Chown(dir, nobody, nobody), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	as := func(code int, args ...string) string {
		cmd := exec.Command(copied, args...)
		cmd.Env = []string{"HOME=" + dir}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != code {
			t.Errorf("%v ended with %v, want exit code %d", args, err, code)
		}
		return string(out)
	}
	flags := []string{"--config=" + dir + "/none/config.yaml", "--data-dir=" + dir + "/data", "--run-dir=" + dir + "/run", "--node-name=" + n.Name}
	if err := os.MkdirAll(dir+"/none", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/none/config.yaml", nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for command, does := range map[string]string{"server": "run a server", "agent": "run an agent", "killall": "end containers"} {
		want := "kedge: only root can " + does + "; run the command as root, for example with sudo\n"
		if got := as(78, append([]string{command}, flags...)...); got != want {
			t.Errorf("%s said %q, want %q", command, got, want)
		}
	}
	for command, does := range map[string]string{"ls": "see throwaway clusters", "down": "remove throwaway clusters", "up": "make a throwaway cluster"} {
		if got := as(78, command); !strings.HasPrefix(got, "kedge: only root can "+does) {
			t.Errorf("%s said %q", command, got)
		}
	}
	// A node's directories are root's.
	if err := errors.Join(os.Mkdir(dir+"/closed", 0o700), os.Mkdir(dir+"/closed/agent", 0o700)); err != nil {
		t.Fatal(err)
	}
	if got := as(1, "check", flags[0], "--data-dir="+dir+"/closed", flags[2], flags[3]); !strings.HasPrefix(got, "error    privileges: kedge does not run as root") {
		t.Errorf("check of a node's directory said\n%s", got)
	}
	if got := as(1, append([]string{"check"}, flags...)...); !strings.HasPrefix(got, "error    privileges: kedge does not run as root; run it as root, for instance with sudo\n") {
		t.Errorf("check said\n%s", got)
	}
	for _, made := range []string{"data", "run"} {
		if _, err := os.Stat(filepath.Join(dir, made)); err == nil {
			t.Errorf("the %s directory was made", made)
		}
	}
}

// TestNoAddress: without any address there can be no node, and that is said.
func TestNoAddress(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	n.Network = harness.NewNetwork(t, "")
	const want = "kedge: this machine has no network address besides loopback; connect it, or give it an address and name it with --node-ip\n"
	if got := refuses(t, n); got != want {
		t.Errorf("it said %q, want %q", got, want)
	}
}

// TestNoDefaultRoute: a machine that is on no network but its own runs pods.
func TestNoDefaultRoute(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	n.Network = harness.NewNetwork(t, "198.51.100.10/24")
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("web", "exec probe serve :8080 alone", ""))
	pod := n.WaitPod(t, ns, "web", false)
	if pod.Status.HostIP != "198.51.100.10" {
		t.Errorf("the node's address is %s", pod.Status.HostIP)
	}
	if got := n.RunPod(t, ns, "client", "probe get http://"+pod.Status.PodIP+":8080/", ""); got != "alone\n" {
		t.Errorf("the other pod answers %q", got)
	}
	if got := n.Kubectl(t, "exec", "-n", ns, "web", "--", "echo", "through the API"); got != "through the API\n" {
		t.Errorf("exec gives %q", got)
	}
	log, err := os.ReadFile(n.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "there is no default route") {
		t.Error("the log does not say that there is no default route")
	}
	node, err := n.Client.CoreV1().Nodes().Get(context.Background(), n.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status != corev1.ConditionTrue {
			t.Errorf("the node is not ready: %s", c.Message)
		}
	}
}

// loopProbe is the name by which the cluster's resolver finds out whether the
// machine's leads back to it: two labels of at most ten digits. Nothing waits for its answer.
var loopProbe = regexp.MustCompile(`(?s)^.\d{1,10}.\d{1,10}\x00`)

// TestStartAsksNoResolver starts a node beside a resolver that never answers, as on
// a device whose network is down: nothing may be looked up, and nothing wait for it.
func TestStartAsksNoResolver(t *testing.T) {
	t.Parallel()
	config, err := os.ReadFile("/etc/resolv.conf")
	if err != nil {
		harness.SkipLacking(t, "this machine has no resolver to stand in for: %v", err)
	}
	n := harness.Own(t)
	n.Network = harness.NewNetwork(t, "198.51.100.11/24")
	var resolvers int
	var mu sync.Mutex
	var asked []string
	for line := range strings.Lines(string(config)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" {
			continue
		}
		err := n.Network.Do(func() error {
			lo, err := netlink.LinkByName("lo")
			if err != nil {
				return err
			}
			addr := &netlink.Addr{IPNet: netlink.NewIPNet(net.ParseIP(f[1]))}
			if err := netlink.AddrAdd(lo, addr); err != nil && !errors.Is(err, syscall.EEXIST) {
				return err
			}
			silent, err := net.ListenPacket("udp", net.JoinHostPort(f[1], "53"))
			if err != nil {
				return err
			}
			t.Cleanup(func() { silent.Close() })
			go func() {
				buf := make([]byte, 1500)
				for {
					k, _, err := silent.ReadFrom(buf)
					if err != nil {
						return
					}
					name := buf[min(12, k):k]
					if loopProbe.Match(name) {
						continue
					}
					mu.Lock()
					asked = append(asked, fmt.Sprintf("%q", name))
					mu.Unlock()
				}
			}()
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		resolvers++
	}
	if resolvers == 0 {
		harness.SkipLacking(t, "/etc/resolv.conf of this machine names no resolver")
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if len(asked) > 0 {
		t.Errorf("while it started, kedge asked the machine's resolver: %s", strings.Join(asked, ", "))
	}
}

// TestShellsEnvironmentStaysOutside: what the shell hands down that starts kedge reaches
// neither images' files nor containers.
func TestShellsEnvironmentStaysOutside(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	n.World = &harness.World{Umask: 0o077, Nohup: true}
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	got := n.RunPod(t, ns, "user", "ls / > /dev/null && echo readable && grep SigIgn /proc/1/status", "securityContext: {runAsUser: 1000},")
	var ignored uint64
	if n, err := fmt.Sscanf(got, "readable\nSigIgn:\t%x", &ignored); n != 1 || ignored&(1<<(unix.SIGHUP-1)) != 0 {
		t.Errorf("a pod that is not root says, %v\n%s", err, got)
	}
}
