package commandline

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/scripts/e2e/harness"
)

func TestKubectlLogs(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("counts", "echo first; sleep 4; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.5; done", ""))
	n.WaitPod(t, ns, "counts", false)
	w, next := harness.LineWriter(t)
	n.StartKubectl(t, nil, w, "logs", "-f", "-n", ns, "counts")
	for _, want := range []string{"first", "line 0", "line 1"} {
		if got, err := next(); err != nil || got != want {
			t.Fatalf("followed %q, want %q: %v", got, want, err)
		}
	}
	if got := n.Kubectl(t, "logs", "-n", ns, "counts", "--since=2s"); strings.Contains(got, "first") || !strings.Contains(got, "line") {
		t.Errorf("since 2s: %q", got)
	}
	if got := n.Kubectl(t, "logs", "-n", ns, "counts", "--limit-bytes=5"); got != "first" {
		t.Errorf("five bytes: %q", got)
	}
	if got := n.Kubectl(t, "logs", "-n", ns, "-l", "app=counts", "--tail=1", "--prefix", "--timestamps"); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "[pod/counts/main] 20") {
		t.Errorf("tail of one: %q", got)
	}
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: twice}, spec: {terminationGracePeriodSeconds: 1, volumes: [{name: v, emptyDir: {}}],
		containers: [{name: main, image: %q, command: [sh, -c, "test -f /v/x && echo second && exec sleep 3600; touch /v/x; echo first"], volumeMounts: [{name: v, mountPath: /v}]}]}}`, harness.Busybox))
	harness.Eventually(t, 40*time.Second, func() error { return n.LogsHave(ns, "twice", "second") })
	if got := n.Kubectl(t, "logs", "-n", ns, "twice", "--previous"); got != "first\n" {
		t.Errorf("previous: %q", got)
	}
}

func TestKubectlExec(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("box", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "box", false)

	out, err := n.TryKubectl(nil, "exec", "-n", ns, "box", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.HasPrefix(out, "out\nerr\n") {
		t.Errorf("exit code: %v, output %q", err, out)
	}
	// More than any buffer on the way, and back.
	long := strings.Repeat("0123456789abcde\n", 1<<16)
	if out, err := n.TryKubectl(strings.NewReader(long), "exec", "-i", "-n", ns, "box", "--", "cat"); err != nil || out != long {
		t.Errorf("a megabyte through stdin and back: %d bytes, %v", len(out), err)
	}
	if out := n.Kubectl(t, "exec", "-n", ns, "box", "--", "sh", "-c", "test -t 0 || echo no terminal"); out != "no terminal\n" {
		t.Errorf("without -t: %q", out)
	}
	master, slave := terminal(t, 37, 91)
	n.StartKubectl(t, slave, slave, "exec", "-it", "-n", ns, "box", "--", "sh", "-c", "test -t 0 && read l && echo got $l && until stty size 2>/dev/null | grep .; do sleep 0.1; done")
	if _, err := master.WriteString("typed\n"); err != nil {
		t.Fatal(err)
	}
	var seen bytes.Buffer
	buf := make([]byte, 4096)
	for !strings.Contains(seen.String(), "37 91") {
		if err := master.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		length, err := master.Read(buf)
		if err != nil {
			t.Fatalf("%v; the terminal shows %q", err, seen.String())
		}
		seen.Write(buf[:length])
	}
	if !strings.Contains(seen.String(), "got typed") {
		t.Errorf("the terminal shows %q", seen.String())
	}
}

// terminal makes a pseudo-terminal of this size.
func terminal(t *testing.T, rows, columns uint16) (master, slave *os.File) {
	t.Helper()
	fd, err := unix.Open("/dev/ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Skip(err)
	}
	master = os.NewFile(uintptr(fd), "ptmx")
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetUint32(fd, unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}); err != nil {
		t.Fatal(err)
	}
	slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { slave.Close() })
	return master, slave
}

func TestKubectlAttach(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("listens", "while read l; do echo heard $l; done", "", "stdin: true,"))
	n.WaitPod(t, ns, "listens", false)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	out, next := harness.LineWriter(t)
	n.StartKubectl(t, r, out, "attach", "-q", "-i", "-n", ns, "listens")
	r.Close()
	if _, err := io.WriteString(w, "this\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := next(); err != nil || got != "heard this" {
		t.Errorf("attached %q: %v", got, err)
	}
	harness.Eventually(t, 10*time.Second, func() error { return n.LogsHave(ns, "listens", "heard this") })
}

func TestKubectlCp(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("box", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "box", false)
	dir := harness.HostDir(t)
	data := bytes.Repeat([]byte{0, 1, 2, 250, '\n'}, 100_000)
	if err := os.MkdirAll(filepath.Join(dir, "in/deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "in/deep/data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	n.Kubectl(t, "cp", "-n", ns, filepath.Join(dir, "in"), "box:/copied")
	if got := n.Kubectl(t, "exec", "-n", ns, "box", "--", "stat", "-c", "%s", "/copied/deep/data"); got != "500000\n" {
		t.Errorf("in the pod there are %q bytes", got)
	}
	n.Kubectl(t, "cp", "-n", ns, "box:/copied", filepath.Join(dir, "out"))
	if got, err := os.ReadFile(filepath.Join(dir, "out/deep/data")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("back came %d bytes: %v", len(got), err)
	}
}

func TestKubectlPortForward(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("web", "exec probe serve 127.0.0.1:8080 through-a-tunnel", "")) // reached in no other way
	n.WaitPod(t, ns, "web", false)
	out, next := harness.LineWriter(t)
	n.StartKubectl(t, nil, out, "port-forward", "-n", ns, "pod/web", ":8080")
	line, err := next()
	if err != nil {
		t.Fatal(err)
	}
	var port int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d -> 8080", &port); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	for range 3 { // more than one connection
		harness.Eventually(t, 10*time.Second, func() error {
			return harness.CheckAnswer(fmt.Sprintf("http://127.0.0.1:%d/", port), "through-a-tunnel")
		})
	}
}

func TestKubectlDebug(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("patient", "exec probe serve 127.0.0.1:8080 patient", ""))
	before := n.WaitPod(t, ns, "patient", false)
	n.Kubectl(t, "debug", "-n", ns, "patient", "--image="+harness.Busybox, "--target=main", "-c", "doctor", "--", "sh", "-c", "probe get http://127.0.0.1:8080/; tr '\\0' ' ' </proc/1/cmdline; echo; exec sleep 3600")
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := n.TryKubectl(nil, "logs", "-n", ns, "patient", "-c", "doctor")
		if err != nil || !strings.HasPrefix(out, "patient\nprobe serve") {
			return fmt.Errorf("the debugger sees %q: %v", out, err)
		}
		return nil
	})
	if out := n.Kubectl(t, "exec", "-n", ns, "patient", "-c", "doctor", "--", "hostname"); out != "patient\n" {
		t.Errorf("exec in the ephemeral container: %q", out)
	}
	after, err := n.Pod(ns, "patient")
	if err != nil {
		t.Fatal(err)
	}
	if b, a := harness.ContainerStatus(before, "main"), harness.ContainerStatus(after, "main"); a.ContainerID != b.ContainerID || a.RestartCount != 0 {
		t.Errorf("the container was not left alone: %+v", a)
	}
	// A node is debugged from a pod with the machine's namespaces and file system.
	n.Kubectl(t, "debug", "-n", ns, "node/"+n.Name, "--image="+harness.Busybox, "--", "sh", "-c", "ls /host"+n.DataDir())
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := n.TryKubectl(nil, "get", "pods", "-n", ns, "-o", "name")
		if err != nil {
			return err
		}
		for _, name := range strings.Fields(out) {
			if name = strings.TrimPrefix(name, "pod/"); strings.HasPrefix(name, "node-debugger-") {
				return n.LogsHave(ns, name, "pod-manifests")
			}
		}
		return fmt.Errorf("no debugger in %s", out)
	})
}

// TestKubeletAsksWhoCalls: its port serves nobody without a certificate or token.
func TestKubeletAsksWhoCalls(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	client := harness.InsecureClient()
	for _, path := range []string{"/pods", "/metrics", "/runningpods/", "/logs/"} {
		resp, err := client.Get(fmt.Sprintf("https://127.0.0.1:%d%s", n.APIPort+1, path))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s answers %s", path, resp.Status)
		}
	}
	if out := n.Kubectl(t, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/pods"); !strings.Contains(out, `"PodList"`) {
		t.Errorf("through the API the kubelet answers %s", out)
	}
}
