package workloads

import (
	"fmt"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"kedge/scripts/e2e/harness"
)

// waitGone waits until there is no such pod.
func waitGone(t *testing.T, n *harness.Node, namespace, name string) {
	t.Helper()
	harness.Eventually(t, 40*time.Second, func() error {
		pod, err := n.Pod(namespace, name)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("pod %s is still %s: %v", name, pod.Status.Phase, err)
	})
}

func TestPodHasAddressRouteAndDNSConfiguration(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	out := n.RunPod(t, ns, "net", "ip -4 addr show eth0; ip route; cat /etc/resolv.conf; hostname", "")
	pod, err := n.Pod(ns, "net")
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
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("server", "exec probe serve :8080 works", ""))
	ip := n.WaitPod(t, ns, "server", false).Status.PodIP
	out := n.RunPod(t, ns, "client", "probe get http://"+ip+":8080/", "")
	if strings.TrimSpace(out) != "works" {
		t.Errorf("got %q", out)
	}
}
