package network

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// getFrom asks from a pod.
func getFrom(n *harness.Node, namespace, pod, url string) (string, error) {
	out, err := n.TryKubectl(nil, "exec", "-n", namespace, pod, "--", "probe", "get", url)
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return strings.TrimSpace(out), err
}

// answered asks until each of the names has answered, and fails when another does.
func answered(t *testing.T, ask func() (string, error), names ...string) {
	t.Helper()
	seen := map[string]bool{}
	harness.Eventually(t, 20*time.Second, func() error {
		for range 20 {
			name, err := ask()
			if err != nil {
				return err
			}
			seen[name] = true
			if len(seen) >= len(names) {
				break
			}
		}
		for _, name := range names {
			if !seen[name] {
				return fmt.Errorf("%s has not answered, only %v", name, seen)
			}
		}
		return nil
	})
	if len(seen) > len(names) {
		t.Errorf("%v answered, want only %v", seen, names)
	}
}

func TestServiceTypes(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	pods := n.Servers(t, ns, "web", 2, "")
	n.Apply(t, ns, harness.Shell("client", "exec sleep 3600", ""))
	n.WaitPod(t, ns, "client", false)
	lb := "203.0.113.10"
	s := n.Service(t, ns, "web", "web", "type: LoadBalancer, loadBalancerClass: example.com/by-hand, externalIPs: [203.0.113.11],")
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lb}}
	if _, err := n.Client.CoreV1().Services(ns).UpdateStatus(context.Background(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	nodePort := fmt.Sprint(n.Address(t), ":", s.Spec.Ports[0].NodePort)
	for _, at := range []string{s.Spec.ClusterIP, "203.0.113.11", lb, nodePort} {
		answered(t, func() (string, error) { return n.Get("http://" + at + "/") }, "web-0", "web-1")
		answered(t, func() (string, error) { return getFrom(n, ns, "client", "http://"+at+"/") }, "web-0", "web-1")
	}
	client, err := n.Pod(ns, "client")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := getFrom(n, ns, "client", "http://"+s.Spec.ClusterIP+"/addr"); !strings.HasPrefix(got, client.Status.PodIP+":") && got != client.Status.PodIP {
		t.Errorf("through the cluster IP the server sees %q, %v, want the client's %s", got, err, client.Status.PodIP)
	}
	// A pod of a service reaches all of its pods, itself included.
	for _, p := range pods {
		answered(t, func() (string, error) { return getFrom(n, ns, p.Name, "http://"+s.Spec.ClusterIP+"/") }, "web-0", "web-1")
	}
	// A port that the service lacks is refused at once.
	if _, err := n.Get("http://" + s.Spec.ClusterIP + ":81/"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another port of the cluster IP: %v", err)
	}
	// A pod with the node's network reaches services as the node does.
	n.Apply(t, ns, harness.Shell("onhost", "exec sleep 3600", "hostNetwork: true,"))
	n.WaitPod(t, ns, "onhost", false)
	answered(t, func() (string, error) { return getFrom(n, ns, "onhost", "http://"+s.Spec.ClusterIP+"/") }, "web-0", "web-1")

	n.Kubectl(t, "delete", "pod", "-n", ns, "web-0")
	answered(t, func() (string, error) { return n.Get("http://" + s.Spec.ClusterIP + "/") }, "web-1")
	n.Kubectl(t, "delete", "pod", "-n", ns, "web-1")
	for _, at := range []string{s.Spec.ClusterIP, lb, nodePort} {
		harness.Eventually(t, 10*time.Second, func() error {
			if _, err := n.Get("http://" + at + "/"); !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("%s without endpoints: %v, want to be refused", at, err)
			}
			return nil
		})
	}
}

// TestAPIFromPods: the service "kubernetes", with the token that every pod has.
func TestAPIFromPods(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount"
	out := n.RunPod(t, ns, "client", fmt.Sprintf(`probe get https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/version "Authorization:Bearer $(cat %[1]s/token)" %[1]s/ca.crt`, dir), "")
	if !strings.Contains(out, `"gitVersion"`) {
		t.Errorf("the API answers %q", out)
	}
}
