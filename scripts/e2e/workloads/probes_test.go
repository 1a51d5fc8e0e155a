package workloads

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"kedge/scripts/e2e/harness"
)

// TestProbes has a pod for each kind of probe. Its server answers, and is asked by
// probes that must succeed and by probes that must fail.
func TestProbes(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	box := fmt.Sprintf("image: %q, command: [sh, -c, ", harness.Busybox)
	web := box + `"exec probe serve :8080 hello"]`
	for _, c := range []struct{ kind, server, good, bad, complaint string }{
		{"exec", web, "exec: {command: [sh, -c, 'exit 0']}", "exec: {command: [sh, -c, 'echo because; exit 1']}", "because"},
		{"http", web, "httpGet: {port: 8080, path: /}", "httpGet: {port: 8080, path: /fail}", "statuscode: 500"},
		{"tcp", web, "tcpSocket: {port: 8080}", "tcpSocket: {port: 9}", "connection refused"},
		{"grpc", fmt.Sprintf("image: %q, args: [grpc-health-checking, --service=known]", harness.Agnhost), "grpc: {port: 5000, service: known}", "grpc: {port: 5000, service: unknown}", "unknown service"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			t.Parallel()
			every := ", periodSeconds: 1, timeoutSeconds: 2, failureThreshold: %d}"
			good := "{" + c.good + fmt.Sprintf(every, 10)
			bad := "{" + c.bad + fmt.Sprintf(every, 2)
			sleeps := box + `"exec sleep 3600"]`
			n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [
				{name: server, %s, startupProbe: %s, readinessProbe: %s, livenessProbe: %s},
				{name: unready, %s, readinessProbe: %s}, {name: dead, %s, startupProbe: %s, livenessProbe: %s}, {name: unstarted, %s, startupProbe: %s, readinessProbe: %s}]}}`,
				c.kind, c.server, good, good, good, sleeps, bad, sleeps, good, bad, sleeps, bad, good))
			for _, probe := range []string{"Readiness", "Liveness", "Startup"} {
				n.WaitEvent(t, ns, c.kind, "Unhealthy", probe+" probe failed")
			}
			n.WaitEvent(t, ns, c.kind, "Unhealthy", c.complaint)
			harness.Eventually(t, 60*time.Second, func() error {
				pod, err := n.Pod(ns, c.kind)
				if err != nil {
					return err
				}
				server, unready, dead, unstarted := harness.ContainerStatus(pod, "server"), harness.ContainerStatus(pod, "unready"), harness.ContainerStatus(pod, "dead"), harness.ContainerStatus(pod, "unstarted")
				if server.Ready && server.RestartCount == 0 && !unready.Ready && unready.RestartCount == 0 && unready.State.Running != nil &&
					dead.RestartCount > 0 && dead.LastTerminationState.Terminated != nil && unstarted.RestartCount > 0 && !unstarted.Ready {
					return nil
				}
				return fmt.Errorf("containers %+v", pod.Status.ContainerStatuses)
			})
		})
	}
}

// TestStartupProbeHoldsOthersBack: without it, the liveness probe would end the container.
func TestStartupProbeHoldsOthersBack(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	const probe = "exec: {command: [test, -f, /tmp/started]}, periodSeconds: 1"
	n.Apply(t, ns, harness.ShellWith("slow", "mkdir /tmp; sleep 6; touch /tmp/started; exec sleep 3600", "", "startupProbe: {"+probe+", failureThreshold: 60}, livenessProbe: {"+probe+", failureThreshold: 1},"))
	harness.Eventually(t, 30*time.Second, func() error {
		pod, err := n.Pod(ns, "slow")
		if c := harness.ContainerStatus(pod, "main"); err != nil || c.State.Running == nil || c.Started == nil || *c.Started || c.Ready {
			return fmt.Errorf("never seen running and not started, but %+v: %v", c, err)
		}
		return nil
	})
	if c := harness.ContainerStatus(n.WaitPod(t, ns, "slow", false), "main"); c.RestartCount != 0 || c.Started == nil || !*c.Started {
		t.Errorf("container %+v", c)
	}
}

// TestReadinessComesAndGoes follows one pod that is made ready, unready and ready again.
func TestReadinessComesAndGoes(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.ShellWith("door", "mkdir /tmp; exec sleep 3600", "", "readinessProbe: {exec: {command: [test, -f, /tmp/open]}, periodSeconds: 1, failureThreshold: 1}, ports: [{containerPort: 80}],"))
	n.Apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: door}, spec: {selector: {app: door}, ports: [{port: 80}]}}`)
	address := func() string {
		return n.Kubectl(t, "get", "endpointslice", "-n", ns, "-l", "kubernetes.io/service-name=door", "-o", "jsonpath={.items[*].endpoints[*].conditions.ready}")
	}
	for i, step := range []struct{ command, ready string }{{"true", "false"}, {"touch /tmp/open", "true"}, {"rm /tmp/open", "false"}, {"touch /tmp/open", "true"}} {
		harness.Eventually(t, 30*time.Second, func() error {
			_, err := n.TryKubectl(nil, "exec", "-n", ns, "door", "--", "sh", "-c", step.command)
			return err
		})
		harness.Eventually(t, 30*time.Second, func() error {
			if got := address(); got != step.ready {
				return fmt.Errorf("step %d: the endpoint's ready is %q, want %s", i, got, step.ready)
			}
			return nil
		})
	}
}

