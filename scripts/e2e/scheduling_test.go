package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// fakeNode makes a node without a machine, named <namespace>-<name>. Only pods that
// tolerate the taint kedge.test/fake go there, so that other tests do not see it.
func (n *node) fakeNode(t *testing.T, namespace, name string, labels map[string]string) string {
	t.Helper()
	ctx, full := context.Background(), namespace+"-"+name
	all := map[string]string{"kubernetes.io/hostname": full, "of": namespace}
	for k, v := range labels {
		all[k] = v
	}
	_, err := n.client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: full, Labels: all},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{{Key: "kedge.test/fake", Value: namespace, Effect: corev1.TaintEffectNoSchedule}}}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.client.CoreV1().Nodes().Delete(ctx, full, metav1.DeleteOptions{}) })
	report := func() error {
		status := fmt.Appendf(nil, `{"status":{"capacity":{"cpu":"4","memory":"4Gi","pods":"20"},"allocatable":{"cpu":"4","memory":"4Gi","pods":"20"},
			"conditions":[{"type":"Ready","status":"True","reason":"Fake","lastHeartbeatTime":%q}]}}`, time.Now().UTC().Format(time.RFC3339))
		_, err := n.client.CoreV1().Nodes().Patch(ctx, full, types.StrategicMergePatchType, status, metav1.PatchOptions{}, "status")
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
	eventually(t, 30*time.Second, func() error {
		now, err := n.client.CoreV1().Nodes().Get(ctx, full, metav1.GetOptions{})
		if err != nil || len(now.Spec.Taints) != 1 {
			return fmt.Errorf("the node has taints %+v: %v", now.Spec.Taints, err)
		}
		return nil
	})
	return full
}

