package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/machines"
	"kedge/internal/netns"
	"kedge/internal/testhost"
)

// fleet is a server on a machine of its own and the switch to which its agents'
// machines are joined too.
type fleet struct {
	*node
	site   *machines.Site
	lan    *testhost.LAN // the site's
	gate   netip.Addr
	joined byte // hosts so far: the last byte of the latest one's address
}

// newFleet starts a server.
func newFleet(t *testing.T, flags ...string) *fleet {
	t.Helper()
	testhost.RequireRoot(t)
	dir, err := os.MkdirTemp(baseDir, "fleet")
	if err != nil {
		t.Fatal(err)
	}
	site, err := machines.Create(machines.Config{Dir: filepath.Join(dir, "site"), Program: binary(), Keeper: binary(), Tethered: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(site.Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	f := &fleet{node: own(t), site: site, lan: site.LAN(), gate: netip.MustParseAddr("192.0.2.254")}
	f.flags = flags // not the ranges that own has chosen: this machine is its own
	f.on(t, f.node)
	if err := prepareImages(f.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := f.start(); err != nil {
		t.Fatal(err)
	}
	return f
}

// on gives a node a machine of its own.
func (f *fleet) on(t *testing.T, n *node) {
	t.Helper()
	f.joined++
	m, err := f.site.Add(n.name, []netip.Prefix{netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, f.joined}), 24)}, f.gate)
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
	if n.network, err = netns.Open(h.Path()); err != nil {
		t.Fatal(err)
	}
	n.machine = m
	n.kubeconfig = m.Disk("/etc/kedge/kedge.yaml")
}

// host joins a host without a machine to the switch and returns its network.
func (f *fleet) host(t *testing.T) *netns.NS {
	t.Helper()
	f.joined++
	h, err := f.lan.Host(fmt.Sprint("h", f.joined), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, f.joined}), 24))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Route(netip.MustParsePrefix("0.0.0.0/0"), f.gate); err != nil {
		t.Fatal(err)
	}
	ns, err := netns.Open(h.Path())
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

func (f *fleet) url() string { return fmt.Sprintf("https://192.0.2.1:%d", f.apiPort) }

// newAgent makes an agent, not yet started.
func (f *fleet) newAgent(t *testing.T, flags ...string) *node {
	t.Helper()
	a := newNode("agent")
	f.on(t, a)
	return f.asAgent(t, a, flags)
}

// newAgentAt is [fleet.newAgent] on a host that is there already, without a machine.
func (f *fleet) newAgentAt(t *testing.T, at *netns.NS, flags ...string) *node {
	t.Helper()
	a := newNode("agent")
	a.network = at
	return f.asAgent(t, a, flags)
}

func (f *fleet) asAgent(t *testing.T, a *node, flags []string) *node {
	t.Helper()
	a.agent = true
	a.flags = append([]string{"--server=" + f.url()}, flags...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", a.name, a.tail(40))
		}
		if err := a.destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return a
}

