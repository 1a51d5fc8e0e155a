package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// stop sends sig and checks how the node ends.
func (n *node) stop(t *testing.T, sig syscall.Signal, limit time.Duration) {
	t.Helper()
	begin := time.Now()
	if err := n.signal(sig, limit); err != nil {
		t.Fatalf("%v\n%s", err, n.tail(20))
	}
	t.Logf("%s took %s", sig, time.Since(begin).Round(time.Millisecond))
	if sig == syscall.SIGTERM && n.err != nil {
		t.Errorf("after SIGTERM it ended with %v\n%s", n.err, n.tail(20))
	}
}

// notices listens as a service manager does, and returns what is sent.
func notices(t *testing.T, socket string) <-chan string {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	out := make(chan string, 10)
	go func() {
		buf := make([]byte, 4096)
		for {
			length, err := c.Read(buf)
			if err != nil {
				return
			}
			out <- string(buf[:length])
		}
	}()
	return out
}

// TestLifeOfNode takes a node with a pod through stops, a crash and killall.
func TestLifeOfNode(t *testing.T) {
	t.Parallel()
	n := own(t)
	if err := prepareImages(n.dataDir()); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(n.dir, "notify")
	told := notices(t, socket)
	n.env = append(bare(), "NOTIFY_SOCKET="+socket)
	if err := n.launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-told:
		if got != "READY=1" {
			t.Errorf("the service manager is told %q", got)
		}
	case <-time.After(patient(60 * time.Second)):
		t.Fatalf("the service manager is told nothing:\n%s", n.tail(20))
	}
	if out, err := exec.Command(binary(), "status", "--run-dir="+n.runDir()).CombinedOutput(); err != nil {
		t.Errorf("the service manager was told before all was ready: %v\n%s", err, out)
	}
	if err := n.waitReady(time.Second); err != nil {
		t.Fatal(err)
	}

	ns := n.namespace(t)
	text := "alive-" + n.name
	n.apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [probe, serve, ":8080", %q]}]}}`, busybox, text))
	before := n.waitPod(t, ns, "web", false)
	pids := processes("probe serve :8080 " + text)
	if len(pids) != 1 {
		t.Fatalf("processes of the pod: %v", pids)
	}
	url := "http://" + before.Status.PodIP + ":8080/"
	if out := n.kubectl(t, "exec", "-n", ns, "web", "--", "env"); strings.Contains(out, "NOTIFY_SOCKET") {
		t.Errorf("the container has the service manager's socket:\n%s", out)
	}
	shims := processes(n.dataDir() + "/runtime/")
	for _, pid := range shims {
		if environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); bytes.Contains(environ, []byte("NOTIFY_SOCKET")) {
			t.Errorf("shim %d has the service manager's socket", pid)
		}
	}
	n.env = bare()

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		n.stop(t, sig, 10*time.Second)
		if sig == syscall.SIGTERM {
			if got := <-told; got != "STOPPING=1" {
				t.Errorf("the service manager is told %q", got)
			}
		}
		for range 10 {
			if err := answers(url, text); err != nil {
				t.Errorf("while kedge is down after %s: %v", sig, err)
			}
		}
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
		// The kubelet is Ready a moment before it knows its pods.
		eventually(t, 10*time.Second, func() error {
			out, err := n.tryKubectl(nil, "exec", "-n", ns, "web", "--", "true")
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
		after := n.waitPod(t, ns, "web", false)
		b, a := container(before, "main"), container(after, "main")
		if a.ContainerID != b.ContainerID || a.RestartCount != 0 || !a.State.Running.StartedAt.Equal(&b.State.Running.StartedAt) || after.Status.PodIP != before.Status.PodIP {
			t.Errorf("after %s the pod is not the same:\n%+v\n%+v", sig, b, a)
		}
		if now := processes("probe serve :8080 " + text); len(now) != 1 || now[0] != pids[0] {
			t.Errorf("after %s the process is %v, it was %v", sig, now, pids)
		}
		if now := processes(n.dataDir() + "/runtime/"); len(now) != len(shims) {
			t.Errorf("after %s there are shims %v, there were %v", sig, now, shims)
		}
	}

	// A client that watches does not hold up the end, nor make it a failure.
	watch, err := n.client.CoreV1().Pods(ns).Watch(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for range watch.ResultChan() {
		}
	}()
	n.stop(t, syscall.SIGTERM, 10*time.Second)
	select {
	case <-ended:
	case <-time.After(patient(5 * time.Second)):
		t.Error("a watch goes on without its server")
	}
	// Its name is in the data directory.
	nameless := slices.DeleteFunc(n.args(), func(arg string) bool { return strings.HasPrefix(arg, "--node-name=") })
	if out, err := n.runKedge(append([]string{"killall"}, nameless...)...); err != nil {
		t.Fatalf("killall: %v\n%s", err, out)
	}
	if err := n.leftovers(); err != nil {
		t.Errorf("after killall: %v", err)
	}
	if out, err := n.command("killall"); err != nil {
		t.Errorf("killall again: %v\n%s", err, out)
	}
	if now := processes("probe serve :8080 " + text); len(now) != 0 {
		t.Errorf("after killall the pod still has processes %v", now)
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 40*time.Second, func() error {
		pod, err := n.pod(ns, "web")
		if err != nil {
			return err
		}
		if pod.Status.Phase != corev1.PodRunning || container(pod, "main").ContainerID == container(before, "main").ContainerID {
			return fmt.Errorf("after killall the pod is %+v", pod.Status)
		}
		return answers("http://"+pod.Status.PodIP+":8080/", text)
	})

	// A second signal cuts waits short.
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := n.signal(syscall.SIGTERM, 3*time.Second); err != nil {
		t.Error(err)
	}
	t.Logf("two signals took %s: %v", time.Since(begin).Round(time.Millisecond), n.err)
	// By then some parts had stopped; which ones is not certain.
	if last := n.tail(1); n.err != nil && !strings.HasSuffix(last, ": was still stopping when a second signal came") {
		t.Errorf("a second signal is followed by %q", last)
	}
	if err := n.start(); err != nil {
		t.Error(err)
	}
}

// TestStopWhileStarting: a stop that comes before all is ready is an orderly one too.
func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	n := own(t)
	for _, after := range []time.Duration{200, 500, 800, 1200, 1600, 2200} {
		if err := n.launch(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
		if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		select {
		case <-n.done:
		case <-time.After(patient(15 * time.Second)):
			t.Fatalf("still running 15 s after a signal at %v ms:\n%s", int(after), n.tail(20))
		}
		var exit *exec.ExitError
		// Before it listens for signals it ends as any program does.
		if errors.As(n.err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
			t.Errorf("a signal after %v ms: it ended with %v\n%s", int(after), n.err, n.tail(20))
		}
		if left := processes(n.dir + "/"); len(left) > 0 {
			t.Errorf("a signal after %v ms leaves the processes %v", int(after), left)
		}
	}
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
}
