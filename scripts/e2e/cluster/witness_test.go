package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// newWitness is [newServer] for a witness.
func newWitness(t *testing.T, f *harness.Fleet) *harness.Node {
	t.Helper()
	w := newServer(t, f)
	w.Witness = true
	w.Flags = []string{"--server=" + f.URL(), "--token=" + f.WitnessToken(t)}
	return w
}

// TestWitness: a cluster of two servers and a witness goes on when the server that leads is killed. The witness gets none of
// the cluster's keys, is no server for agents, has no node, and is removed like a server.
func TestWitness(t *testing.T) {
	f := harness.NewFleet(t, "--disable-agent")
	second, w := newServer(t, f), newWitness(t, f)
	second.Flags = append(second.Flags, "--disable-agent")
	for _, n := range []*harness.Node{second, w} {
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}
	harness.Eventually(t, 30*time.Second, func() error {
		list := serverList(t, f.Node)
		if len(list) != 3 || list[w.Name] != [2]string{"witness", "reachable"} || strings.Contains(fmt.Sprint(list), "learner") {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	if list := serverList(t, w); len(list) != 3 {
		t.Errorf("the witness lists %v", list)
	}
	t.Run("has no keys", func(t *testing.T) {
		var keys []string
		if err := filepath.WalkDir(w.DataDir(), func(path string, d os.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".key") {
				keys = append(keys, d.Name())
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if fmt.Sprint(keys) != "[node.key]" {
			t.Errorf("the witness has the keys %v, want its own only", keys)
		}
		if _, err := os.Stat(filepath.Join(w.DataDir(), "server")); err == nil {
			t.Error("the witness has a server's directory")
		}
	})
	t.Run("is no server", func(t *testing.T) {
		slice, err := f.Client.DiscoveryV1().EndpointSlices("default").Get(context.Background(), "kubernetes", metav1.GetOptions{})
		if err != nil || len(slice.Endpoints) > 2 {
			t.Errorf("endpoints %v, %v", slice.Endpoints, err)
		}
		nodes, err := f.Client.CoreV1().Nodes().List(context.Background(), metav1.ListOptions{})
		if err != nil || len(nodes.Items) != 0 {
			t.Errorf("%d nodes, %v", len(nodes.Items), err)
		}
		for _, args := range [][]string{{"token", "create"}, {"snapshot", "save"}, {"secrets-encrypt", "status"}} {
			if out, err := w.TryKedge(args...); err == nil || !strings.Contains(out, "this machine is a witness; run the command on a server") {
				t.Errorf("kedge %v: %v\n%s", args, err, out)
			}
		}
		if out, err := f.TryKedge("node", "remove", w.Name); err == nil || !strings.Contains(out, "kedge server remove "+w.Name) {
			t.Errorf("its removal as a node: %v\n%s", err, out)
		}
		if out, err := f.TryKedge("secrets-encrypt", "rotate"); err != nil {
			t.Errorf("a change that every server confirms: %v\n%s", err, out)
		}
	})
	t.Run("failover", func(t *testing.T) {
		create := func(n *harness.Node, name string) error {
			_, err := n.Client.CoreV1().ConfigMaps("default").Create(context.Background(), &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
			return err
		}
		if err := create(f.Node, "before"); err != nil {
			t.Fatal(err)
		}
		f.Stop(t, syscall.SIGKILL, 10*time.Second)
		harness.Eventually(t, 30*time.Second, func() error { return create(second, "after") })
		if _, err := second.Client.CoreV1().ConfigMaps("default").Get(context.Background(), "before", metav1.GetOptions{}); err != nil {
			t.Errorf("what was acknowledged before the kill: %v", err)
		}
		harness.Eventually(t, 30*time.Second, func() error {
			if list := serverList(t, second); list[second.Name][0] != "leader" {
				return fmt.Errorf("the servers are %v", list)
			}
			return nil
		})
		if err := f.Start(); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("starts again", func(t *testing.T) {
		w.Stop(t, syscall.SIGTERM, 10*time.Second)
		flags := w.Flags
		w.Flags, w.Witness = []string{"--disable-agent"}, false
		if told := w.Refusal(t); !strings.Contains(told, "is the data directory of a witness") {
			t.Errorf("a start without --witness: %s", told)
		}
		w.Flags, w.Witness = nil, true // neither server nor token
		if err := w.Start(); err != nil {
			t.Fatal(err)
		}
		w.Flags = flags
		if out, err := w.TryKedge("certificate", "rotate"); err != nil {
			t.Errorf("certificate rotate: %v\n%s", err, out)
		}
	})
	t.Run("removal", func(t *testing.T) {
		second.Kedge(t, "server", "remove", w.Name)
		select {
		case <-w.Done:
		case <-time.After(harness.Patient(20 * time.Second)):
			t.Fatal("the witness goes on after its removal")
		}
		if told := w.Tail(5); !strings.Contains(told, "kedge token create --role witness") {
			t.Errorf("the log ends with %s", told)
		}
		w.Flags = []string{"--server=" + f.URL(), "--token=" + f.WitnessToken(t)}
		if err := w.Start(); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, 30*time.Second, func() error {
			if list := serverList(t, second); list[w.Name] != [2]string{"witness", "reachable"} {
				return fmt.Errorf("the servers are %v", list)
			}
			return nil
		})
	})
}
