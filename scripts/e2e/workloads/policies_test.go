package workloads

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// refusalOf creates what the manifest says and returns the API's refusal.
func refusalOf(t *testing.T, n *harness.Node, namespace, manifest string) string {
	t.Helper()
	out, err := n.TryKubectl(strings.NewReader(manifest), "create", "-n", namespace, "-f", "-")
	if err == nil {
		t.Fatalf("not refused: %s", manifest)
	}
	return out
}

func TestResourceQuota(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: ResourceQuota, metadata: {name: q}, spec: {hard: {pods: 2, requests.cpu: 100m, configmaps: 10}}}`)
	used := func(resource corev1.ResourceName, want string) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, func() error {
			q, err := n.Client.CoreV1().ResourceQuotas(ns).Get(context.Background(), "q", metav1.GetOptions{})
			if err != nil {
				return err
			}
			got := q.Status.Used[resource]
			if _, ok := q.Status.Used[resource]; !ok || got.String() != want {
				return fmt.Errorf("%s used is %s, want %s", resource, got.String(), want)
			}
			return nil
		})
	}
	used(corev1.ResourcePods, "0")
	cpu := func(request string) string { return "resources: {requests: {cpu: " + request + "}}," }
	n.Apply(t, ns, harness.ShellWith("one", "exec sleep 3600", "", cpu("60m")))
	used("requests.cpu", "60m")
	if out := refusalOf(t, n, ns, harness.ShellWith("two", "true", "", cpu("60m"))); !strings.Contains(out, "exceeded quota: q, requested: requests.cpu=60m, used: requests.cpu=60m, limited: requests.cpu=100m") {
		t.Errorf("refused with %s", out)
	}
	if out := refusalOf(t, n, ns, harness.Shell("two", "true", "")); !strings.Contains(out, "must specify requests.cpu") {
		t.Errorf("refused with %s", out)
	}
	n.Kubectl(t, "delete", "pod", "-n", ns, "one", "--wait")
	used("requests.cpu", "0")
	n.Apply(t, ns, harness.ShellWith("two", "true", "", cpu("60m")))
}

func TestLimitRange(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: LimitRange, metadata: {name: l}, spec: {limits: [{type: Container, default: {memory: 96Mi}, defaultRequest: {memory: 48Mi}, max: {memory: 128Mi}}]}}`)
	n.Apply(t, ns, harness.Shell("plain", "exec sleep 3600", ""))
	pod := n.WaitPod(t, ns, "plain", false)
	r := pod.Spec.Containers[0].Resources
	if r.Limits.Memory().String() != "96Mi" || r.Requests.Memory().String() != "48Mi" {
		t.Errorf("resources are %+v", r)
	}
	file := "memory.limit_in_bytes"
	if unified() {
		file = "memory.max"
	}
	if got := harness.FileContent(cgroupOf(t, n, "memory", containerID(pod, "main")), file); got != "100663296" {
		t.Errorf("the kernel's limit is %s", got)
	}
	if out := refusalOf(t, n, ns, harness.ShellWith("big", "true", "", "resources: {limits: {memory: 256Mi}},")); !strings.Contains(out, "maximum memory usage per Container is 128Mi, but limit is 256Mi") {
		t.Errorf("refused with %s", out)
	}
}

func TestPodDisruptionBudget(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: policy/v1, kind: PodDisruptionBudget, metadata: {name: b}, spec: {minAvailable: 1, selector: {matchLabels: {role: kept}}}}`)
	for _, name := range []string{"a", "b"} {
		n.Apply(t, ns, strings.Replace(harness.Shell(name, "exec sleep 3600", ""), "labels: {", "labels: {role: kept, ", 1))
	}
	for _, name := range []string{"a", "b"} {
		n.WaitPod(t, ns, name, false)
	}
	evict := func(name string) error {
		return n.Client.PolicyV1().Evictions(ns).Evict(context.Background(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: ns}})
	}
	harness.Eventually(t, 20*time.Second, func() error {
		b, err := n.Client.PolicyV1().PodDisruptionBudgets(ns).Get(context.Background(), "b", metav1.GetOptions{})
		if err != nil || b.Status.DisruptionsAllowed != 1 {
			return fmt.Errorf("the budget allows %d: %v", b.Status.DisruptionsAllowed, err)
		}
		return nil
	})
	if err := evict("a"); err != nil {
		t.Fatal(err)
	}
	waitGone(t, n, ns, "a")
	if err := evict("b"); !apierrors.IsTooManyRequests(err) || !strings.Contains(err.Error(), "disruption budget") {
		t.Errorf("the eviction of the last one: %v", err)
	}
	if pod, err := n.Pod(ns, "b"); err != nil || pod.DeletionTimestamp != nil {
		t.Errorf("the last one is being deleted: %v", err)
	}
}

func TestPodSecurityAdmission(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Kubectl(t, "label", "namespace", ns, "pod-security.kubernetes.io/enforce=restricted")
	if out := refusalOf(t, n, ns, harness.Shell("loose", "true", "")); !strings.Contains(out, `violates PodSecurity "restricted:latest"`) {
		t.Errorf("refused with %s", out)
	}
	n.RunPodWith(t, ns, "strict", "id", "", "securityContext: {allowPrivilegeEscalation: false, runAsNonRoot: true, runAsUser: 1000, capabilities: {drop: [ALL]}, seccompProfile: {type: RuntimeDefault}},")
}
