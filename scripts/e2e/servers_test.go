package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
)

// newServer makes one more server on a host of its own, not yet started.
func (f *fleet) newServer(t *testing.T) *node {
	t.Helper()
	s := newNode("server")
	s.apiPort, s.network = f.apiPort, f.host(t) // one port for all, as the service "kubernetes" needs
	s.flags = []string{"--server=" + f.url(), "--token=" + f.serverToken(t)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.name, s.tail(60))
		}
		if err := s.destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return s
}

// serverToken makes a token for one server.
func (n *node) serverToken(t *testing.T) string {
	t.Helper()
	fields := strings.Fields(n.kedge(t, "token", "create", "--role=server"))
	if len(fields) != 6 || fields[1] != "server" {
		t.Fatalf("printed %q", fields)
	}
	return fields[5]
}

// serverList is what "kedge server ls" prints: the state of each server after its role.
func (n *node) serverList(t *testing.T) map[string][2]string {
	t.Helper()
	list := map[string][2]string{}
	for i, line := range strings.Split(strings.TrimSpace(n.kedge(t, "server", "ls")), "\n") {
		if f := strings.Fields(line); i > 0 && len(f) >= 3 {
			list[f[0]] = [2]string{f[1], f[2]}
		}
	}
	return list
}

// leaderOf returns the one that leads, as n sees it.
func leaderOf(t *testing.T, n *node, servers []*node) *node {
	t.Helper()
	var leader *node
	eventually(t, 20*time.Second, func() error {
		list := n.serverList(t)
		for _, s := range servers {
			if list[s.name][0] == "leader" {
				leader = s
				return nil
			}
		}
		return fmt.Errorf("nobody leads: %v", list)
	})
	return leader
}

// published waits until the service "kubernetes" leads to these servers, asked of n.
func (n *node) published(t *testing.T, servers ...*node) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		slice, err := n.client.DiscoveryV1().EndpointSlices("default").Get(context.Background(), "kubernetes", metav1.GetOptions{})
		if err != nil {
			return err
		}
		var got []string
		for _, e := range slice.Endpoints {
			got = append(got, e.Addresses...)
		}
		var want []string
		for _, s := range servers {
			node, err := n.client.CoreV1().Nodes().Get(context.Background(), s.name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			want = append(want, node.Status.Addresses[0].Address)
		}
		slices.Sort(want)
		if !slices.Equal(got, want) {
			return fmt.Errorf("published are %v, want %v", got, want)
		}
		return nil
	})
}

// forgot returns nil when nothing in the API says that there is a server of the name.
func (n *node) forgot(name string) error {
	ctx := context.Background()
	list, err := n.client.CoreV1().ConfigMaps("kube-system").Get(ctx, "kedge-servers", metav1.GetOptions{})
	if err != nil {
		return err
	}
	if entry, there := list.Data[name]; there {
		return fmt.Errorf("it is listed: %s", entry)
	}
	if _, err := n.client.CoreV1().Secrets("kube-system").Get(ctx, "kedge-node-"+name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("its key: %v, want that there is none", err)
	}
	if _, err := n.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		return fmt.Errorf("its node: %v, want that there is none", err)
	}
	return nil
}

// ledger writes through servers until stopped, and remembers what was acknowledged.
type ledger struct {
	stop, done chan struct{}
	written    []string
	longest    time.Duration // between two acknowledged writes
}

// keepWriting starts a client of the given servers that goes to the next one when a
// request fails, as clients do that know several.
func keepWriting(t *testing.T, ns string, servers ...*node) *ledger {
	t.Helper()
	l := &ledger{stop: make(chan struct{}), done: make(chan struct{})}
	var clients []kubernetes.Interface
	for _, s := range servers {
		clients = append(clients, s.client)
	}
	go func() {
		defer close(l.done)
		last := time.Now()
		series := time.Now().UnixNano() // a ledger has names of its own
		use := 0                        // goes to the next when one fails, and stays
		for i := 0; ; i++ {
			name := fmt.Sprintf("entry-%d-%d", series, i)
			for ; ; use++ {
				select {
				case <-l.stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				_, err := clients[use%len(clients)].CoreV1().ConfigMaps(ns).Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{})
				cancel()
				if err == nil || strings.Contains(err.Error(), "already exists") {
					break
				}
				time.Sleep(20 * time.Millisecond)
			}
			l.written = append(l.written, name)
			l.longest, last = max(l.longest, time.Since(last)), time.Now()
			time.Sleep(10 * time.Millisecond)
		}
	}()
	return l
}

