package node

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

	"kedge/scripts/e2e/harness"
)

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

// life is a node with a pod, of which kedge ends and starts again.
type life struct {
	*harness.Node
	told        <-chan string // what the service manager is told
	ns          string
	text, url   string      // what the pod "web" answers, and where
	before      *corev1.Pod // as it was at first
	pids, shims []int       // the pod's process, and the node's shims
}

// TestLifeOfNode takes a node with a pod through stops, a crash and killall.
func TestLifeOfNode(t *testing.T) {
	t.Parallel()
	l := newLife(t)
	l.podRuns(t)
	l.podOutlivesKedge(t)
	l.stopsUnderWatch(t)
	l.killall(t)
	l.secondSignal(t)
}

// newLife starts the node, and sees that the service manager is told when all is ready, and not before.
func newLife(t *testing.T) *life {
	t.Helper()
	l := &life{Node: harness.Own(t)}
	if err := harness.PrepareImages(l.DataDir()); err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(l.Dir, "notify")
	l.told = notices(t, socket)
	l.Env = append(harness.BareEnv(), "NOTIFY_SOCKET="+socket)
	if err := l.Launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case got := <-l.told:
		if got != "READY=1" {
			t.Errorf("the service manager is told %q", got)
		}
	case <-time.After(harness.Patient(60 * time.Second)):
		t.Fatalf("the service manager is told nothing:\n%s", l.Tail(20))
	}
	if out, err := exec.Command(harness.Binary(), "status", "--run-dir="+l.RunDir()).CombinedOutput(); err != nil {
		t.Errorf("the service manager was told before all was ready: %v\n%s", err, out)
	}
	if err := l.WaitReady(time.Second); err != nil {
		t.Fatal(err)
	}
	return l
}

