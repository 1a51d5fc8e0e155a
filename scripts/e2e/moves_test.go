package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// moveTo gives the machine of a node another address: what happens to a machine that is
// carried to another network.
func (n *node) moveTo(t *testing.T, addr string) {
	t.Helper()
	p := netip.MustParsePrefix(addr)
	gate := p.Masked().Addr().As4()
	gate[3] = 254
	if err := n.machine.Renumber([]netip.Prefix{p}, netip.AddrFrom4(gate)); err != nil {
		t.Fatal(err)
	}
}

// hasAddress says whether the API, asked of n, knows a node by an address.
func (n *node) hasAddress(name, addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	node, err := n.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(node.Status.Addresses, func(a corev1.NodeAddress) bool { return a.Type == corev1.NodeInternalIP && a.Address == addr }) {
		return fmt.Errorf("%s has the addresses %v", name, node.Status.Addresses)
	}
	return nil
}

// moving is a pod with a service on each of some nodes, which must all reach each other,
// and be reached from the API, after a move.
type moving struct {
	f  *fleet
	ns string
	on []*node
}

func (f *fleet) movingPods(t *testing.T, on ...*node) *moving {
	t.Helper()
	m := &moving{f: f, ns: f.namespace(t), on: on}
	for i, n := range on {
		name := fmt.Sprint("on-", i)
		f.servers(t, m.ns, name, 1, "nodeName: "+n.name+",")
		f.service(t, m.ns, name, name, "")
		f.apply(t, m.ns, shell(fmt.Sprint("from-", i), "exec sleep 36000", "nodeName: "+n.name+","))
	}
	for i := range on {
		f.waitPod(t, m.ns, fmt.Sprint("from-", i), false)
	}
	m.works(t, "before anything moves", time.Minute, f.node)
	return m
}

// works waits until everything works again, as seen by a server's API, and logs how long
// it took.
func (m *moving) works(t *testing.T, what string, limit time.Duration, at *node) {
	t.Helper()
	begin := time.Now()
	for i := range m.on {
		for j := range m.on {
			eventually(t, limit, func() error {
				out, err := at.tryKubectl(nil, "exec", "-n", m.ns, fmt.Sprint("from-", i), "--", "probe", "get", fmt.Sprintf("http://on-%d.%s/", j, m.ns))
				if err == nil && strings.TrimSpace(out) != fmt.Sprintf("on-%d-0", j) {
					err = fmt.Errorf("it answers %q", out)
				}
				return err
			})
		}
	}
	t.Logf("%s: pods reach each other, and the API them, after %s", what, time.Since(begin).Round(100*time.Millisecond))
}

// untouched makes sure that no pod was started anew.
func (m *moving) untouched(t *testing.T, at *node) {
	t.Helper()
	pods, err := at.client.CoreV1().Pods(m.ns).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil || len(p.Status.ContainerStatuses) != 1 || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("pod %s was touched: %+v", p.Name, p.Status.ContainerStatuses)
		}
	}
}

