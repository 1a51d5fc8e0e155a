package workloads

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"kedge/scripts/e2e/harness"
)

func TestInitContainersRunInOrder(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	step := func(name, script string) string {
		return fmt.Sprintf(`{name: %s, image: %q, command: [sh, -c, %q], volumeMounts: [{name: v, mountPath: /v}]}`, name, harness.Busybox, script)
	}
	const volume = "terminationGracePeriodSeconds: 1, volumes: [{name: v, emptyDir: {}}]"
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {restartPolicy: Never, %s, initContainers: [%s, %s], containers: [%s]}}`, volume,
		step("one", "sleep 1; echo one >>/v/log"), step("two", "echo two >>/v/log"), step("main", "cat /v/log")))
	if got := n.Output(t, ns, "p"); got != "one\ntwo\n" {
		t.Errorf("order was %q", got)
	}
	// One that fails keeps the rest from running, and with Never it fails the pod.
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: q}, spec: {restartPolicy: Never, %s, initContainers: [%s, %s], containers: [%s]}}`, volume,
		step("one", "exit 9"), step("two", "true"), step("main", "true")))
	pod := n.WaitPod(t, ns, "q", true)
	if s := harness.ContainerStatus(pod, "one").State.Terminated; pod.Status.Phase != corev1.PodFailed || s == nil || s.ExitCode != 9 {
		t.Errorf("pod is %s, the first container %+v", pod.Status.Phase, s)
	}
	if harness.ContainerStatus(pod, "two").State.Waiting == nil || harness.ContainerStatus(pod, "main").State.Waiting == nil {
		t.Errorf("later containers ran: %+v", pod.Status)
	}
}

// TestSidecar: it is ready before the next starts, runs beside the main container, is
// restarted when it ends, and is ended after the main container.
func TestSidecar(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	dir := harness.HostDir(t)
	step := func(name, script, more string) string {
		return fmt.Sprintf(`{name: %s, image: %q, command: [sh, -c, %q], volumeMounts: [{name: v, mountPath: /v}] %s}`, name, harness.Busybox, script, more)
	}
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {restartPolicy: Never, terminationGracePeriodSeconds: 5, volumes: [{name: v, hostPath: {path: %s}}], initContainers: [%s, %s], containers: [%s]}}`, dir,
		step("side", "trap 'echo side-ends >>/v/log; exit 0' TERM; sleep 1; echo side-starts >>/v/log; touch /v/ready; while test ! -f /v/stumble; do sleep 0.1; done; rm /v/stumble; exit 1",
			", restartPolicy: Always, startupProbe: {exec: {command: [test, -f, /v/ready]}, periodSeconds: 1}"),
		step("init", "echo init >>/v/log; test -f /v/ready", ""),
		step("main", "echo main >>/v/log; touch /v/stumble; while test $(grep -c side-starts /v/log) != 2; do sleep 0.1; done; echo main-ends >>/v/log", "")))
	pod := n.WaitPod(t, ns, "p", true)
	if pod.Status.Phase != corev1.PodSucceeded {
		t.Errorf("pod is %s", pod.Status.Phase)
	}
	if got := harness.FileContent(dir, "log"); got != "side-starts\ninit\nmain\nside-starts\nmain-ends\nside-ends" {
		t.Errorf("happened: %q", got)
	}
	if s := harness.ContainerStatus(pod, "side"); s.RestartCount != 1 || s.State.Terminated == nil {
		t.Errorf("the sidecar is %+v", s)
	}
}

func TestRestartPolicies(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	pod := func(name, policy, script string) {
		n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {terminationGracePeriodSeconds: 1, restartPolicy: %s, volumes: [{name: v, emptyDir: {}}],
			containers: [{name: main, image: %q, command: [sh, -c, %q], volumeMounts: [{name: v, mountPath: /v}]}]}}`, name, policy, harness.Busybox, script))
	}
	t.Run("never", func(t *testing.T) {
		t.Parallel()
		pod("never", "Never", "echo sorry >/dev/termination-log; exit 3")
		p := n.WaitPod(t, ns, "never", true)
		c := harness.ContainerStatus(p, "main")
		if p.Status.Phase != corev1.PodFailed || c.RestartCount != 0 || c.State.Terminated.ExitCode != 3 || c.State.Terminated.Message != "sorry\n" {
			t.Errorf("pod is %s, container %+v", p.Status.Phase, c)
		}
	})
	t.Run("on-failure", func(t *testing.T) {
		t.Parallel()
		pod("on-failure", "OnFailure", "test -f /v/again && exit 0; touch /v/again; exit 4")
		p := n.WaitPod(t, ns, "on-failure", true)
		c := harness.ContainerStatus(p, "main")
		if p.Status.Phase != corev1.PodSucceeded || c.RestartCount != 1 {
			t.Errorf("pod is %s, container %+v", p.Status.Phase, c)
		}
	})
	t.Run("always", func(t *testing.T) {
		t.Parallel()
		pod("always", "Always", "test -f /v/again && exec sleep 3600; touch /v/again")
		harness.Eventually(t, 60*time.Second, func() error {
			p, err := n.Pod(ns, "always")
			if err != nil {
				return err
			}
			if c := harness.ContainerStatus(p, "main"); c.RestartCount != 1 || c.State.Running == nil || c.LastTerminationState.Terminated == nil || c.LastTerminationState.Terminated.ExitCode != 0 {
				return fmt.Errorf("container %+v", c)
			}
			return nil
		})
	})
	t.Run("back-off", func(t *testing.T) {
		t.Parallel()
		pod("back-off", "Always", "date +%s >>/v/log; cat /v/log; exit 5")
		waiting := func(want string) func() error {
			return func() error {
				p, err := n.Pod(ns, "back-off")
				if err != nil {
					return err
				}
				if w := harness.ContainerStatus(p, "main").State.Waiting; w == nil || w.Reason != "CrashLoopBackOff" || !strings.Contains(w.Message, want) {
					return fmt.Errorf("container %+v", harness.ContainerStatus(p, "main").State)
				}
				return nil
			}
		}
		// The kubelet says that a container waits at the sync after the one that
		// put it off, which may be the one that starts it again; and it comes up
		// to a half later than the back-off asks for.
		harness.Eventually(t, 60*time.Second, waiting("back-off 10s"))
		harness.Eventually(t, 90*time.Second, waiting("back-off 20s"))
		var times []int
		for _, l := range strings.Fields(n.Kubectl(t, "logs", "-n", ns, "back-off")) {
			var s int
			fmt.Sscan(l, &s)
			times = append(times, s)
		}
		if len(times) < 3 || times[2]-times[1] < 9 {
			t.Errorf("runs at %v: the second restart has to wait ten seconds", times)
		}
	})
}