// kedge runs a command that asks the node's process.
func (n *node) kedge(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.tryKedge(args...)
	if err != nil {
		t.Fatalf("kedge %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (n *node) tryKedge(args ...string) (string, error) {
	var out bytes.Buffer
	i := 2 // before the arguments of a command and its subcommand
	cmd := exec.Command(binary(), append(append(append([]string{}, args[:i]...), "--run-dir="+n.runDir()), args[i:]...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	return out.String(), err
}

// token makes one and returns it alone.
func (f *fleet) token(t *testing.T, flags ...string) string {
	t.Helper()
	fields := strings.Fields(f.kedge(t, append([]string{"token", "create"}, flags...)...))
	if want := []string{"kedge", "agent", "--server", f.url(), "--token"}; len(fields) != 6 || strings.Join(fields[:5], " ") != strings.Join(want, " ") {
		t.Fatalf("printed %q", fields)
	}
	return fields[5]
}

// refused starts an agent that must end with a sentence.
func refused(t *testing.T, what string, a *node, sentence string) {
	t.Helper()
	if err := a.launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.done:
	case <-time.After(20 * time.Second):
		_ = a.signal(syscall.SIGKILL, 5*time.Second)
		t.Fatalf("%s: still running\n%s", what, a.tail(10))
	}
	if last := a.tail(1); a.err == nil || !strings.HasPrefix(last, "kedge: ") || !strings.Contains(last, sentence) {
		t.Errorf("%s: it ended with %v and %q, want %q", what, a.err, last, sentence)
	}
}

func (n *node) nodeIsReady(name string) error {
	node, err := n.client.CoreV1().Nodes().Get(context.Background(), name, metav1.GetOptions{})
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

// stillRuns waits until the kubelet has found a pod again that went on running
// without it, and makes sure that it was not started anew.
func (f *fleet) stillRuns(t *testing.T, ns, name string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		out, err := f.tryKubectl(nil, "exec", "-n", ns, name, "--", "echo", "here")
		if err != nil || out != "here\n" {
			return fmt.Errorf("exec: %q, %v", out, err)
		}
		return nil
	})
	pod, err := f.pod(ns, name)
	if err != nil || pod.Status.ContainerStatuses[0].RestartCount != 0 {
		t.Errorf("%s was restarted: %v", name, err)
	}
}

func TestAgents(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	var agents []*node
	for i := range 2 {
		a := f.newAgent(t, "--token="+f.token(t), "--node-label=zone="+fmt.Sprint(i))
		if err := prepareImages(a.dataDir()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := a.launch(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 60*time.Second, func() error { return f.nodeIsReady(a.name) })
		t.Logf("%s was Ready %s after the command", a.name, time.Since(begin).Round(time.Millisecond))
		if err := a.waitReady(60 * time.Second); err != nil {
			t.Fatal(err)
		}
		agents = append(agents, a)
	}
	if out := f.kedge(t, "token", "ls"); strings.Count(out, " 0 ") != 2 {
		t.Errorf("two tokens of one use each were used:\n%s", out)
	}
	if out, err := agents[0].tryKedge("token", "create"); err == nil || !strings.Contains(out, "run the command on a server") {
		t.Errorf("a token made on an agent: %v, %s", err, out)
	}

	ns := f.namespace(t)
	onNode := func(a *node) string { return fmt.Sprintf("nodeName: %s,", a.name) }
	for i, a := range agents {
		name := fmt.Sprint("pod-", i)
		f.apply(t, ns, shell(name, "echo said by "+name+"; exec sleep 3600", onNode(a)))
		f.waitPod(t, ns, name, false)
		if out := f.kubectl(t, "logs", "-n", ns, name); out != "said by "+name+"\n" {
			t.Errorf("logs: %q", out)
		}
		if out := f.kubectl(t, "exec", "-n", ns, name, "--", "echo", "run in", name); out != "run in "+name+"\n" {
			t.Errorf("exec: %q", out)
		}
	}

	// A service, by its name, from pods of both agents and of the server to an endpoint
	// on one agent, which sees the address of the pod that asks.
	f.servers(t, ns, "web", 1, onNode(agents[1]))
	f.service(t, ns, "shop", "web", "")
	f.apply(t, ns, shell("pod-of-server", "exec sleep 3600", onNode(f.node)))
	for _, name := range []string{"pod-1", "pod-0", "pod-of-server"} {
		pod := f.waitPod(t, ns, name, false)
		ask := func(path string) (string, error) {
			out, err := f.tryKubectl(nil, "exec", "-n", ns, name, "--", "probe", "get", "http://shop."+ns+path)
			return strings.TrimSpace(out), err
		}
		eventually(t, 20*time.Second, func() error {
			out, err := ask("/")
			if err == nil && out != "web-0" {
				err = fmt.Errorf("it answers %q to %s", out, name)
			}
			return err
		})
		if out, err := ask("/addr"); err != nil || !strings.HasPrefix(out, pod.Status.PodIP+":") {
			t.Errorf("the endpoint saw %s, with address %s, as %q (%v)", name, pod.Status.PodIP, out, err)
		}
	}

	t.Run("restart without a token", func(t *testing.T) {
		a := agents[0]
		a.stop(t, syscall.SIGTERM, 15*time.Second)
		a.flags = []string{"--server=" + f.url()}
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		f.stillRuns(t, ns, "pod-0")
	})

	t.Run("what a node may not do", func(t *testing.T) {
		a := agents[0]
		dir := filepath.Join(a.dataDir(), "agent")
		as := func(cert string) *kubernetes.Clientset {
			config := &rest.Config{Host: f.url(), QPS: -1, Dial: f.config.Dial, TLSClientConfig: rest.TLSClientConfig{
				CAFile: filepath.Join(dir, "server-ca.crt"), CertFile: filepath.Join(dir, cert), KeyFile: filepath.Join(dir, "node.key"),
			}}
			c, err := kubernetes.NewForConfig(config)
			if err != nil {
				t.Fatal(err)
			}
			return c
		}
		ctx, node, network := context.Background(), as("node.crt"), as("network.crt")
		if _, err := node.CoreV1().Nodes().Get(ctx, a.name, metav1.GetOptions{}); err != nil {
			t.Errorf("a node cannot read itself: %v", err)
		}
		if _, err := network.CoreV1().Services("").List(ctx, metav1.ListOptions{}); err != nil {
			t.Errorf("a node's network cannot read services: %v", err)
		}
		patch := []byte(`{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":"true"}}}`)
		for what, try := range map[string]func(*kubernetes.Clientset) error{
			"list Secrets": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Secrets("kube-system").List(ctx, metav1.ListOptions{})
				return err
			},
			"read the key that belongs to its name": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Secrets("kube-system").Get(ctx, "kedge-node-"+a.name, metav1.GetOptions{})
				return err
			},
			"give another node's name to itself": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Secrets("kube-system").Patch(ctx, "kedge-node-"+agents[1].name, types.MergePatchType, []byte(`{"data":{"allowed":"dHJ1ZQ=="}}`), metav1.PatchOptions{})
				return err
			},
			"make a token": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Secrets("kube-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "kedge-token-0123456789"}, Type: "kedge.io/token"}, metav1.CreateOptions{})
				return err
			},
			"change another node": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Nodes().Patch(ctx, agents[1].name, types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{})
				return err
			},
			"have another node's address": func(c *kubernetes.Clientset) error {
				claim := fmt.Appendf(nil, `{"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, agents[1].machine.Addrs()[0].Addr())
				_, err := c.CoreV1().Nodes().Patch(ctx, a.name, types.MergePatchType, claim, metav1.PatchOptions{}, "status")
				return err
			},
			"call itself a server": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Nodes().Patch(ctx, a.name, types.MergePatchType, patch, metav1.PatchOptions{})
				return err
			},
			"run a pod elsewhere": func(c *kubernetes.Clientset) error {
				_, err := c.CoreV1().Pods(ns).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: corev1.PodSpec{NodeName: f.name, Containers: []corev1.Container{{Name: "x", Image: busybox}}}}, metav1.CreateOptions{})
				return err
			},
			"run commands in another node's pod": func(c *kubernetes.Clientset) error {
				return c.CoreV1().RESTClient().Post().Namespace(ns).Resource("pods").Name("pod-1").SubResource("exec").Param("command", "id").Do(ctx).Error()
			},
		} {
			for who, c := range map[string]*kubernetes.Clientset{"node": node, "network": network} {
				if err := try(c); !apierrors.IsForbidden(err) {
					t.Errorf("the %s's certificate can %s: %v", who, what, err)
				}
			}
		}
	})

	t.Run("start while the server is down", func(t *testing.T) {
		a := agents[0]
		a.stop(t, syscall.SIGTERM, 15*time.Second)
		f.stop(t, syscall.SIGTERM, 15*time.Second)
		if err := a.launch(); err != nil {
			t.Fatal(err)
		}
		eventually(t, 30*time.Second, func() error {
			if log := a.tail(100); !strings.Contains(log, "going on with what is known of the cluster") {
				return fmt.Errorf("it does not go on:\n%s", log)
			}
			return nil
		})
		if err := f.start(); err != nil {
			t.Fatal(err)
		}
		if err := a.waitReady(60 * time.Second); err != nil {
			t.Fatal(err)
		}
		f.stillRuns(t, ns, "pod-0")
	})

	t.Run("tokens that are refused", func(t *testing.T) {
		good := f.token(t)
		hash, rest, _ := strings.Cut(good, "::")
		id, _, _ := strings.Cut(rest, ".")
		short := f.token(t, "--ttl=1s")
		used := strings.TrimPrefix(agents[1].flags[1], "--token=")
		removed := f.token(t)
		removedID, _, _ := strings.Cut(removed[len(hash)+2:], ".")
		f.kedge(t, "token", "rm", removedID)
		time.Sleep(1100 * time.Millisecond) // what short lives
		x := f.newAgent(t)
		flip := map[byte]string{'0': "1"}[hash[2]]
		if flip == "" {
			flip = "0"
		}
		for what, c := range map[string]struct{ token, sentence string }{
			"expired": {short, "has expired"}, "used up": {used, "used as often as it may be"}, "removed": {removed, "does not know this token"},
			"guessed":            {hash + "::" + id + "." + strings.Repeat("0", 40), "does not know this token"},
			"of another cluster": {"K1" + flip + hash[3:] + "::" + rest, "not of the cluster that the token is for"},
			"cut short":          {good[:len(good)-3], "its secret is not whole"}, "of another node": {f.token(t, "--node-name=other"), "is for a node of another name"},
		} {
			x.flags = []string{"--server=" + f.url(), "--token=" + c.token}
			refused(t, what, x, c.sentence)
		}
		x.flags = []string{"--server=" + f.url()}
		refused(t, "no token", x, "has not joined a cluster yet")
	})

	t.Run("a name belongs to its key", func(t *testing.T) {
		a := agents[1]
		x := f.newAgent(t)
		for _, name := range []string{a.name, f.name} { // an agent's, and the server's own
			x.flags = []string{"--server=" + f.url(), "--token=" + f.token(t), "--node-name=" + name}
			refused(t, "the name of "+name, x, "another machine has this node's name")
			if err := os.RemoveAll(x.dataDir()); err != nil {
				t.Fatal(err)
			}
		}
		// The machine is wiped and comes back.
		a.stop(t, syscall.SIGTERM, 15*time.Second)
		if err := os.RemoveAll(filepath.Join(a.dataDir(), "agent")); err != nil {
			t.Fatal(err)
		}
		a.flags = []string{"--server=" + f.url(), "--token=" + f.token(t)}
		refused(t, "a wiped machine", a, "kedge node allow "+a.name)
		f.kedge(t, "node", "allow", a.name)
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		f.stillRuns(t, ns, "pod-1")
	})
}
