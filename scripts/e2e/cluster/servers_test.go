package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// newServer makes one more server on a host of its own, not yet started.
func newServer(t *testing.T, f *harness.Fleet) *harness.Node {
	t.Helper()
	s := harness.NewNode("server")
	s.APIPort, s.Network = f.APIPort, f.JoinHost(t) // one port for all, as the service "kubernetes" needs
	s.Flags = []string{"--server=" + f.URL(), "--token=" + f.ServerToken(t)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.Name, s.Tail(60))
		}
		if err := s.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return s
}

// serverList is what "kedge server ls" prints: the state of each server after its role.
func serverList(t *testing.T, n *harness.Node) map[string][2]string {
	t.Helper()
	list := map[string][2]string{}
	for i, line := range strings.Split(strings.TrimSpace(n.Kedge(t, "server", "ls")), "\n") {
		if f := strings.Fields(line); i > 0 && len(f) >= 3 {
			list[f[0]] = [2]string{f[1], f[2]}
		}
	}
	return list
}

// leaderOf returns the one that leads, as n sees it.
func leaderOf(t *testing.T, n *harness.Node, servers []*harness.Node) *harness.Node {
	t.Helper()
	var leader *harness.Node
	harness.Eventually(t, 20*time.Second, func() error {
		list := serverList(t, n)
		for _, s := range servers {
			if list[s.Name][0] == "leader" {
				leader = s
				return nil
			}
		}
		return fmt.Errorf("nobody leads: %v", list)
	})
	return leader
}

// forgotten returns nil when nothing in the API says that there is a server of the name.
func forgotten(n *harness.Node, name string) error {
	ctx := context.Background()
	list, err := n.Client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kedge-servers", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if entry, there := list.Data[name]; there {
		return fmt.Errorf("it is listed: %s", entry)
	}
	if _, err := n.Client.CoreV1().Secrets("kube-system").Get(ctx, "kedge-node-"+name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("its key: %v, want that there is none", err)
	}
	if _, err := n.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("its node: %v, want that there is none", err)
	}
	return nil
}

// threeServers is a cluster of three servers.
type threeServers struct {
	*harness.Fleet
	all []*harness.Node
	ns  string // with a pod on each server: pod-0, pod-1 and pod-2
}

func newThreeServers(t *testing.T) *threeServers {
	t.Helper()
	f := harness.NewFleet(t)
	c := &threeServers{Fleet: f, all: []*harness.Node{f.Node}}
	for range 2 {
		s := newServer(t, f)
		if err := harness.PrepareImages(s.DataDir()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s was ready %s after the command", s.Name, time.Since(begin).Round(time.Millisecond))
		c.all = append(c.all, s)
	}
	c.voting(t, c.Node)
	c.AwaitEndpoints(t, c.all...)
	c.ns = c.Namespace(t)
	for i, s := range c.all {
		name := fmt.Sprint("pod-", i)
		s.Apply(t, c.ns, harness.Shell(name, "exec sleep 3600", "nodeName: "+s.Name+","))
		s.WaitPod(t, c.ns, name, false)
		// By the server whose node it is, and by another.
		for _, by := range []*harness.Node{s, c.all[(i+1)%3]} {
			if out := by.Kubectl(t, "exec", "-n", c.ns, name, "--", "echo", "run in", name); out != "run in "+name+"\n" {
				t.Errorf("exec by %s: %q", by.Name, out)
			}
		}
	}
	return c
}

// others are all servers but one.
func (c *threeServers) others(s *harness.Node) []*harness.Node {
	return slices.DeleteFunc(slices.Clone(c.all), func(o *harness.Node) bool { return o == s })
}

// voting waits until all servers vote and are reachable, as one of them sees it.
func (c *threeServers) voting(t *testing.T, at *harness.Node) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		list := serverList(t, at)
		for _, s := range c.all {
			if role := list[s.Name]; role[0] != "leader" && role[0] != "follower" || role[1] != "reachable" {
				return fmt.Errorf("the servers are %v", list)
			}
		}
		return nil
	})
}

// scheduled makes a pod and waits until it has a node.
func (c *threeServers) scheduled(t *testing.T, by *harness.Node, name string) {
	t.Helper()
	begin := time.Now()
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := by.TryKubectl(strings.NewReader(harness.Shell(name, "exec sleep 3600", "")), "apply", "-n", c.ns, "-f", "-")
		if err != nil {
			err = fmt.Errorf("apply: %w: %s", err, out)
		}
		return err
	})
	harness.Eventually(t, 30*time.Second, func() error {
		p, err := by.Client.CoreV1().Pods(c.ns).Get(context.Background(), name, metav1.GetOptions{})
		if err == nil && p.Spec.NodeName == "" {
			err = errors.New("not scheduled")
		}
		return err
	})
	t.Logf("%s was scheduled %s after it was made", name, time.Since(begin).Round(time.Millisecond))
}

// TestServers: three servers, of which any one can go.
func TestServers(t *testing.T) {
	t.Parallel()
	c := newThreeServers(t)
	t.Run("the leader is killed", c.leaderKilled)
	t.Run("all are restarted, one after the other", c.allRestarted)
	t.Run("all lose power", c.allLosePower)
	t.Run("one is removed and comes back", c.removedAndBack)
	t.Run("one loses its store", c.storeLost)
	t.Run("the leader removes itself", c.leaderRemovesItself)
	t.Run("one goes with its node", c.goesWithItsNode)
}