// place makes a pod for fake nodes: it is placed there and never runs.
func (n *node) place(t *testing.T, namespace, name, spec string) {
	t.Helper()
	n.apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {app: %s, set: x}}, spec: {terminationGracePeriodSeconds: 0, containers: [{name: main, image: %q}], %s}}`, name, name, busybox, spec))
}

// placed waits until the pod has a node, and returns its name.
func (n *node) placed(t *testing.T, namespace, name string) (where string) {
	t.Helper()
	eventually(t, 30*time.Second, func() error {
		pod, err := n.pod(namespace, name)
		if err != nil || pod.Spec.NodeName == "" {
			return fmt.Errorf("pod %s is not placed: %v", name, err)
		}
		where = pod.Spec.NodeName
		return nil
	})
	return where
}

func TestSchedulingConstraints(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	a := n.fakeNode(t, ns, "a", map[string]string{"zone": "one", "disk": "fast", "size": "5"})
	b := n.fakeNode(t, ns, "b", map[string]string{"zone": "two", "size": "7"})
	n.kubectl(t, "taint", "node", b, "special=yes:NoSchedule")
	fake := fmt.Sprintf("{key: kedge.test/fake, value: %s, effect: NoSchedule}", ns)
	tolerate := "tolerations: [" + fake + "],"
	both := "tolerations: [" + fake + ", {key: special, operator: Exists}],"
	mine := "nodeSelector: {of: " + ns + "},"
	terms := func(expression string) string {
		return fmt.Sprintf("affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [{matchExpressions: [{key: of, operator: In, values: [%s]}, %s]}]}}},", ns, expression)
	}
	pods := func(kind, app string) string {
		return fmt.Sprintf("affinity: {%s: {requiredDuringSchedulingIgnoredDuringExecution: [{topologyKey: zone, labelSelector: {matchLabels: {app: %s}}}]}},", kind, app)
	}
	for _, c := range []struct{ name, spec, where, refusal string }{ // where is empty for a pod that fits nowhere
		{"selector", tolerate + "nodeSelector: {of: " + ns + ", disk: fast}", a, ""},
		{"selector-of-nothing", both + "nodeSelector: {of: " + ns + ", disk: slow}", "", "didn't match Pod's node affinity/selector"},
		{"taint-not-tolerated", tolerate + "nodeSelector: {of: " + ns + ", zone: two}", "", "had untolerated taint"},
		{"taint-tolerated", both + "nodeSelector: {of: " + ns + ", zone: two}", b, ""},
		{"without-any-toleration", mine, "", "had untolerated taint"},
		{"affinity-greater-than", both + terms("{key: size, operator: Gt, values: ['6']}"), b, ""},
		{"affinity-does-not-exist", both + terms("{key: disk, operator: DoesNotExist}"), b, ""},
		{"preferred", both + mine + "affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: zone, operator: In, values: [two]}]}}]}}", b, ""},
		{"anchor", tolerate + "nodeSelector: {of: " + ns + ", zone: one}", a, ""},
		{"beside-the-anchor", both + mine + pods("podAffinity", "anchor"), a, ""},
		{"away-from-the-anchor", both + mine + pods("podAntiAffinity", "anchor"), b, ""},
		{"too-big", both + mine + "resources: {requests: {cpu: 5}}", "", "Insufficient cpu"},
	} {
		n.place(t, ns, c.name, c.spec)
		if c.where == "" {
			n.waitEvent(t, ns, c.name, "FailedScheduling", c.refusal)
		} else if got := n.placed(t, ns, c.name); got != c.where {
			t.Errorf("%s was placed on %s, want %s", c.name, got, c.where)
		}
	}
	// A taint NoExecute ends pods that do not tolerate it.
	n.kubectl(t, "taint", "node", a, "leave=now:NoExecute")
	n.gone(t, ns, "anchor")
}

func TestTopologySpread(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	for i, zone := range []string{"one", "one", "two"} {
		n.fakeNode(t, ns, fmt.Sprint("n", i), map[string]string{"zone": zone})
	}
	spread := fmt.Sprintf(`nodeSelector: {of: %s}, tolerations: [{key: kedge.test/fake, value: %s}], topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {set: x}}}]`, ns, ns)
	zones := map[string]int{}
	for i := range 6 {
		name := fmt.Sprint("p", i)
		n.place(t, ns, name, spread)
		object, err := n.client.CoreV1().Nodes().Get(context.Background(), n.placed(t, ns, name), metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		zones[object.Labels["zone"]]++
	}
	if zones["one"] != 3 || zones["two"] != 3 { // and not 4 and 2, as nodes are
		t.Errorf("zones have %v", zones)
	}
}

// TestPreemption lets real containers compete for a resource that the test invents.
func TestPreemption(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	ctx := context.Background()
	const slot = "kedge.test~1slot"
	if _, err := n.client.CoreV1().Nodes().Patch(ctx, n.name, types.JSONPatchType, []byte(`[{"op":"add","path":"/status/capacity/`+slot+`","value":"1"}]`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = n.client.CoreV1().Nodes().Patch(ctx, n.name, types.JSONPatchType, []byte(`[{"op":"remove","path":"/status/capacity/`+slot+`"}]`), metav1.PatchOptions{}, "status")
		n.tryKubectl(nil, "delete", "priorityclass", ns+"-low", ns+"-high", ns+"-meek")
	})
	n.apply(t, ns, fmt.Sprintf(`
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-low}, value: 10}
---
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-high}, value: 1000}
---
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-meek}, value: 1000, preemptionPolicy: Never}`, ns, ns, ns))
	pod := func(name, class string) {
		n.apply(t, ns, shellWith(name, "exec sleep 3600", "priorityClassName: "+ns+"-"+class+",", "resources: {limits: {kedge.test/slot: 1}},"))
	}
	pod("low", "low")
	n.waitPod(t, ns, "low", false)
	pod("meek", "meek")
	n.waitEvent(t, ns, "meek", "FailedScheduling", "Insufficient kedge.test/slot")
	if p, err := n.pod(ns, "low"); err != nil || p.DeletionTimestamp != nil {
		t.Errorf("a pod whose class never pre-empts has done so: %v", err)
	}
	n.kubectl(t, "delete", "pod", "-n", ns, "meek", "--wait")
	pod("high", "high")
	n.waitEvent(t, ns, "low", "Preempted", "")
	n.gone(t, ns, "low")
	n.waitPod(t, ns, "high", false)
}