// deletedPod deletes a pod with a grace period in seconds, and returns how its container ended. The exit code tells a
// container that obeyed from one that was killed; the time until the object is gone does not, because the kubelet repeats
// what it could not do at once only every ten seconds.
func deletedPod(t *testing.T, n *harness.Node, ns, name string, grace int) *corev1.ContainerStateTerminated {
	t.Helper()
	finalizers := func(list string) {
		n.Kubectl(t, "patch", "pod", "-n", ns, name, "--type=merge", "-p", `{"metadata":{"finalizers":`+list+`}}`)
	}
	finalizers(`["kedge.io/test"]`) // the object stays until its end was read
	n.Kubectl(t, "delete", "pod", "-n", ns, name, fmt.Sprint("--grace-period=", grace), "--wait=false")
	var end *corev1.ContainerStateTerminated
	harness.Eventually(t, time.Duration(grace)*time.Second+20*time.Second, func() error {
		pod, err := n.Pod(ns, name)
		if end = harness.ContainerStatus(pod, "main").State.Terminated; err != nil || end == nil {
			return fmt.Errorf("pod %s has not ended: %v", name, err)
		}
		return nil
	})
	finalizers("null")
	waitGone(t, n, ns, name)
	return end
}

func TestHooksAndTermination(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	dir := harness.HostDir(t)
	spec := fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s}}],", dir)
	const mount = "volumeMounts: [{name: v, mountPath: /v}],"

	t.Run("graceful", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, harness.ShellWith("polite", "trap 'echo term >>/v/polite; exit 0' TERM; while :; do sleep 0.1; done", spec, mount+`
			lifecycle: {postStart: {exec: {command: [sh, -c, "echo started >>/v/polite"]}}, preStop: {exec: {command: [sh, -c, "echo stopping >>/v/polite"]}}},`))
		n.WaitPod(t, ns, "polite", false)
		if end := deletedPod(t, n, ns, "polite", 20); end.ExitCode != 0 {
			t.Errorf("the container obeys, and ended by %+v", end)
		}
		if got := harness.FileContent(dir, "polite"); got != "started\nstopping\nterm" {
			t.Errorf("happened: %q", got)
		}
	})
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, harness.ShellWith("stubborn", "trap 'echo term >>/v/stubborn' TERM; while :; do echo alive >>/v/alive; sleep 0.1; done", spec, mount))
		n.WaitPod(t, ns, "stubborn", false)
		start := time.Now()
		end := deletedPod(t, n, ns, "stubborn", 4)
		if took := time.Since(start); end.ExitCode != 137 || took < 3500*time.Millisecond {
			t.Errorf("with a grace period of 4 s it ended after %s by %+v", took, end)
		}
		if got := harness.FileContent(dir, "stubborn"); got != "term" {
			t.Errorf("trapped: %q", got)
		}
		last := harness.FileContent(dir, "alive")
		if last == "" {
			t.Error("the container never wrote")
		}
		time.Sleep(300 * time.Millisecond) // three times what it would need to write again
		if now := harness.FileContent(dir, "alive"); len(now) != len(last) {
			t.Errorf("the container is still alive: %d bytes, then %d", len(last), len(now))
		}
	})
	t.Run("http-hooks", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, harness.Shell("web", "mkdir -p /www; busybox httpd -f -vv -p 8080 -h /www", ""))
		ip := n.WaitPod(t, ns, "web", false).Status.PodIP
		n.Apply(t, ns, harness.ShellWith("caller", "sleep 3600", "", fmt.Sprintf(`lifecycle: {preStop: {httpGet: {host: %q, port: 8080, path: /bye-from-caller}}},`, ip)))
		n.WaitPod(t, ns, "caller", false)
		n.Kubectl(t, "delete", "pod", "-n", ns, "caller", "--wait=false")
		harness.Eventually(t, 20*time.Second, func() error { return n.LogsHave(ns, "web", "url:/bye-from-caller") })
	})
	t.Run("failing-post-start", func(t *testing.T) {
		t.Parallel()
		n.Apply(t, ns, harness.ShellWith("unlucky", "sleep 3600", "", `lifecycle: {postStart: {exec: {command: [sh, -c, "echo no; exit 3"]}}},`))
		n.WaitEvent(t, ns, "unlucky", "FailedPostStartHook", "")
		if c := harness.ContainerStatus(n.WaitPod(t, ns, "unlucky", true), "main"); c.State.Terminated == nil || c.State.Terminated.ExitCode != 137 {
			t.Errorf("container %+v", c)
		}
	})
}
