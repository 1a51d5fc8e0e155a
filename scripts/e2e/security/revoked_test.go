package security

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/scripts/e2e/harness"
)

// TestNodeRemoved: an agent that an operator removes is out at once: its watches end, its
// certificates are refused by the API, its tunnel is closed, and its node does not come back.
// Its name is free for another machine.
func TestNodeRemoved(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.StartAgent(t)
	if out, err := f.TryKedge("node", "remove", "nobody"); err == nil || !strings.Contains(out, "does not know this node") {
		t.Errorf("a node that there is not: %v, %s", err, out)
	}
	if out, err := f.TryKedge("node", "remove", f.Name); err == nil || !strings.Contains(out, "kedge server remove") {
		t.Errorf("a server's node: %v, %s", err, out)
	}
	for _, command := range []string{"node remove " + f.Name, "kubeconfig ls", "kubeconfig create anna", "kubeconfig revoke anna"} {
		if out, err := a.TryKedge(strings.Fields(command)...); err == nil || out != "kedge: this machine is an agent; run the command on a server\n" {
			t.Errorf("%s on an agent: %v, %s", command, err, out)
		}
	}

	dir := filepath.Join(a.DataDir(), "agent")
	clients := map[string]*kubernetes.Clientset{}
	for who, cert := range map[string]string{"node": "node.crt", "network": "network.crt"} {
		c, err := kubernetes.NewForConfig(&rest.Config{Host: f.URL(), QPS: -1, Dial: f.Config.Dial, TLSClientConfig: rest.TLSClientConfig{
			CAFile: filepath.Join(dir, "server-ca.crt"), CertFile: filepath.Join(dir, cert), KeyFile: filepath.Join(dir, "node.key"),
		}})
		if err != nil {
			t.Fatal(err)
		}
		clients[who] = c
	}
	watch, err := clients["network"].CoreV1().Services("").Watch(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()

	begin := time.Now()
	f.Kedge(t, "node", "remove", a.Name)
	for open := true; open; {
		select {
		case _, open = <-watch.ResultChan():
		case <-time.After(harness.Patient(5 * time.Second)):
			t.Fatal("the watch of a removed node goes on")
		}
	}
	t.Logf("its watch ended %s after the command began", time.Since(begin).Round(time.Millisecond))
	ctx := context.Background()
	if _, err := clients["node"].CoreV1().Nodes().Get(ctx, a.Name, metav1.GetOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("its kubelet reads its node: %v", err)
	}
	if _, err := clients["network"].CoreV1().Services("").List(ctx, metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("its network lists services: %v", err)
	}
	harness.Eventually(t, 10*time.Second, func() error {
		if log := f.Tail(200); !strings.Contains(log, "a node's tunnel has ended") {
			return fmt.Errorf("its tunnel is open:\n%s", log)
		}
		return nil
	})
	// The kubelet would register again within its next reports.
	for range 15 {
		time.Sleep(time.Second)
		if _, err := f.Client.CoreV1().Nodes().Get(ctx, a.Name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
			t.Fatalf("its node is back: %v", err)
		}
	}

	b := f.NewAgent(t, "--token="+f.NewToken(t), "--node-name="+a.Name)
	if err := harness.PrepareImages(b.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := b.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error { return f.NodeIsReady(a.Name) })
	if _, err := clients["node"].CoreV1().Nodes().Get(ctx, a.Name, metav1.GetOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("the old key has the name again: %v", err)
	}
}