// leaderKilled kills the leader under load: no acknowledged write is lost.
func (c *threeServers) leaderKilled(t *testing.T) {
	leader := leaderOf(t, c.Node, c.all)
	rest := c.others(leader)
	writes := harness.KeepWriting(t, c.ns, leader, rest[0], rest[1])
	time.Sleep(time.Second)
	if err := leader.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	c.scheduled(t, rest[0], "after-the-kill")
	rest[1].AwaitEndpoints(t, rest...)
	writes.Check(t, "the leader is killed", c.ns, rest[0])
	if err := leader.Start(); err != nil {
		t.Fatal(err)
	}
	c.voting(t, rest[0])
	rest[0].AwaitEndpoints(t, c.all...)
}

// allRestarted restarts each server in turn under load.
func (c *threeServers) allRestarted(t *testing.T) {
	writes := harness.KeepWriting(t, c.ns, c.all...)
	for _, s := range c.all {
		s.Stop(t, syscall.SIGTERM, 20*time.Second)
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		c.voting(t, s)
	}
	writes.Check(t, "all are restarted", c.ns, c.all[0])
	for i := range c.all {
		c.StillRuns(t, c.ns, fmt.Sprint("pod-", i))
	}
}

// allLosePower kills all servers at once.
func (c *threeServers) allLosePower(t *testing.T) {
	for _, s := range c.all {
		if err := s.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range c.all {
		if err := s.Launch(); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range c.all {
		if err := s.WaitReady(60 * time.Second); err != nil {
			t.Fatal(err)
		}
	}
	c.voting(t, c.all[2])
	c.scheduled(t, c.all[1], "after-the-power-cut")
}

// removedAndBack removes a server, which ends, and has it join anew.
func (c *threeServers) removedAndBack(t *testing.T) {
	gone := c.all[2]
	if out, err := c.all[0].TryKedge("server", "remove", "nobody"); err == nil || !strings.Contains(out, "no such member") {
		t.Errorf("a server that there is not: %v, %s", err, out)
	}
	c.all[0].Kedge(t, "server", "remove", gone.Name)
	if err := forgotten(c.all[0], gone.Name); err != nil {
		t.Errorf("after the command: %v", err)
	}
	select {
	case <-gone.Done:
	case <-time.After(harness.Patient(20 * time.Second)):
		t.Fatal("a removed server goes on")
	}
	if last := gone.Tail(1); !strings.Contains(last, "this member was removed from the cluster") || !strings.Contains(last, "--token") {
		t.Errorf("it says %q", last)
	}
	if list := serverList(t, c.all[0]); len(list) != 2 {
		t.Errorf("the servers are %v", list)
	}
	gone.Flags = nil
	refused(t, "a removed server", gone, "was removed from the cluster")
	gone.Flags = []string{"--server=" + c.URL(), "--token=" + c.all[0].ServerToken(t)}
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	c.voting(t, c.all[0])
	c.all[0].AwaitEndpoints(t, c.all...)
}

// storeLost takes first what a server knows of its cluster, and then its store.
func (c *threeServers) storeLost(t *testing.T) {
	gone := c.all[2]
	gone.Stop(t, syscall.SIGTERM, 20*time.Second)
	gone.Flags = nil
	told := filepath.Join(gone.DataDir(), "server/joined.json")
	if err := os.Rename(told, told+".away"); err != nil {
		t.Fatal(err)
	}
	refused(t, "a server that does not know what it joined", gone, told+" is missing")
	if err := os.Rename(told+".away", told); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(gone.DataDir(), "server/store")); err != nil {
		t.Fatal(err)
	}
	refused(t, "a server without its store", gone, "the datastore is damaged")
	harness.Eventually(t, 20*time.Second, func() error {
		if list := serverList(t, c.all[0]); list[gone.Name][1] == "reachable" {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	gone.Flags = []string{"--server=" + c.URL(), "--token=" + c.all[0].ServerToken(t)}
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	c.voting(t, c.all[0])
	c.all[0].AwaitEndpoints(t, c.all...)
}

// leaderRemovesItself has the leader remove itself. Nothing is left of it, though it could not tidy up.
func (c *threeServers) leaderRemovesItself(t *testing.T) {
	gone := leaderOf(t, c.Node, c.all)
	rest := c.others(gone)
	by, err := rest[0].Client.CoreV1().Nodes().Get(context.Background(), rest[0].Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	gone.Kedge(t, "server", "remove", gone.Name)
	select {
	case <-gone.Done:
	case <-time.After(harness.Patient(20 * time.Second)):
		t.Fatal("a removed server goes on")
	}
	begin := time.Now()
	harness.Eventually(t, 30*time.Second, func() error { return forgotten(rest[0], gone.Name) })
	t.Logf("the others had forgotten it after %s", harness.Since(begin))
	rest[1].AwaitEndpoints(t, rest...)
	gone.Flags = []string{fmt.Sprintf("--server=https://%s:%d", by.Status.Addresses[0].Address, c.APIPort), "--token=" + rest[0].ServerToken(t)}
	if err := gone.Start(); err != nil {
		t.Fatal(err)
	}
	c.voting(t, rest[0])
	rest[0].AwaitEndpoints(t, c.all...)
}

// goesWithItsNode deletes a server's node, with which the server goes.
func (c *threeServers) goesWithItsNode(t *testing.T) {
	gone := c.all[1]
	c.all[0].Kubectl(t, "delete", "node", gone.Name)
	select {
	case <-gone.Done:
	case <-time.After(harness.Patient(30 * time.Second)):
		t.Fatal("a server without a node goes on")
	}
	harness.Eventually(t, 20*time.Second, func() error {
		if list := serverList(t, c.all[0]); len(list) != 2 {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	// Of two, one that is gone cannot be removed by the other: it has no majority.
	last := c.others(gone)
	if err := last[1].Signal(syscall.SIGKILL, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	if out, err := last[0].TryKedge("server", "remove", last[1].Name); err == nil {
		t.Errorf("a majority was removed: %s", out)
	}
	if err := last[1].Start(); err != nil {
		t.Fatal(err)
	}
}
