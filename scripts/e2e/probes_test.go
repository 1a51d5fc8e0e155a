package e2e

import (
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// container finds one's status, of init containers too; the zero value when it has none yet.
func container(pod *corev1.Pod, name string) corev1.ContainerStatus {
	for _, c := range append(pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return corev1.ContainerStatus{}
}

// TestProbes has a pod for each kind of probe. Its server answers, and is asked by
// probes that must succeed and by probes that must fail.
func TestProbes(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	box := fmt.Sprintf("image: %q, command: [sh, -c, ", busybox)
	web := box + `"exec probe serve :8080 hello"]`
	for _, c := range []struct{ kind, server, good, bad, complaint string }{
		{"exec", web, "exec: {command: [sh, -c, 'exit 0']}", "exec: {command: [sh, -c, 'echo because; exit 1']}", "because"},
		{"http", web, "httpGet: {port: 8080, path: /}", "httpGet: {port: 8080, path: /fail}", "statuscode: 500"},
		{"tcp", web, "tcpSocket: {port: 8080}", "tcpSocket: {port: 9}", "connection refused"},
		{"grpc", fmt.Sprintf("image: %q, args: [grpc-health-checking, --service=known]", agnhost), "grpc: {port: 5000, service: known}", "grpc: {port: 5000, service: unknown}", "unknown service"},
	} {
		t.Run(c.kind, func(t *testing.T) {
			t.Parallel()
			every := ", periodSeconds: 1, timeoutSeconds: 2, failureThreshold: %d}"
			good := "{" + c.good + fmt.Sprintf(every, 10)
			bad := "{" + c.bad + fmt.Sprintf(every, 2)
			sleeps := box + `"exec sleep 3600"]`
			n.apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s}, spec: {terminationGracePeriodSeconds: 1, containers: [
				{name: server, %s, startupProbe: %s, readinessProbe: %s, livenessProbe: %s},
				{name: unready, %s, readinessProbe: %s}, {name: dead, %s, startupProbe: %s, livenessProbe: %s}, {name: unstarted, %s, startupProbe: %s, readinessProbe: %s}]}}`,
				c.kind, c.server, good, good, good, sleeps, bad, sleeps, good, bad, sleeps, bad, good))
			for _, probe := range []string{"Readiness", "Liveness", "Startup"} {
				n.waitEvent(t, ns, c.kind, "Unhealthy", probe+" probe failed")
			}
			n.waitEvent(t, ns, c.kind, "Unhealthy", c.complaint)
			eventually(t, 60*time.Second, func() error {
				pod, err := n.pod(ns, c.kind)
				if err != nil {
					return err
				}
				server, unready, dead, unstarted := container(pod, "server"), container(pod, "unready"), container(pod, "dead"), container(pod, "unstarted")
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
	n := shared(t)
	ns := n.namespace(t)
	const probe = "exec: {command: [test, -f, /tmp/started]}, periodSeconds: 1"
	n.apply(t, ns, shellWith("slow", "mkdir /tmp; sleep 6; touch /tmp/started; exec sleep 3600", "", "startupProbe: {"+probe+", failureThreshold: 60}, livenessProbe: {"+probe+", failureThreshold: 1},"))
	eventually(t, 30*time.Second, func() error {
		pod, err := n.pod(ns, "slow")
		if c := container(pod, "main"); err != nil || c.State.Running == nil || c.Started == nil || *c.Started || c.Ready {
			return fmt.Errorf("never seen running and not started, but %+v: %v", c, err)
		}
		return nil
	})
	if c := container(n.waitPod(t, ns, "slow", false), "main"); c.RestartCount != 0 || c.Started == nil || !*c.Started {
		t.Errorf("container %+v", c)
	}
}

// TestReadinessComesAndGoes follows one pod that is made ready, unready and ready again.
func TestReadinessComesAndGoes(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shellWith("door", "mkdir /tmp; exec sleep 3600", "", "readinessProbe: {exec: {command: [test, -f, /tmp/open]}, periodSeconds: 1, failureThreshold: 1}, ports: [{containerPort: 80}],"))
	n.apply(t, ns, `{apiVersion: v1, kind: Service, metadata: {name: door}, spec: {selector: {app: door}, ports: [{port: 80}]}}`)
	address := func() string {
		return n.kubectl(t, "get", "endpointslice", "-n", ns, "-l", "kubernetes.io/service-name=door", "-o", "jsonpath={.items[*].endpoints[*].conditions.ready}")
	}
	for i, step := range []struct{ command, ready string }{{"true", "false"}, {"touch /tmp/open", "true"}, {"rm /tmp/open", "false"}, {"touch /tmp/open", "true"}} {
		eventually(t, 30*time.Second, func() error {
			_, err := n.tryKubectl(nil, "exec", "-n", ns, "door", "--", "sh", "-c", step.command)
			return err
		})
		eventually(t, 30*time.Second, func() error {
			if got := address(); got != step.ready {
				return fmt.Errorf("step %d: the endpoint's ready is %q, want %s", i, got, step.ready)
			}
			return nil
		})
	}
}

func TestHooksAndTermination(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	dir := hostDir(t)
	spec := fmt.Sprintf("volumes: [{name: v, hostPath: {path: %s}}],", dir)
	const mount = "volumeMounts: [{name: v, mountPath: /v}],"

	t.Run("graceful", func(t *testing.T) {
		t.Parallel()
		n.apply(t, ns, shellWith("polite", "trap 'echo term >>/v/polite; exit 0' TERM; while :; do sleep 0.1; done", spec, mount+`
			lifecycle: {postStart: {exec: {command: [sh, -c, "echo started >>/v/polite"]}}, preStop: {exec: {command: [sh, -c, "echo stopping >>/v/polite"]}}},`))
		n.waitPod(t, ns, "polite", false)
		n.kubectl(t, "delete", "pod", "-n", ns, "polite", "--grace-period=20", "--wait=false")
		start := time.Now()
		n.gone(t, ns, "polite")
		if took := time.Since(start); took > 15*time.Second {
			t.Errorf("the end took %s, although the container obeys", took)
		}
		if got := content(dir, "polite"); got != "started\nstopping\nterm" {
			t.Errorf("happened: %q", got)
		}
	})
	t.Run("killed", func(t *testing.T) {
		t.Parallel()
		n.apply(t, ns, shellWith("stubborn", "trap 'echo term >>/v/stubborn' TERM; while :; do echo alive >>/v/alive; sleep 0.1; done", spec, mount))
		n.waitPod(t, ns, "stubborn", false)
		n.kubectl(t, "delete", "pod", "-n", ns, "stubborn", "--grace-period=4", "--wait=false")
		start := time.Now()
		eventually(t, 10*time.Second, func() error {
			if got := content(dir, "stubborn"); got != "term" {
				return fmt.Errorf("trapped: %q", got)
			}
			return nil
		})
		n.gone(t, ns, "stubborn")
		if took := time.Since(start); took < 3500*time.Millisecond || took > 20*time.Second {
			t.Errorf("the end took %s with a grace period of 4 s", took)
		}
		last := content(dir, "alive")
		if last == "" {
			t.Error("the container never wrote")
		}
		time.Sleep(300 * time.Millisecond) // three times what it would need to write again
		if now := content(dir, "alive"); len(now) != len(last) {
			t.Errorf("the container is still alive: %d bytes, then %d", len(last), len(now))
		}
	})
	t.Run("http-hooks", func(t *testing.T) {
		t.Parallel()
		n.apply(t, ns, shell("web", "mkdir -p /www; busybox httpd -f -vv -p 8080 -h /www", ""))
		ip := n.waitPod(t, ns, "web", false).Status.PodIP
		n.apply(t, ns, shellWith("caller", "sleep 3600", "", fmt.Sprintf(`lifecycle: {preStop: {httpGet: {host: %q, port: 8080, path: /bye-from-caller}}},`, ip)))
		n.waitPod(t, ns, "caller", false)
		n.kubectl(t, "delete", "pod", "-n", ns, "caller", "--wait=false")
		eventually(t, 20*time.Second, func() error { return n.logsHave(ns, "web", "url:/bye-from-caller") })
	})
	t.Run("failing-post-start", func(t *testing.T) {
		t.Parallel()
		n.apply(t, ns, shellWith("unlucky", "sleep 3600", "", `lifecycle: {postStart: {exec: {command: [sh, -c, "echo no; exit 3"]}}},`))
		n.waitEvent(t, ns, "unlucky", "FailedPostStartHook", "")
		if c := container(n.waitPod(t, ns, "unlucky", true), "main"); c.State.Terminated == nil || c.State.Terminated.ExitCode != 137 {
			t.Errorf("container %+v", c)
		}
	})
}
