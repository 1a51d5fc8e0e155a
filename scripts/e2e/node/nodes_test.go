package node

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestTwoNodesOnOneMachine: each is a cluster of its own, and the end of one is
// nothing to the other.
func TestTwoNodesOnOneMachine(t *testing.T) {
	t.Parallel()
	one, two := harness.Own(t), harness.Own(t)
	two.Name = one.Name + "-b" // told apart although one name begins with the other
	var spaces []string
	for _, n := range []*harness.Node{one, two} {
		if err := harness.PrepareImages(n.DataDir()); err != nil {
			t.Fatal(err)
		}
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []*harness.Node{one, two} {
		if err := n.WaitReady(90 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	var urls []string
	for _, n := range []*harness.Node{one, two} {
		ns := n.Namespace(t)
		spaces = append(spaces, ns)
		n.Apply(t, ns, harness.Shell("web", "exec probe serve :8080 this-is-"+n.Name+".", ""))
		urls = append(urls, "http://"+n.WaitPod(t, ns, "web", false).Status.PodIP+":8080/")
	}
	both := func() error {
		for i, n := range []*harness.Node{one, two} {
			if err := harness.CheckAnswer(urls[i], "this-is-"+n.Name+"."); err != nil {
				return err
			}
		}
		return nil
	}
	harness.Eventually(t, 20*time.Second, both) // a container that runs need not listen yet
	for i, n := range []*harness.Node{one, two} {
		list, err := n.Client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 1 || list.Items[0].Name != n.Name {
			t.Errorf("%s knows the nodes %v, %v", n.Name, list.Items, err)
		}
		if got := n.RunPod(t, spaces[i], "client", "probe get "+urls[i], ""); !strings.HasPrefix(got, "this-is-"+n.Name+".") {
			t.Errorf("inside %s the pod answers %q", n.Name, got)
		}
	}
	before := harness.Processes(two.DataDir() + "/runtime/")
	one.Stop(t, syscall.SIGTERM, 10*time.Second)
	if err := both(); err != nil {
		t.Errorf("with one stopped: %v", err)
	}
	if out, err := one.Command("killall"); err != nil {
		t.Fatalf("killall: %v\n%s", err, out)
	}
	if err := one.Leftovers(); err != nil {
		t.Error(err)
	}
	if err := harness.CheckAnswer(urls[1], "this-is-"+two.Name+"."); err != nil {
		t.Errorf("after killall of the other: %v", err)
	}
	if now := harness.Processes(two.DataDir() + "/runtime/"); len(now) != len(before) {
		t.Errorf("after killall of the other there are shims %v, there were %v", now, before)
	}
	if got := two.RunPod(t, spaces[1], "after", "probe get "+urls[1], ""); !strings.HasPrefix(got, "this-is-"+two.Name+".") {
		t.Errorf("after killall of the other a new pod gets %q", got)
	}
	if out, err := two.Run("status", "--run-dir="+two.RunDir()); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := two.Command("killall"); err == nil || !strings.Contains(out, "the data directory is in use") {
		t.Errorf("killall of a running node: %v\n%s", err, out)
	}
	if err := harness.CheckAnswer(urls[1], "this-is-"+two.Name+"."); err != nil {
		t.Errorf("after a killall that was refused: %v", err)
	}
}

// TestDisableAgent: a control plane without a node.
func TestDisableAgent(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--disable-agent")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	out, err := n.Run("status", "--run-dir="+n.RunDir())
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, part := range []string{"kubelet", "containerd", "network", "images", "registration"} {
		if strings.Contains(out, "\n"+part+" ") {
			t.Errorf("%s runs:\n%s", part, out)
		}
	}
	for _, part := range []string{"control", "datastore", "api", "controllers", "scheduler"} {
		if !strings.Contains(out, "\n"+part+" ") {
			t.Errorf("%s does not run:\n%s", part, out)
		}
	}
	n.Namespace(t)
	if list, err := n.Client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{}); err != nil || len(list.Items) > 0 {
		t.Errorf("nodes %v, %v", list, err)
	}
	if l, err := net.Listen("tcp", fmt.Sprint(":", n.APIPort+1)); err != nil {
		t.Errorf("the kubelet's port is taken: %v", err)
	} else {
		l.Close()
	}
	for _, path := range []string{"containerd", "kubelet", "cni"} {
		if _, err := os.Stat(filepath.Join(n.DataDir(), path)); err == nil {
			t.Errorf("there is a folder %s", path)
		}
	}
	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	if err := n.Leftovers(); err != nil {
		t.Error(err)
	}
}
