package workloads

import (
	"context"
	"fmt"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"kedge/scripts/e2e/harness"
)

// placePod makes a pod for fake nodes: it is placed there and never runs.
func placePod(t *testing.T, n *harness.Node, namespace, name, spec string) {
	t.Helper()
	n.Apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s, labels: {app: %s, set: x}}, spec: {terminationGracePeriodSeconds: 0, containers: [{name: main, image: %q}], %s}}`, name, name, harness.Busybox, spec))
}

// placedOn waits until the pod has a node, and returns its name.
func placedOn(t *testing.T, n *harness.Node, namespace, name string) (where string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		pod, err := n.Pod(namespace, name)
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
	n := harness.Shared(t)
	ns := n.Namespace(t)
	a := n.FakeNode(t, ns, "a", map[string]string{"zone": "one", "disk": "fast", "size": "5"})
	b := n.FakeNode(t, ns, "b", map[string]string{"zone": "two", "size": "7"})
	n.Kubectl(t, "taint", "node", b, "special=yes:NoSchedule")
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
		placePod(t, n, ns, c.name, c.spec)
		if c.where == "" {
			n.WaitEvent(t, ns, c.name, "FailedScheduling", c.refusal)
		} else if got := placedOn(t, n, ns, c.name); got != c.where {
			t.Errorf("%s was placed on %s, want %s", c.name, got, c.where)
		}
	}
	// A taint NoExecute ends pods that do not tolerate it.
	n.Kubectl(t, "taint", "node", a, "leave=now:NoExecute")
	waitGone(t, n, ns, "anchor")
}

func TestTopologySpread(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	for i, zone := range []string{"one", "one", "two"} {
		n.FakeNode(t, ns, fmt.Sprint("n", i), map[string]string{"zone": zone})
	}
	spread := fmt.Sprintf(`nodeSelector: {of: %s}, tolerations: [{key: kedge.test/fake, value: %s}], topologySpreadConstraints: [{maxSkew: 1, topologyKey: zone, whenUnsatisfiable: DoNotSchedule, labelSelector: {matchLabels: {set: x}}}]`, ns, ns)
	zones := map[string]int{}
	for i := range 6 {
		name := fmt.Sprint("p", i)
		placePod(t, n, ns, name, spread)
		object, err := n.Client.CoreV1().Nodes().Get(context.Background(), placedOn(t, n, ns, name), metav1.GetOptions{})
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
	n := harness.Shared(t)
	ns := n.Namespace(t)
	ctx := context.Background()
	const slot = "kedge.test~1slot"
	if _, err := n.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.JSONPatchType, []byte(`[{"op":"add","path":"/status/capacity/`+slot+`","value":"1"}]`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = n.Client.CoreV1().Nodes().Patch(ctx, n.Name, types.JSONPatchType, []byte(`[{"op":"remove","path":"/status/capacity/`+slot+`"}]`), metav1.PatchOptions{}, "status")
		n.TryKubectl(nil, "delete", "priorityclass", ns+"-low", ns+"-high", ns+"-meek")
	})
	n.Apply(t, ns, fmt.Sprintf(`
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-low}, value: 10}
---
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-high}, value: 1000}
---
{apiVersion: scheduling.k8s.io/v1, kind: PriorityClass, metadata: {name: %s-meek}, value: 1000, preemptionPolicy: Never}`, ns, ns, ns))
	pod := func(name, class string) {
		n.Apply(t, ns, harness.ShellWith(name, "exec sleep 3600", "priorityClassName: "+ns+"-"+class+",", "resources: {limits: {kedge.test/slot: 1}},"))
	}
	pod("low", "low")
	n.WaitPod(t, ns, "low", false)
	pod("meek", "meek")
	n.WaitEvent(t, ns, "meek", "FailedScheduling", "Insufficient kedge.test/slot")
	if p, err := n.Pod(ns, "low"); err != nil || p.DeletionTimestamp != nil {
		t.Errorf("a pod whose class never pre-empts has done so: %v", err)
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, "meek", "--wait")
	pod("high", "high")
	n.WaitEvent(t, ns, "low", "Preempted", "")
	waitGone(t, n, ns, "low")
	n.WaitPod(t, ns, "high", false)
}
