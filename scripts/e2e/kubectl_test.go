package e2e

import (
	"bufio"
	"bytes"
	"context"
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
)

// startKubectl starts one that runs until the test ends.
func (n *node) startKubectl(t *testing.T, stdin io.Reader, stdout io.Writer, args ...string) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, binary(), append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.kubeconfig, "KUBECACHEDIR="+filepath.Join(baseDir, "cache"))
	cmd.Stdin, cmd.Stdout = stdin, stdout
	cmd.WaitDelay = time.Second
	if err := n.inside(cmd.Start); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait()
	})
}

// lines returns a writer and what gives the next line written to it, or an error
// when there is none within ten seconds.
func lines(t *testing.T) (io.Writer, func() (string, error)) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	out := make(chan string, 100)
	go func() {
		for s := bufio.NewScanner(r); s.Scan(); {
			out <- s.Text()
		}
	}()
	return w, func() (string, error) {
		select {
		case l := <-out:
			return l, nil
		case <-time.After(10 * time.Second):
			return "", errors.New("nothing more is printed")
		}
	}
}

func TestKubectlLogs(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("counts", "echo first; sleep 4; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.5; done", ""))
	n.waitPod(t, ns, "counts", false)
	w, next := lines(t)
	n.startKubectl(t, nil, w, "logs", "-f", "-n", ns, "counts")
	for _, want := range []string{"first", "line 0", "line 1"} {
		if got, err := next(); err != nil || got != want {
			t.Fatalf("followed %q, want %q: %v", got, want, err)
		}
	}
	if got := n.kubectl(t, "logs", "-n", ns, "counts", "--since=2s"); strings.Contains(got, "first") || !strings.Contains(got, "line") {
		t.Errorf("since 2s: %q", got)
	}
	if got := n.kubectl(t, "logs", "-n", ns, "counts", "--limit-bytes=5"); got != "first" {
		t.Errorf("five bytes: %q", got)
	}
	if got := n.kubectl(t, "logs", "-n", ns, "-l", "app=counts", "--tail=1", "--prefix", "--timestamps"); strings.Count(got, "\n") != 1 || !strings.HasPrefix(got, "[pod/counts/main] 20") {
		t.Errorf("tail of one: %q", got)
	}
	n.apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: twice}, spec: {terminationGracePeriodSeconds: 1, volumes: [{name: v, emptyDir: {}}],
		containers: [{name: main, image: %q, command: [sh, -c, "test -f /v/x && echo second && exec sleep 3600; touch /v/x; echo first"], volumeMounts: [{name: v, mountPath: /v}]}]}}`, busybox))
	eventually(t, 40*time.Second, func() error { return n.logsHave(ns, "twice", "second") })
	if got := n.kubectl(t, "logs", "-n", ns, "twice", "--previous"); got != "first\n" {
		t.Errorf("previous: %q", got)
	}
}

func TestKubectlExec(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("box", "exec sleep 3600", ""))
	n.waitPod(t, ns, "box", false)

	out, err := n.tryKubectl(nil, "exec", "-n", ns, "box", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.HasPrefix(out, "out\nerr\n") {
		t.Errorf("exit code: %v, output %q", err, out)
	}
	// More than any buffer on the way, and back.
	long := strings.Repeat("0123456789abcde\n", 1<<16)
	if out, err := n.tryKubectl(strings.NewReader(long), "exec", "-i", "-n", ns, "box", "--", "cat"); err != nil || out != long {
		t.Errorf("a megabyte through stdin and back: %d bytes, %v", len(out), err)
	}
	if out := n.kubectl(t, "exec", "-n", ns, "box", "--", "sh", "-c", "test -t 0 || echo no terminal"); out != "no terminal\n" {
		t.Errorf("without -t: %q", out)
	}
	master, slave := terminal(t, 37, 91)
	n.startKubectl(t, slave, slave, "exec", "-it", "-n", ns, "box", "--", "sh", "-c", "test -t 0 && read l && echo got $l && until stty size 2>/dev/null | grep .; do sleep 0.1; done")
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
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shellWith("listens", "while read l; do echo heard $l; done", "", "stdin: true,"))
	n.waitPod(t, ns, "listens", false)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	out, next := lines(t)
	n.startKubectl(t, r, out, "attach", "-q", "-i", "-n", ns, "listens")
	r.Close()
	if _, err := io.WriteString(w, "this\n"); err != nil {
		t.Fatal(err)
	}
	if got, err := next(); err != nil || got != "heard this" {
		t.Errorf("attached %q: %v", got, err)
	}
	eventually(t, 10*time.Second, func() error { return n.logsHave(ns, "listens", "heard this") })
}

func TestKubectlCp(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("box", "exec sleep 3600", ""))
	n.waitPod(t, ns, "box", false)
	dir := hostDir(t)
	data := bytes.Repeat([]byte{0, 1, 2, 250, '\n'}, 100_000)
	if err := os.MkdirAll(filepath.Join(dir, "in/deep"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "in/deep/data"), data, 0o644); err != nil {
		t.Fatal(err)
	}
	n.kubectl(t, "cp", "-n", ns, filepath.Join(dir, "in"), "box:/copied")
	if got := n.kubectl(t, "exec", "-n", ns, "box", "--", "stat", "-c", "%s", "/copied/deep/data"); got != "500000\n" {
		t.Errorf("in the pod there are %q bytes", got)
	}
	n.kubectl(t, "cp", "-n", ns, "box:/copied", filepath.Join(dir, "out"))
	if got, err := os.ReadFile(filepath.Join(dir, "out/deep/data")); err != nil || !bytes.Equal(got, data) {
		t.Errorf("back came %d bytes: %v", len(got), err)
	}
}

func TestKubectlPortForward(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("web", "exec probe serve 127.0.0.1:8080 through-a-tunnel", "")) // reached in no other way
	n.waitPod(t, ns, "web", false)
	out, next := lines(t)
	n.startKubectl(t, nil, out, "port-forward", "-n", ns, "pod/web", ":8080")
	line, err := next()
	if err != nil {
		t.Fatal(err)
	}
	var port int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d -> 8080", &port); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	for range 3 { // more than one connection
		eventually(t, 10*time.Second, func() error {
			return answers(fmt.Sprintf("http://127.0.0.1:%d/", port), "through-a-tunnel")
		})
	}
}

func TestKubectlDebug(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("patient", "exec probe serve 127.0.0.1:8080 patient", ""))
	before := n.waitPod(t, ns, "patient", false)
	n.kubectl(t, "debug", "-n", ns, "patient", "--image="+busybox, "--target=main", "-c", "doctor", "--", "sh", "-c", "probe get http://127.0.0.1:8080/; tr '\\0' ' ' </proc/1/cmdline; echo; exec sleep 3600")
	eventually(t, 30*time.Second, func() error {
		out, err := n.tryKubectl(nil, "logs", "-n", ns, "patient", "-c", "doctor")
		if err != nil || !strings.HasPrefix(out, "patient\nprobe serve") {
			return fmt.Errorf("the debugger sees %q: %v", out, err)
		}
		return nil
	})
	if out := n.kubectl(t, "exec", "-n", ns, "patient", "-c", "doctor", "--", "hostname"); out != "patient\n" {
		t.Errorf("exec in the ephemeral container: %q", out)
	}
	after, err := n.pod(ns, "patient")
	if err != nil {
		t.Fatal(err)
	}
	if b, a := container(before, "main"), container(after, "main"); a.ContainerID != b.ContainerID || a.RestartCount != 0 {
		t.Errorf("the container was not left alone: %+v", a)
	}
	// A node is debugged from a pod with the machine's namespaces and file system.
	n.kubectl(t, "debug", "-n", ns, "node/"+n.name, "--image="+busybox, "--", "sh", "-c", "ls /host"+n.dataDir())
	eventually(t, 30*time.Second, func() error {
		out, err := n.tryKubectl(nil, "get", "pods", "-n", ns, "-o", "name")
		if err != nil {
			return err
		}
		for _, name := range strings.Fields(out) {
			if name = strings.TrimPrefix(name, "pod/"); strings.HasPrefix(name, "node-debugger-") {
				return n.logsHave(ns, name, "pod-manifests")
			}
		}
		return fmt.Errorf("no debugger in %s", out)
	})
}

// TestKubeletAsksWhoCalls: its port serves nobody without a certificate or token.
func TestKubeletAsksWhoCalls(t *testing.T) {
	t.Parallel()
	n := shared(t)
	client := insecureClient()
	for _, path := range []string{"/pods", "/metrics", "/runningpods/", "/logs/"} {
		resp, err := client.Get(fmt.Sprintf("https://127.0.0.1:%d%s", n.apiPort+1, path))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s answers %s", path, resp.Status)
		}
	}
	if out := n.kubectl(t, "get", "--raw", "/api/v1/nodes/"+n.name+"/proxy/pods"); !strings.Contains(out, `"PodList"`) {
		t.Errorf("through the API the kubelet answers %s", out)
	}
}
