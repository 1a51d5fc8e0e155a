package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"kedge/internal/namespaces"
)

// PodNetwork returns the network namespace of a pod: the test itself can then connect
// and listen as the pod, without a program in it.
func (n *Node) PodNetwork(t *testing.T, namespace, name string) *namespaces.Network {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(n.RunDir(), "network/leases/leases.journal"))
	if err != nil {
		t.Fatal(err)
	}
	var path string
	for line := range bytes.Lines(data) {
		if i := bytes.IndexByte(line, '{'); i >= 0 && bytes.Contains(line, fmt.Appendf(nil, "%q", namespace+"/"+name)) {
			var found func(any)
			found = func(v any) {
				if m, ok := v.(map[string]any); ok {
					if p, ok := m["netns"].(string); ok {
						path = p // the last one is the newest
					}
					for _, v := range m {
						found(v)
					}
				}
			}
			var v any
			if json.Unmarshal(bytes.TrimSpace(line[i:]), &v) == nil {
				found(v)
			}
		}
	}
	if path == "" {
		t.Fatalf("no lease of pod %s/%s in\n%s", namespace, name, data)
	}
	if n.Machine != nil {
		if path, err = n.Machine.Live(path); err != nil {
			t.Fatal(err)
		}
	}
	ns, err := namespaces.OpenNetwork(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// Shell is a pod's manifest that runs script in a shell; more is added to its spec.
func Shell(name, script, more string) string { return ShellWith(name, script, more, "") }

// ShellWith is [Shell] with fields of the container too. All fields end with a comma.
func ShellWith(name, script, spec, container string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {app: %s}}, spec: {terminationGracePeriodSeconds: 1, restartPolicy: Never, %s containers: [{name: main, image: %q, %s command: [sh, -c, %q]}]}}`,
		name, name, spec, Busybox, container, script)
}

// Pod reads a pod.
func (n *Node) Pod(namespace, name string) (*corev1.Pod, error) {
	return n.Client.CoreV1().Pods(namespace).Get(context.Background(), name, metav1.GetOptions{})
}

// Address is the node's InternalIP.
func (n *Node) Address(t *testing.T) string {
	t.Helper()
	object, err := n.Client.CoreV1().Nodes().Get(context.Background(), n.Name, metav1.GetOptions{})
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

// WaitPod waits until the pod is Running and Ready, or has ended when done is true.
func (n *Node) WaitPod(t *testing.T, namespace, name string, done bool) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	Eventually(t, 60*time.Second, func() (err error) {
		if pod, err = n.Pod(namespace, name); err != nil {
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

// WaitEvent waits for an event of the object with the reason, whose message has text in it.
func (n *Node) WaitEvent(t *testing.T, namespace, object, reason, text string) {
	t.Helper()
	Eventually(t, 60*time.Second, func() error {
		list, err := n.Client.CoreV1().Events(namespace).List(context.Background(), metav1.ListOptions{FieldSelector: "involvedObject.name=" + object})
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

// LogsHave is nil when the pod has printed text.
func (n *Node) LogsHave(namespace, name, text string) error {
	out, err := n.TryKubectl(nil, "logs", "-n", namespace, name, "--all-containers")
	if err == nil && !strings.Contains(out, text) {
		err = fmt.Errorf("no %q in the logs of %s:\n%s", text, name, out)
	}
	return err
}

// RunPod runs script in a pod of its own to the end and returns what it printed.
func (n *Node) RunPod(t *testing.T, namespace, name, script, more string) string {
	t.Helper()
	return n.RunPodWith(t, namespace, name, script, more, "")
}

// RunPodWith is [Node.RunPod] with fields of the container too.
func (n *Node) RunPodWith(t *testing.T, namespace, name, script, spec, container string) string {
	t.Helper()
	n.Apply(t, namespace, ShellWith(name, script, spec, container))
	return n.Output(t, namespace, name)
}

// Output waits until the pod has succeeded and returns what it printed.
func (n *Node) Output(t *testing.T, namespace, name string) string {
	t.Helper()
	pod := n.WaitPod(t, namespace, name, true)
	logs := n.Kubectl(t, "logs", "-n", namespace, name)
	if pod.Status.Phase != corev1.PodSucceeded {
		t.Fatalf("pod %s failed: %+v\n%s", name, pod.Status.ContainerStatuses, logs)
	}
	return logs
}

// ContainerStatus finds a container's status, of init containers too; the zero value when it has none yet.
func ContainerStatus(pod *corev1.Pod, name string) corev1.ContainerStatus {
	for _, c := range append(pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses...) {
		if c.Name == name {
			return c
		}
	}
	return corev1.ContainerStatus{}
}

// FakeNode makes a node without a machine, named <namespace>-<name>. Only pods that
// tolerate the taint kedge.test/fake go there, so that other tests do not see it.
func (n *Node) FakeNode(t *testing.T, namespace, name string, labels map[string]string) string {
	t.Helper()
	ctx, full := context.Background(), namespace+"-"+name
	all := map[string]string{"kubernetes.io/hostname": full, "of": namespace}
	for k, v := range labels {
		all[k] = v
	}
	_, err := n.Client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: full, Labels: all},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "kedge.test/fake", Value: namespace, Effect: corev1.TaintEffectNoSchedule}}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.Client.CoreV1().Nodes().Delete(ctx, full, metav1.DeleteOptions{}) })
	report := func() error {
		status := fmt.Appendf(nil, `{"status":{"capacity":{"cpu":"4","memory":"4Gi","pods":"20"},"allocatable":{"cpu":"4","memory":"4Gi","pods":"20"},
			"conditions":[{"type":"Ready","status":"True","reason":"Fake","lastHeartbeatTime":%q}]}}`, time.Now().UTC().Format(time.RFC3339))
		_, err := n.Client.CoreV1().Nodes().Patch(ctx, full, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
		return err
	}
	if err := report(); err != nil {
		t.Fatal(err)
	}
	go func() { // or the cluster gives the node up after some time
		for report() == nil {
			time.Sleep(10 * time.Second)
		}
	}()
	// The admission taints new nodes as not ready; a controller takes that away.
	Eventually(t, 30*time.Second, func() error {
		now, err := n.Client.CoreV1().Nodes().Get(ctx, full, metav1.GetOptions{})
		if err != nil || len(now.Spec.Taints) != 1 {
			return fmt.Errorf("the node has taints %+v: %v", now.Spec.Taints, err)
		}
		return nil
	})
	return full
}

// PodsOf are the pods with the label app that are not going away, by name.
func (n *Node) PodsOf(t *testing.T, namespace, app string) map[string]corev1.Pod {
	t.Helper()
	list, err := n.Client.CoreV1().Pods(namespace).List(context.Background(), metav1.ListOptions{LabelSelector: "app=" + app})
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]corev1.Pod{}
	for _, p := range list.Items {
		if p.DeletionTimestamp == nil {
			out[p.Name] = p
		}
	}
	return out
}