// startAgent starts an agent that has the images of the tests.
func (f *fleet) startAgent(t *testing.T) *node {
	t.Helper()
	a := f.newAgent(t, "--token="+f.token(t))
	if err := prepareImages(a.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	return a
}

// knownBy waits until the API knows where a node is.
func (f *fleet) knownBy(t *testing.T, what string, at, n *node, addr string) {
	t.Helper()
	begin := time.Now()
	eventually(t, time.Minute, func() error { return at.hasAddress(n.name, addr) })
	t.Logf("%s: the API knows %s by %s after %s", what, n.name, addr, time.Since(begin).Round(100*time.Millisecond))
}

// TestMachinesMove: an agent, and then the only server, get other addresses, while they
// run and while they are off. Nobody tells them, nor the others.
func TestMachinesMove(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	a := f.startAgent(t)
	pods := f.movingPods(t, f.node, a)

	t.Run("an agent that runs", func(t *testing.T) {
		a.moveTo(t, "192.0.2.77/24")
		f.knownBy(t, "moved", f.node, a, "192.0.2.77")
		pods.works(t, "moved", time.Minute, f.node)
	})
	t.Run("an agent that is off", func(t *testing.T) {
		a.stop(t, syscall.SIGTERM, 15*time.Second)
		a.moveTo(t, "192.0.2.78/24")
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		f.knownBy(t, "started", f.node, a, "192.0.2.78")
		pods.works(t, "started", time.Minute, f.node)
	})
	t.Run("the server that runs", func(t *testing.T) {
		f.moveTo(t, "192.0.2.99/24")
		f.knownBy(t, "moved", f.node, f.node, "192.0.2.99")
		pods.works(t, "moved", time.Minute, f.node)
		// What it serves with names the new address, and no call goes to the old one.
		eventually(t, 20*time.Second, func() error {
			out, err := f.kubectlAt("https://192.0.2.99:"+fmt.Sprint(f.apiPort), "get", "--raw=/readyz")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		f.published(t, f.node)
	})
	t.Run("the server that is off", func(t *testing.T) {
		f.stop(t, syscall.SIGTERM, 20*time.Second)
		f.moveTo(t, "192.0.2.98/24")
		if err := f.start(); err != nil {
			t.Fatal(err)
		}
		f.knownBy(t, "started", f.node, f.node, "192.0.2.98")
		pods.works(t, "started", time.Minute, f.node)
	})
	t.Run("both to another network", func(t *testing.T) {
		f.moveTo(t, "198.51.100.1/24")
		a.moveTo(t, "198.51.100.2/24")
		f.knownBy(t, "moved", f.node, a, "198.51.100.2")
		pods.works(t, "moved", time.Minute, f.node)
	})
	pods.untouched(t, f.node)
}

// kubectlAt runs kubectl against a URL of the API, with the administrator's credentials.
func (n *node) kubectlAt(url string, args ...string) (string, error) {
	return n.tryKubectl(nil, append([]string{"--server=" + url}, args...)...)
}

// TestClusterMoves: three servers and an agent are carried to another network, all at once,
// while they run and while they are off.
func TestClusterMoves(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	servers := []*node{f.node}
	for range 2 {
		s := newNode("server")
		s.apiPort = f.apiPort
		f.on(t, s)
		s.kubeconfig = s.machine.Disk("/etc/kedge/kedge.yaml")
		s.flags = []string{"--server=" + f.url(), "--token=" + f.serverToken(t)}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", s.name, s.tail(60))
			}
			if err := s.destroy(); err != nil {
				t.Errorf("clean-up: %v", err)
			}
		})
		if err := prepareImages(s.dataDir()); err != nil {
			t.Fatal(err)
		}
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		servers = append(servers, s)
	}
	a := f.startAgent(t)
	all := append(slices.Clone(servers), a)
	pods := f.movingPods(t, servers[0], servers[2], a)
	f.published(t, servers...)

	check := func(t *testing.T, what, network string) {
		t.Helper()
		for i, n := range all {
			f.knownBy(t, what, f.node, n, fmt.Sprintf("%s.%d", network, i+1))
		}
		pods.works(t, what, 2*time.Minute, servers[1])
		f.published(t, servers...)
	}
	t.Run("all run", func(t *testing.T) {
		for i, n := range all {
			n.moveTo(t, fmt.Sprintf("198.51.100.%d/24", i+1))
		}
		check(t, "moved", "198.51.100")
	})
	t.Run("all are off", func(t *testing.T) {
		for _, n := range all {
			n.stop(t, syscall.SIGTERM, 20*time.Second)
		}
		for i, n := range all {
			n.moveTo(t, fmt.Sprintf("203.0.113.%d/24", i+1))
			if err := n.launch(); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range all {
			if err := n.waitReady(90 * time.Second); err != nil {
				t.Fatal(err)
			}
		}
		check(t, "started", "203.0.113")
	})
	pods.untouched(t, f.node)
}
