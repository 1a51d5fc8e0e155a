package e2e

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
)

// TestTwoNodesOnOneMachine: each is a cluster of its own, and the end of one is
// nothing to the other.
func TestTwoNodesOnOneMachine(t *testing.T) {
	t.Parallel()
	one, two := own(t), own(t)
	two.name = one.name + "-b" // told apart although one name begins with the other
	var spaces []string
	for _, n := range []*node{one, two} {
		if err := prepareImages(n.dataDir()); err != nil {
			t.Fatal(err)
		}
		if err := n.launch(); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []*node{one, two} {
		if err := n.waitReady(90 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	var urls []string
	for _, n := range []*node{one, two} {
		ns := n.namespace(t)
		spaces = append(spaces, ns)
		n.apply(t, ns, shell("web", "exec probe serve :8080 this-is-"+n.name+".", ""))
		urls = append(urls, "http://"+n.waitPod(t, ns, "web", false).Status.PodIP+":8080/")
	}
	both := func() error {
		for i, n := range []*node{one, two} {
			if err := answers(urls[i], "this-is-"+n.name+"."); err != nil {
				return err
			}
		}
		return nil
	}
	eventually(t, 20*time.Second, both) // a container that runs need not listen yet
	for i, n := range []*node{one, two} {
		list, err := n.client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{})
		if err != nil || len(list.Items) != 1 || list.Items[0].Name != n.name {
			t.Errorf("%s knows the nodes %v, %v", n.name, list.Items, err)
		}
		if got := n.runPod(t, spaces[i], "client", "probe get "+urls[i], ""); !strings.HasPrefix(got, "this-is-"+n.name+".") {
			t.Errorf("inside %s the pod answers %q", n.name, got)
		}
	}
	before := processes(two.dataDir() + "/runtime/")
	one.stop(t, syscall.SIGTERM, 10*time.Second)
	if err := both(); err != nil {
		t.Errorf("with one stopped: %v", err)
	}
	if out, err := one.command("killall"); err != nil {
		t.Fatalf("killall: %v\n%s", err, out)
	}
	if err := one.leftovers(); err != nil {
		t.Error(err)
	}
	if err := answers(urls[1], "this-is-"+two.name+"."); err != nil {
		t.Errorf("after killall of the other: %v", err)
	}
	if now := processes(two.dataDir() + "/runtime/"); len(now) != len(before) {
		t.Errorf("after killall of the other there are shims %v, there were %v", now, before)
	}
	if got := two.runPod(t, spaces[1], "after", "probe get "+urls[1], ""); !strings.HasPrefix(got, "this-is-"+two.name+".") {
		t.Errorf("after killall of the other a new pod gets %q", got)
	}
	if out, err := two.run("status", "--run-dir="+two.runDir()); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := two.command("killall"); err == nil || !strings.Contains(out, "the data directory is in use") {
		t.Errorf("killall of a running node: %v\n%s", err, out)
	}
	if err := answers(urls[1], "this-is-"+two.name+"."); err != nil {
		t.Errorf("after a killall that was refused: %v", err)
	}
}

// TestDisableAgent: a control plane without a node.
func TestDisableAgent(t *testing.T) {
	t.Parallel()
	n := own(t, "--disable-agent")
	if err := n.start(); err != nil {
		t.Fatal(err)
	}
	out, err := n.run("status", "--run-dir="+n.runDir())
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
	n.namespace(t)
	if list, err := n.client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{}); err != nil || len(list.Items) > 0 {
		t.Errorf("nodes %v, %v", list, err)
	}
	if l, err := net.Listen("tcp", fmt.Sprint(":", n.apiPort+1)); err != nil {
		t.Errorf("the kubelet's port is taken: %v", err)
	} else {
		l.Close()
	}
	for _, path := range []string{"containerd", "kubelet", "cni"} {
		if _, err := os.Stat(filepath.Join(n.dataDir(), path)); err == nil {
			t.Errorf("there is a folder %s", path)
		}
	}
	n.stop(t, syscall.SIGTERM, 10*time.Second)
	if err := n.leftovers(); err != nil {
		t.Error(err)
	}
}