// podRuns starts the pod, which does not have the service manager's socket, nor does its shim.
func (l *life) podRuns(t *testing.T) {
	l.ns = l.Namespace(t)
	l.text = "alive-" + l.Name
	l.Apply(t, l.ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: web}, spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [probe, serve, ":8080", %q]}]}}`, harness.Busybox, l.text))
	l.before = l.WaitPod(t, l.ns, "web", false)
	l.pids = harness.Processes("probe serve :8080 " + l.text)
	if len(l.pids) != 1 {
		t.Fatalf("processes of the pod: %v", l.pids)
	}
	l.url = "http://" + l.before.Status.PodIP + ":8080/"
	if out := l.Kubectl(t, "exec", "-n", l.ns, "web", "--", "env"); strings.Contains(out, "NOTIFY_SOCKET") {
		t.Errorf("the container has the service manager's socket:\n%s", out)
	}
	l.shims = harness.Processes(l.DataDir() + "/runtime/")
	for _, pid := range l.shims {
		if environ, _ := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid)); bytes.Contains(environ, []byte("NOTIFY_SOCKET")) {
			t.Errorf("shim %d has the service manager's socket", pid)
		}
	}
}

// podOutlivesKedge stops and kills kedge: the pod answers meanwhile, and is the same afterwards.
func (l *life) podOutlivesKedge(t *testing.T) {
	l.Env = harness.BareEnv()

	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		l.Stop(t, sig, 10*time.Second)
		if sig == syscall.SIGTERM {
			if got := <-l.told; got != "STOPPING=1" {
				t.Errorf("the service manager is told %q", got)
			}
		}
		for range 10 {
			if err := harness.CheckAnswer(l.url, l.text); err != nil {
				t.Errorf("while kedge is down after %s: %v", sig, err)
			}
		}
		if err := l.Start(); err != nil {
			t.Fatal(err)
		}
		// The kubelet is Ready a moment before it knows its pods.
		harness.Eventually(t, 10*time.Second, func() error {
			out, err := l.TryKubectl(nil, "exec", "-n", l.ns, "web", "--", "true")
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
		after := l.WaitPod(t, l.ns, "web", false)
		b, a := harness.ContainerStatus(l.before, "main"), harness.ContainerStatus(after, "main")
		if a.ContainerID != b.ContainerID || a.RestartCount != 0 || !a.State.Running.StartedAt.Equal(&b.State.Running.StartedAt) || after.Status.PodIP != l.before.Status.PodIP {
			t.Errorf("after %s the pod is not the same:\n%+v\n%+v", sig, b, a)
		}
		if now := harness.Processes("probe serve :8080 " + l.text); len(now) != 1 || now[0] != l.pids[0] {
			t.Errorf("after %s the process is %v, it was %v", sig, now, l.pids)
		}
		if now := harness.Processes(l.DataDir() + "/runtime/"); len(now) != len(l.shims) {
			t.Errorf("after %s there are shims %v, there were %v", sig, now, l.shims)
		}
	}
}

// stopsUnderWatch stops kedge while a client watches, which does not hold up the end, nor make it a failure.
func (l *life) stopsUnderWatch(t *testing.T) {
	watch, err := l.Client.CoreV1().Pods(l.ns).Watch(context.Background(), metav1.ListOptions{})
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
	l.Stop(t, syscall.SIGTERM, 10*time.Second)
	select {
	case <-ended:
	case <-time.After(harness.Patient(5 * time.Second)):
		t.Error("a watch goes on without its server")
	}
}

// killall ends what is left of the node, and the next start makes its pod again.
func (l *life) killall(t *testing.T) {
	// Its name is in the data directory.
	nameless := slices.DeleteFunc(l.Args(), func(arg string) bool { return strings.HasPrefix(arg, "--node-name=") })
	if out, err := l.RunKedge(append([]string{"killall"}, nameless...)...); err != nil {
		t.Fatalf("killall: %v\n%s", err, out)
	}
	if err := l.Leftovers(); err != nil {
		t.Errorf("after killall: %v", err)
	}
	if out, err := l.Command("killall"); err != nil {
		t.Errorf("killall again: %v\n%s", err, out)
	}
	if now := harness.Processes("probe serve :8080 " + l.text); len(now) != 0 {
		t.Errorf("after killall the pod still has processes %v", now)
	}
	if err := l.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 40*time.Second, func() error {
		pod, err := l.Pod(l.ns, "web")
		if err != nil {
			return err
		}
		if pod.Status.Phase != corev1.PodRunning || harness.ContainerStatus(pod, "main").ContainerID == harness.ContainerStatus(l.before, "main").ContainerID {
			return fmt.Errorf("after killall the pod is %+v", pod.Status)
		}
		return harness.CheckAnswer("http://"+pod.Status.PodIP+":8080/", l.text)
	})
}

// secondSignal cuts waits short.
func (l *life) secondSignal(t *testing.T) {
	if err := l.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := l.Signal(syscall.SIGTERM, 3*time.Second); err != nil {
		t.Error(err)
	}
	t.Logf("two signals took %s: %v", time.Since(begin).Round(time.Millisecond), l.Err)
	// By then some parts had stopped; which ones is not certain.
	if last := l.Tail(1); l.Err != nil && !strings.HasSuffix(last, ": was still stopping when a second signal came") {
		t.Errorf("a second signal is followed by %q", last)
	}
	if err := l.Start(); err != nil {
		t.Error(err)
	}
}

// TestStopWhileStarting: a stop that comes before all is ready is an orderly one too.
func TestStopWhileStarting(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	for _, after := range []time.Duration{200, 500, 800, 1200, 1600, 2200} {
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after * time.Millisecond)
		if err := n.Cmd.Process.Signal(syscall.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		select {
		case <-n.Done:
		case <-time.After(harness.Patient(15 * time.Second)):
			t.Fatalf("still running 15 s after a signal at %v ms:\n%s", int(after), n.Tail(20))
		}
		var exit *exec.ExitError
		// Before it listens for signals it ends as any program does.
		if errors.As(n.Err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
			t.Errorf("a signal after %v ms: it ended with %v\n%s", int(after), n.Err, n.Tail(20))
		}
		if left := harness.Processes(n.Dir + "/"); len(left) > 0 {
			t.Errorf("a signal after %v ms leaves the processes %v", int(after), left)
		}
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
}
