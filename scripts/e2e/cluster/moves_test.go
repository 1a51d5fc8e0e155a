package cluster

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

	"kedge/scripts/e2e/harness"
)

// moveTo gives the machine of a node another address: what happens to a machine that is
// carried to another network.
func moveTo(t *testing.T, n *harness.Node, addr string) {
	t.Helper()
	p := netip.MustParsePrefix(addr)
	gate := p.Masked().Addr().As4()
	gate[3] = 254
	if err := n.Machine.Renumber([]netip.Prefix{p}, netip.AddrFrom4(gate)); err != nil {
		t.Fatal(err)
	}
}

// hasAddress says whether the API, asked of n, knows a node by an address.
func hasAddress(n *harness.Node, name, addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
	defer cancel()
	node, err := n.Client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
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
	f  *harness.Fleet
	ns string
	on []*harness.Node
}

func movingPods(t *testing.T, f *harness.Fleet, on ...*harness.Node) *moving {
	t.Helper()
	m := &moving{f: f, ns: f.Namespace(t), on: on}
	for i, n := range on {
		name := fmt.Sprint("on-", i)
		f.Servers(t, m.ns, name, 1, "nodeName: "+n.Name+",")
		f.Service(t, m.ns, name, name, "")
		f.Apply(t, m.ns, harness.Shell(fmt.Sprint("from-", i), "exec sleep 36000", "nodeName: "+n.Name+","))
	}
	for i := range on {
		f.WaitPod(t, m.ns, fmt.Sprint("from-", i), false)
	}
	m.works(t, "before anything moves", time.Minute, f.Node)
	return m
}

// works waits until everything works again, as seen by a server's API, and logs how long
// it took.
func (m *moving) works(t *testing.T, what string, limit time.Duration, at *harness.Node) {
	t.Helper()
	begin := time.Now()
	for i := range m.on {
		for j := range m.on {
			harness.Eventually(t, limit, func() error {
				out, err := at.TryKubectl(nil, "exec", "-n", m.ns, fmt.Sprint("from-", i), "--", "probe", "get", fmt.Sprintf("http://on-%d.%s/", j, m.ns))
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
func (m *moving) untouched(t *testing.T, at *harness.Node) {
	t.Helper()
	pods, err := at.Client.CoreV1().Pods(m.ns).List(context.Background(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil || len(p.Status.ContainerStatuses) != 1 || p.Status.ContainerStatuses[0].RestartCount != 0 {
			t.Errorf("pod %s was touched: %+v", p.Name, p.Status.ContainerStatuses)
		}
	}
}

// knownBy waits until the API knows where a node is.
func knownBy(t *testing.T, f *harness.Fleet, what string, at, n *harness.Node, addr string) {
	t.Helper()
	begin := time.Now()
	harness.Eventually(t, time.Minute, func() error { return hasAddress(at, n.Name, addr) })
	t.Logf("%s: the API knows %s by %s after %s", what, n.Name, addr, time.Since(begin).Round(100*time.Millisecond))
}

// TestMachinesMove: an agent, and then the only server, get other addresses, while they
// run and while they are off. Nobody tells them, nor the others.
func TestMachinesMove(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	a := f.StartAgent(t)
	pods := movingPods(t, f, f.Node, a)

	t.Run("an agent that runs", func(t *testing.T) {
		moveTo(t, a, "192.0.2.77/24")
		knownBy(t, f, "moved", f.Node, a, "192.0.2.77")
		pods.works(t, "moved", time.Minute, f.Node)
	})
	t.Run("an agent that is off", func(t *testing.T) {
		a.Stop(t, syscall.SIGTERM, 15*time.Second)
		moveTo(t, a, "192.0.2.78/24")
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		knownBy(t, f, "started", f.Node, a, "192.0.2.78")
		pods.works(t, "started", time.Minute, f.Node)
	})
	t.Run("the server that runs", func(t *testing.T) {
		moveTo(t, f.Node, "192.0.2.99/24")
		knownBy(t, f, "moved", f.Node, f.Node, "192.0.2.99")
		pods.works(t, "moved", time.Minute, f.Node)
		// What it serves with names the new address, and no call goes to the old one.
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := kubectlAt(f.Node, "https://192.0.2.99:"+fmt.Sprint(f.APIPort), "get", "--raw=/readyz")
			if err != nil {
				return fmt.Errorf("%w: %s", err, out)
			}
			return nil
		})
		f.AwaitEndpoints(t, f.Node)
	})
	t.Run("the server that is off", func(t *testing.T) {
		f.Stop(t, syscall.SIGTERM, 20*time.Second)
		moveTo(t, f.Node, "192.0.2.98/24")
		if err := f.Start(); err != nil {
			t.Fatal(err)
		}
		knownBy(t, f, "started", f.Node, f.Node, "192.0.2.98")
		pods.works(t, "started", time.Minute, f.Node)
	})
	t.Run("both to another network", func(t *testing.T) {
		moveTo(t, f.Node, "198.51.100.1/24")
		moveTo(t, a, "198.51.100.2/24")
		knownBy(t, f, "moved", f.Node, a, "198.51.100.2")
		pods.works(t, "moved", time.Minute, f.Node)
	})
	pods.untouched(t, f.Node)
}

// kubectlAt runs kubectl against a URL of the API, with the administrator's credentials.
func kubectlAt(n *harness.Node, url string, args ...string) (string, error) {
	return n.TryKubectl(nil, append([]string{"--server=" + url}, args...)...)
}

// TestClusterMoves: three servers and an agent are carried to another network, all at once,
// while they run and while they are off.
func TestClusterMoves(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	servers := []*harness.Node{f.Node}
	for range 2 {
		s := harness.NewNode("server")
		s.APIPort = f.APIPort
		f.GiveMachine(t, s)
		s.Kubeconfig = s.Machine.Disk("/etc/kedge/kedge.yaml")
		s.Flags = []string{"--server=" + f.URL(), "--token=" + f.ServerToken(t)}
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", s.Name, s.Tail(60))
			}
			if err := s.Destroy(); err != nil {
				t.Errorf("clean-up: %v", err)
			}
		})
		if err := harness.PrepareImages(s.DataDir()); err != nil {
			t.Fatal(err)
		}
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		servers = append(servers, s)
	}
	a := f.StartAgent(t)
	all := append(slices.Clone(servers), a)
	pods := movingPods(t, f, servers[0], servers[2], a)
	f.AwaitEndpoints(t, servers...)

	check := func(t *testing.T, what, network string) {
		t.Helper()
		for i, n := range all {
			knownBy(t, f, what, f.Node, n, fmt.Sprintf("%s.%d", network, i+1))
		}
		pods.works(t, what, 2*time.Minute, servers[1])
		f.AwaitEndpoints(t, servers...)
	}
	t.Run("all run", func(t *testing.T) {
		for i, n := range all {
			moveTo(t, n, fmt.Sprintf("198.51.100.%d/24", i+1))
		}
		check(t, "moved", "198.51.100")
	})
	t.Run("all are off", func(t *testing.T) {
		// The last server has no majority, and may need the whole time that a stop may take.
		for _, n := range all {
			if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
				t.Fatal(err)
			}
		}
		for i, n := range all {
			moveTo(t, n, fmt.Sprintf("203.0.113.%d/24", i+1))
			if err := n.Launch(); err != nil {
				t.Fatal(err)
			}
		}
		for _, n := range all {
			if err := n.WaitReady(90 * time.Second); err != nil {
				t.Fatal(err)
			}
		}
		check(t, "started", "203.0.113")
	})
	pods.untouched(t, f.Node)
}