// check stops the writing and makes sure that every acknowledged write is there.
func (l *ledger) check(t *testing.T, what, ns string, at *node) {
	t.Helper()
	close(l.stop)
	<-l.done
	var list *corev1.ConfigMapList
	eventually(t, 10*time.Second, func() (err error) { // a server that came back may be without a leader once more
		list, err = at.client.CoreV1().ConfigMaps(ns).List(context.Background(), metav1.ListOptions{})
		return err
	})
	there := map[string]bool{}
	for _, c := range list.Items {
		there[c.Name] = true
	}
	lost := slices.DeleteFunc(slices.Clone(l.written), func(name string) bool { return there[name] })
	if len(lost) > 0 || len(l.written) == 0 {
		t.Errorf("%s: of %d acknowledged writes these are lost: %v", what, len(l.written), lost)
	}
	t.Logf("%s: %d writes, the longest pause between two was %s", what, len(l.written), l.longest.Round(time.Millisecond))
}

// TestServers: three servers, of which any one can go.
func TestServers(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	servers := []*node{f.node}
	for range 2 {
		s := f.newServer(t)
		if err := prepareImages(s.dataDir()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s was ready %s after the command", s.name, time.Since(begin).Round(time.Millisecond))
		servers = append(servers, s)
	}
	others := func(s *node) []*node {
		return slices.DeleteFunc(slices.Clone(servers), func(o *node) bool { return o == s })
	}
	voting := func(t *testing.T, at *node) {
		t.Helper()
		eventually(t, 30*time.Second, func() error {
			list := at.serverList(t)
			for _, s := range servers {
				if role := list[s.name]; role[0] != "leader" && role[0] != "follower" || role[1] != "reachable" {
					return fmt.Errorf("the servers are %v", list)
				}
			}
			return nil
		})
	}
	voting(t, f.node)
	f.published(t, servers...)
	ns := f.namespace(t)
	for i, s := range servers {
		name := fmt.Sprint("pod-", i)
		s.apply(t, ns, shell(name, "exec sleep 3600", "nodeName: "+s.name+","))
		s.waitPod(t, ns, name, false)
		// By the server whose node it is, and by another.
		for _, by := range []*node{s, servers[(i+1)%3]} {
			if out := by.kubectl(t, "exec", "-n", ns, name, "--", "echo", "run in", name); out != "run in "+name+"\n" {
				t.Errorf("exec by %s: %q", by.name, out)
			}
		}
	}
	scheduled := func(t *testing.T, by *node, name string) {
		t.Helper()
		begin := time.Now()
		eventually(t, 30*time.Second, func() error {
			out, err := by.tryKubectl(strings.NewReader(shell(name, "exec sleep 3600", "")), "apply", "-n", ns, "-f", "-")
			if err != nil {
				err = fmt.Errorf("apply: %w: %s", err, out)
			}
			return err
		})
		eventually(t, 30*time.Second, func() error {
			p, err := by.client.CoreV1().Pods(ns).Get(context.Background(), name, metav1.GetOptions{})
			if err == nil && p.Spec.NodeName == "" {
				err = errors.New("not scheduled")
			}
			return err
		})
		t.Logf("%s was scheduled %s after it was made", name, time.Since(begin).Round(time.Millisecond))
	}

	t.Run("the leader is killed", func(t *testing.T) {
		leader := leaderOf(t, f.node, servers)
		rest := others(leader)
		writes := keepWriting(t, ns, leader, rest[0], rest[1])
		time.Sleep(time.Second)
		if err := leader.signal(syscall.SIGKILL, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		scheduled(t, rest[0], "after-the-kill")
		rest[1].published(t, rest...)
		writes.check(t, "the leader is killed", ns, rest[0])
		if err := leader.start(); err != nil {
			t.Fatal(err)
		}
		voting(t, rest[0])
		rest[0].published(t, servers...)
	})

	t.Run("all are restarted, one after the other", func(t *testing.T) {
		writes := keepWriting(t, ns, servers...)
		for _, s := range servers {
			s.stop(t, syscall.SIGTERM, 20*time.Second)
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			voting(t, s)
		}
		writes.check(t, "all are restarted", ns, servers[0])
		for i := range servers {
			f.stillRuns(t, ns, fmt.Sprint("pod-", i))
		}
	})

	t.Run("all lose power", func(t *testing.T) {
		for _, s := range servers {
			if err := s.signal(syscall.SIGKILL, 5*time.Second); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range servers {
			if err := s.launch(); err != nil {
				t.Fatal(err)
			}
		}
		for _, s := range servers {
			if err := s.waitReady(60 * time.Second); err != nil {
				t.Fatal(err)
			}
		}
		voting(t, servers[2])
		scheduled(t, servers[1], "after-the-power-cut")
	})

	t.Run("one is removed and comes back", func(t *testing.T) {
		gone := servers[2]
		if out, err := servers[0].tryKedge("server", "remove", "nobody"); err == nil || !strings.Contains(out, "no such member") {
			t.Errorf("a server that there is not: %v, %s", err, out)
		}
		servers[0].kedge(t, "server", "remove", gone.name)
		if err := servers[0].forgot(gone.name); err != nil {
			t.Errorf("after the command: %v", err)
		}
		select {
		case <-gone.done:
		case <-time.After(20 * time.Second):
			t.Fatal("a removed server goes on")
		}
		if last := gone.tail(1); !strings.Contains(last, "this member was removed from the cluster") || !strings.Contains(last, "--token") {
			t.Errorf("it says %q", last)
		}
		if list := servers[0].serverList(t); len(list) != 2 {
			t.Errorf("the servers are %v", list)
		}
		gone.flags = nil
		refused(t, "a removed server", gone, "was removed from the cluster")
		gone.flags = []string{"--server=" + f.url(), "--token=" + servers[0].serverToken(t)}
		if err := gone.start(); err != nil {
			t.Fatal(err)
		}
		voting(t, servers[0])
		servers[0].published(t, servers...)
	})

	// Nothing is left of it, though it could not tidy up itself.
	t.Run("the leader removes itself", func(t *testing.T) {
		gone := leaderOf(t, f.node, servers)
		rest := others(gone)
		by, err := rest[0].client.CoreV1().Nodes().Get(context.Background(), rest[0].name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		gone.kedge(t, "server", "remove", gone.name)
		select {
		case <-gone.done:
		case <-time.After(20 * time.Second):
			t.Fatal("a removed server goes on")
		}
		begin := time.Now()
		eventually(t, 30*time.Second, func() error { return rest[0].forgot(gone.name) })
		t.Logf("the others had forgotten it after %s", since(begin))
		rest[1].published(t, rest...)
		gone.flags = []string{fmt.Sprintf("--server=https://%s:%d", by.Status.Addresses[0].Address, f.apiPort), "--token=" + rest[0].serverToken(t)}
		if err := gone.start(); err != nil {
			t.Fatal(err)
		}
		voting(t, rest[0])
		rest[0].published(t, servers...)
	})

	t.Run("one goes with its node", func(t *testing.T) {
		gone := servers[1]
		servers[0].kubectl(t, "delete", "node", gone.name)
		select {
		case <-gone.done:
		case <-time.After(30 * time.Second):
			t.Fatal("a server without a node goes on")
		}
		eventually(t, 20*time.Second, func() error {
			if list := servers[0].serverList(t); len(list) != 2 {
				return fmt.Errorf("the servers are %v", list)
			}
			return nil
		})
		// Of two, one that is gone cannot be removed by the other: it has no majority.
		last := others(gone)
		if err := last[1].signal(syscall.SIGKILL, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		if out, err := last[0].tryKedge("server", "remove", last[1].name); err == nil {
			t.Errorf("a majority was removed: %s", out)
		}
		if err := last[1].start(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestGrowth: one server becomes three, five, three and one again under load, and after
// each step one is killed and started again.
func TestGrowth(t *testing.T) {
	if os.Getenv("KEDGE_TEST_LONG") == "" {
		t.Skip("five servers at once: set KEDGE_TEST_LONG=1")
	}
	f := &faults{fleet: newFleet(t)}
	f.all = []*node{f.node}
	ns := f.namespace(t)
	h := record(t, ns, f.node)
	step := func(what string, change func()) {
		apart := f.namespace(t)
		writes := keepWriting(t, apart, f.node)
		begin := time.Now()
		change()
		f.voting(t, f.node)
		t.Logf("%s after %s", what, since(begin))
		writes.check(t, what, apart, f.node)
		if s := f.all[len(f.all)-1]; s != f.node {
			if err := s.signal(syscall.SIGKILL, 5*time.Second); err != nil {
				t.Fatal(err)
			}
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			f.voting(t, f.node)
		}
		f.published(t, f.all...)
	}
	grow := func() {
		for range 2 {
			s := f.onMachine(t)
			if err := s.start(); err != nil {
				t.Fatal(err)
			}
			f.all = append(f.all, s)
		}
	}
	shrink := func() {
		for range 2 {
			gone := f.all[len(f.all)-1]
			f.kedge(t, "server", "remove", gone.name)
			select {
			case <-gone.done:
			case <-time.After(30 * time.Second):
				t.Fatal("a removed server goes on")
			}
			f.all = f.all[:len(f.all)-1]
		}
	}
	step("three servers", grow)
	step("five servers", grow)
	step("three servers again", shrink)
	step("one server again", shrink)
	h.End(t)
}
