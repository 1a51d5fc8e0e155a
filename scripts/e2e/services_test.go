package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// servers starts pods NAME-0, NAME-1 ... with the label app=NAME that answer with
// their names at "/" and with the caller's address at "/addr", port 8080.
func (n *node) servers(t *testing.T, namespace, name string, count int, more string) []*corev1.Pod {
	t.Helper()
	for i := range count {
		n.apply(t, namespace, n.server(name, i, more))
	}
	var pods []*corev1.Pod
	for i := range count {
		pods = append(pods, n.waitPod(t, namespace, fmt.Sprint(name, "-", i), false))
	}
	return pods
}

func (n *node) server(name string, i int, more string) string {
	return fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: %s-%d, labels: {app: %s}}, spec: {terminationGracePeriodSeconds: 1, %s containers: [{name: main, image: %q,
		command: [probe, serve, ":8080", %s-%d], readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}}]}}`,
		name, i, name, more, busybox, name, i)
}

// service creates one for the pods with the label app=NAME and returns it, with
// its addresses. Fields end with a comma.
func (n *node) service(t *testing.T, namespace, name, app, fields string) *corev1.Service {
	t.Helper()
	n.apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, %s ports: [{port: 80, targetPort: 8080}]}}`, name, app, fields))
	s, err := n.client.CoreV1().Services(namespace).Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// get asks by connections of dial and returns the answer, without spaces around it. An
// answer that says that something is wrong is an error.
func get(url string, timeout time.Duration, dial func(ctx context.Context, network, address string) (net.Conn, error)) (string, error) {
	client := http.Client{Timeout: timeout, Transport: &http.Transport{DisableKeepAlives: true, DialContext: dial}}
	resp, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode >= 400 && err == nil {
		err = fmt.Errorf("%s: %s", resp.Status, body)
	}
	return strings.TrimSpace(string(body)), err
}

// get asks from the node itself, as processes on it do.
func (n *node) get(url string) (string, error) {
	return get(url, 2*time.Second, func(_ context.Context, network, address string) (conn net.Conn, err error) {
		err = n.inside(func() (err error) {
			conn, err = net.DialTimeout(network, address, 2*time.Second)
			return err
		})
		return conn, err
	})
}

// getFrom asks from a pod.
func (n *node) getFrom(namespace, pod, url string) (string, error) {
	out, err := n.tryKubectl(nil, "exec", "-n", namespace, pod, "--", "probe", "get", url)
	if err != nil {
		err = fmt.Errorf("%w: %s", err, out)
	}
	return strings.TrimSpace(out), err
}

// answered asks until each of the names has answered, and fails when another does.
func answered(t *testing.T, ask func() (string, error), names ...string) {
	t.Helper()
	seen := map[string]bool{}
	eventually(t, 20*time.Second, func() error {
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
	n := shared(t)
	ns := n.namespace(t)
	pods := n.servers(t, ns, "web", 2, "")
	n.apply(t, ns, shell("client", "exec sleep 3600", ""))
	n.waitPod(t, ns, "client", false)
	lb := "203.0.113.10"
	s := n.service(t, ns, "web", "web", "type: LoadBalancer, loadBalancerClass: example.com/by-hand, externalIPs: [203.0.113.11],")
	s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{{IP: lb}}
	if _, err := n.client.CoreV1().Services(ns).UpdateStatus(context.Background(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	nodePort := fmt.Sprint(n.address(t), ":", s.Spec.Ports[0].NodePort)
	for _, at := range []string{s.Spec.ClusterIP, "203.0.113.11", lb, nodePort} {
		answered(t, func() (string, error) { return n.get("http://" + at + "/") }, "web-0", "web-1")
		answered(t, func() (string, error) { return n.getFrom(ns, "client", "http://"+at+"/") }, "web-0", "web-1")
	}
	client, err := n.pod(ns, "client")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := n.getFrom(ns, "client", "http://"+s.Spec.ClusterIP+"/addr"); !strings.HasPrefix(got, client.Status.PodIP+":") && got != client.Status.PodIP {
		t.Errorf("through the cluster IP the server sees %q, %v, want the client's %s", got, err, client.Status.PodIP)
	}
	// A pod of a service reaches all of its pods, itself included.
	for _, p := range pods {
		answered(t, func() (string, error) { return n.getFrom(ns, p.Name, "http://"+s.Spec.ClusterIP+"/") }, "web-0", "web-1")
	}
	// A port that the service lacks is refused at once.
	if _, err := n.get("http://" + s.Spec.ClusterIP + ":81/"); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("another port of the cluster IP: %v", err)
	}
	// A pod with the node's network reaches services as the node does.
	n.apply(t, ns, shell("onhost", "exec sleep 3600", "hostNetwork: true,"))
	n.waitPod(t, ns, "onhost", false)
	answered(t, func() (string, error) { return n.getFrom(ns, "onhost", "http://"+s.Spec.ClusterIP+"/") }, "web-0", "web-1")

	n.kubectl(t, "delete", "pod", "-n", ns, "web-0")
	answered(t, func() (string, error) { return n.get("http://" + s.Spec.ClusterIP + "/") }, "web-1")
	n.kubectl(t, "delete", "pod", "-n", ns, "web-1")
	for _, at := range []string{s.Spec.ClusterIP, lb, nodePort} {
		eventually(t, 10*time.Second, func() error {
			if _, err := n.get("http://" + at + "/"); !errors.Is(err, syscall.ECONNREFUSED) {
				return fmt.Errorf("%s without endpoints: %v, want to be refused", at, err)
			}
			return nil
		})
	}
}

// TestAPIFromPods: the service "kubernetes", with the token that every pod has.
func TestAPIFromPods(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount"
	out := n.runPod(t, ns, "client", fmt.Sprintf(`probe get https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/version "Authorization:Bearer $(cat %[1]s/token)" %[1]s/ca.crt`, dir), "")
	if !strings.Contains(out, `"gitVersion"`) {
		t.Errorf("the API answers %q", out)
	}
}
