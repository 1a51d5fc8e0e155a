package harness

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/throwaway/machine"
)

// Fleet is a server on a machine of its own and the switch to which its agents'
// machines are joined too.
type Fleet struct {
	*Node  // the server
	site   *machine.Site
	LAN    *host.LAN  // the site's
	Gate   netip.Addr // of the default route of all machines; nothing is there
	Joined byte       // hosts so far: the last byte of the latest one's address
}

// NewFleet starts a server.
func NewFleet(t *testing.T, flags ...string) *Fleet {
	t.Helper()
	return NewPreparedFleet(t, func(*Node) {}, flags...)
}

// NewPreparedFleet starts a server after prepare, which finds its machine switched on.
func NewPreparedFleet(t *testing.T, prepare func(*Node), flags ...string) *Fleet {
	t.Helper()
	host.RequireRoot(t)
	dir, err := os.MkdirTemp(BaseDir, "fleet")
	if err != nil {
		t.Fatal(err)
	}
	site, err := machine.Create(machine.Config{Dir: filepath.Join(dir, "site"), Program: Binary(), Supervisor: Binary(), Tethered: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(site.Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	f := &Fleet{Node: Own(t), site: site, LAN: site.LAN(), Gate: netip.MustParseAddr("192.0.2.254")}
	f.Flags = flags // not the ranges that Own has chosen: this machine is its own
	f.GiveMachine(t, f.Node)
	if err := PrepareImages(f.DataDir()); err != nil {
		t.Fatal(err)
	}
	prepare(f.Node)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	return f
}

// GiveMachine gives a node a machine of its own.
func (f *Fleet) GiveMachine(t *testing.T, n *Node) {
	t.Helper()
	f.Joined++
	m, err := f.site.Add(n.Name, []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, f.Joined}), 24)}, f.Gate)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.PowerOn(); err != nil {
		t.Fatal(err)
	}
	h, err := m.Host()
	if err != nil {
		t.Fatal(err)
	}
	if n.Network, err = namespaces.OpenNetwork(h.Path()); err != nil {
		t.Fatal(err)
	}
	n.Machine = m
	n.Kubeconfig = m.Disk("/etc/kedge/kedge.yaml")
}

// JoinHost joins a host without a machine to the switch and returns its network.
func (f *Fleet) JoinHost(t *testing.T) *namespaces.Network {
	t.Helper()
	f.Joined++
	h, err := f.LAN.Host(fmt.Sprint("h", f.Joined), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, f.Joined}), 24))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Route(netip.MustParsePrefix("0.0.0.0/0"), f.Gate); err != nil {
		t.Fatal(err)
	}
	ns, err := namespaces.OpenNetwork(h.Path())
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// URL is that of the first server, for those that join.
func (f *Fleet) URL() string { return fmt.Sprintf("https://192.0.2.1:%d", f.APIPort) }

// NewAgent makes an agent, not yet started.
func (f *Fleet) NewAgent(t *testing.T, flags ...string) *Node {
	t.Helper()
	a := NewNode("agent")
	f.GiveMachine(t, a)
	return f.asAgent(t, a, flags)
}

// NewAgentAt is [Fleet.NewAgent] on a host that is there already, without a machine.
func (f *Fleet) NewAgentAt(t *testing.T, at *namespaces.Network, flags ...string) *Node {
	t.Helper()
	a := NewNode("agent")
	a.Network = at
	return f.asAgent(t, a, flags)
}

func (f *Fleet) asAgent(t *testing.T, a *Node, flags []string) *Node {
	t.Helper()
	a.Agent = true
	a.Flags = append([]string{"--server=" + f.URL()}, flags...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", a.Name, a.Tail(40))
		}
		if err := a.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return a
}

// NewToken makes a token for an agent.
func (f *Fleet) NewToken(t *testing.T, flags ...string) string {
	t.Helper()
	fields := strings.Fields(f.Kedge(t, append([]string{"token", "create"}, flags...)...))
	if want := []string{"kedge", "agent", "--server", f.URL(), "--token"}; len(fields) != 6 || strings.Join(fields[:5], " ") != strings.Join(want, " ") {
		t.Fatalf("printed %q", fields)
	}
	return fields[5]
}

// NodeIsReady is nil when the API says that the node of the name is ready.
func (n *Node) NodeIsReady(name string) error {
	node, err := n.Client.CoreV1().Nodes().Get(context.Background(), name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, c := range node.Status.Conditions {
		if c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue {
			return nil
		}
	}
	return fmt.Errorf("node %s is not Ready", name)
}

// StillRuns waits until the kubelet has found a pod again that went on running
// without it, and makes sure that it was not started anew.
func (f *Fleet) StillRuns(t *testing.T, ns, name string) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		out, err := f.TryKubectl(nil, "exec", "-n", ns, name, "--", "echo", "here")
		if err != nil || out != "here\n" {
			return fmt.Errorf("exec: %q, %v", out, err)
		}
		return nil
	})
	pod, err := f.Pod(ns, name)
	if err != nil {
		t.Errorf("read %s: %v", name, err)
	} else if pod.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("%s was restarted", name)
	}
}

// StartAgent starts an agent that has the images of the tests.
func (f *Fleet) StartAgent(t *testing.T) *Node {
	t.Helper()
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	if err := PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	return a
}

// ServerToken makes a token for one server.
func (n *Node) ServerToken(t *testing.T) string {
	t.Helper()
	return n.tokenFor(t, "server", "kedge server --server ")
}

// WitnessToken makes a token for one witness.
func (n *Node) WitnessToken(t *testing.T) string {
	t.Helper()
	return n.tokenFor(t, "witness", "kedge server --witness --server ")
}

// tokenFor makes a token for one machine with a role, of which the printed command begins with begin.
func (n *Node) tokenFor(t *testing.T, role, begin string) string {
	t.Helper()
	printed := strings.TrimSpace(n.Kedge(t, "token", "create", "--role="+role))
	_, token, ok := strings.Cut(printed, " --token ")
	if !ok || !strings.HasPrefix(printed, begin) {
		t.Fatalf("printed %q", printed)
	}
	return token
}

// AwaitEndpoints waits until the service "kubernetes" leads to these servers, asked of n.
func (n *Node) AwaitEndpoints(t *testing.T, servers ...*Node) {
	t.Helper()
	Eventually(t, 20*time.Second, func() error {
		slice, err := n.Client.DiscoveryV1().EndpointSlices("default").Get(context.Background(), "kubernetes", metav1.GetOptions{})
		if err != nil {
			return err
		}
		var got []string
		for _, e := range slice.Endpoints {
			got = append(got, e.Addresses...)
		}
		var want []string
		for _, s := range servers {
			node, err := n.Client.CoreV1().Nodes().Get(context.Background(), s.Name, metav1.GetOptions{})
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
