package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// shell is a pod's manifest that runs script in a shell; more is added to its spec.
func shell(name, script, more string) string { return shellWith(name, script, more, "") }

// shellWith is [shell] with fields of the container too. All fields end with a comma.
func shellWith(name, script, spec, container string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {app: %s}}, spec: {terminationGracePeriodSeconds: 1, restartPolicy: Never, %s containers: [{name: main, image: %q, %s command: [sh, -c, %q]}]}}`,
		name, name, spec, busybox, container, script)
}

// pod reads one.
func (n *node) pod(namespace, name string) (*corev1.Pod, error) {
	return n.client.CoreV1().Pods(namespace).Get(context.Background(), name, metav1.GetOptions{})
}

// address is the node's InternalIP.
func (n *node) address(t *testing.T) string {
	t.Helper()
	object, err := n.client.CoreV1().Nodes().Get(context.Background(), n.name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range object.Status.Addresses {
		if a.Type == corev1.NodeInternalIP {
			return a.Address
		}
	}
	t.Fatalf("the node has no address: %+v", object.Status.Addresses)
	return ""
}

// waitPod waits until the pod is Running and Ready, or has ended when done is true.
func (n *node) waitPod(t *testing.T, namespace, name string, done bool) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	eventually(t, 60*time.Second, func() (err error) {
		if pod, err = n.pod(namespace, name); err != nil {
			return err
		}
		ended := pod.Status.Phase == corev1.PodSucceeded || pod.Status.Phase == corev1.PodFailed
		if done && ended {
			return nil
		}
		for _, c := range pod.Status.Conditions {
			if !done && c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("pod %s is %s", name, pod.Status.Phase)
	})
	return pod
}

// waitEvent waits for an event of the object with the reason, whose message has text in it.
func (n *node) waitEvent(t *testing.T, namespace, object, reason, text string) {
	t.Helper()
	eventually(t, 60*time.Second, func() error {
		list, err := n.client.CoreV1().Events(namespace).List(context.Background(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + object})
		if err != nil {
			return err
		}
		var seen []string
		for _, e := range list.Items {
			if e.Reason == reason && strings.Contains(e.Message, text) {
				return nil
			}
			seen = append(seen, e.Reason+": "+e.Message)
		}
		return fmt.Errorf("no event %s with %q of %s, but\n%s", reason, text, object, strings.Join(seen, "\n"))
	})
}

// gone waits until there is no such pod.
func (n *node) gone(t *testing.T, namespace, name string) {
	t.Helper()
	eventually(t, 40*time.Second, func() error {
		pod, err := n.pod(namespace, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("pod %s is still %s: %v", name, pod.Status.Phase, err)
	})
}

// logsHave is nil when the pod has printed text.
func (n *node) logsHave(namespace, name, text string) error {
	out, err := n.tryKubectl(nil, "logs", "-n", namespace, name, "--all-containers")
	if err == nil && !strings.Contains(out, text) {
		err = fmt.Errorf("no %q in the logs of %s:\n%s", text, name, out)
	}
	return err
}

// runPod runs script in a pod of its own to the end and returns what it printed.
func (n *node) runPod(t *testing.T, namespace, name, script, more string) string {
	t.Helper()
	return n.runPodWith(t, namespace, name, script, more, "")
}

// runPodWith is [node.runPod] with fields of the container too.
func (n *node) runPodWith(t *testing.T, namespace, name, script, spec, container string) string {
	t.Helper()
	n.apply(t, namespace, shellWith(name, script, spec, container))
	return n.output(t, namespace, name)
}

// output waits until the pod has succeeded and returns what it printed.
func (n *node) output(t *testing.T, namespace, name string) string {
	t.Helper()
	pod := n.waitPod(t, namespace, name, true)
	logs := n.kubectl(t, "logs", "-n", namespace, name)
	if pod.Status.Phase != corev1.PodSucceeded {
		t.Fatalf("pod %s failed: %+v\n%s", name, pod.Status.ContainerStatuses, logs)
	}
	return logs
}

func TestPodHasAddressRouteAndDNSConfiguration(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	out := n.runPod(t, ns, "net", "ip -4 addr show eth0; ip route; cat /etc/resolv.conf; hostname", "")
	pod, err := n.pod(ns, "net")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"inet " + pod.Status.PodIP, "default via ", "nameserver 10.43.0.10", "search " + ns + ".svc.cluster.local svc.cluster.local cluster.local", "ndots:5"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if !strings.HasPrefix(pod.Status.PodIP, "10.42.0.") {
		t.Errorf("address %s is not of the node's range", pod.Status.PodIP)
	}
}

func TestPodsReachEachOther(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, shell("server", "exec probe serve :8080 works", ""))
	ip := n.waitPod(t, ns, "server", false).Status.PodIP
	out := n.runPod(t, ns, "client", "probe get http://"+ip+":8080/", "")
	if strings.TrimSpace(out) != "works" {
		t.Errorf("got %q", out)
	}
}
