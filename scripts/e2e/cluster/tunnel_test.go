package cluster

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"

	"kedge/internal/namespaces"
	"kedge/scripts/e2e/harness"
)

// Addresses behind a router.
var (
	routerInside = netip.MustParsePrefix("198.51.100.1/24")
	hostInside   = netip.MustParsePrefix("198.51.100.2/24")
)

// behindNAT makes a network of its own behind a router that is on the fleet's switch
// and translates addresses. Nothing on the switch has a way to the host in it.
func behindNAT(t *testing.T, f *harness.Fleet) *namespaces.Network {
	t.Helper()
	router := f.JoinHost(t)
	t.Cleanup(func() { router.Close() })
	inner, err := namespaces.NewNetwork()
	if err != nil {
		t.Fatal(err)
	}
	err = router.Do(func() error {
		pair := netlink.NewVeth(netlink.NewLinkAttrs())
		pair.Name, pair.PeerName, pair.PeerNamespace = "inside", "eth0", netlink.NsFd(inner.FD())
		if err := netlink.LinkAdd(pair); err != nil {
			return fmt.Errorf("the cable behind the router: %w", err)
		}
		return errors.Join(linkUp("inside", routerInside),
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644), masquerade("eth0"))
	})
	if err == nil {
		err = inner.Do(func() error {
			if err := errors.Join(linkUp("lo", netip.Prefix{}), linkUp("eth0", hostInside)); err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{Gw: routerInside.Addr().AsSlice()})
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return inner
}

// linkUp sets an interface of the namespace up, with an address if that is valid.
func linkUp(name string, a netip.Prefix) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(l); err != nil || !a.IsValid() {
		return err
	}
	return netlink.AddrAdd(l, &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), 32)}})
}

// masquerade gives what leaves by an interface the interface's address.
func masquerade(link string) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	table := c.AddTable(&nftables.Table{Name: "router", Family: nftables.TableFamilyIPv4})
	chain := c.AddChain(&nftables.Chain{Name: "out", Table: table, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	name := make([]byte, 16)
	copy(name, link)
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}, &expr.Masq{},
	}})
	return c.Flush()
}

// behind is a server and an agent behind a router that translates addresses.
type behind struct {
	*harness.Fleet
	agent   *harness.Node
	ns      string // with the pod "pod" on the agent
	onAgent string // fields of a pod that is to run there
}

func newBehind(t *testing.T) *behind {
	t.Helper()
	f := harness.NewFleet(t)
	b := &behind{Fleet: f}
	b.agent = b.NewAgentAt(t, behindNAT(t, f), "--token="+b.NewToken(t))
	if err := harness.PrepareImages(b.agent.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := b.agent.Start(); err != nil {
		t.Fatal(err)
	}
	kubelet := netip.AddrPortFrom(hostInside.Addr(), uint16(b.agent.APIPort+1)).String()
	if err := b.agent.Inside(func() error {
		c, err := net.DialTimeout("tcp", kubelet, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Fatalf("the kubelet does not listen on %s: %v", kubelet, err)
	}
	if err := b.Inside(func() error {
		c, err := net.DialTimeout("tcp", kubelet, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}); err == nil {
		t.Fatal("the server can connect to the kubelet: there is no NAT")
	}
	b.onAgent = fmt.Sprintf("nodeName: %s,", b.agent.Name)
	b.ns = b.Namespace(t)
	b.Apply(t, b.ns, harness.Shell("pod", "echo said; exec probe serve :8080 by-the-pod", b.onAgent))
	b.WaitPod(t, b.ns, "pod", false)
	return b
}

// TestAgentBehindNAT: nothing can connect to the agent, and the API server does all it
// does with any other node.
func TestAgentBehindNAT(t *testing.T) {
	t.Parallel()
	b := newBehind(t)
	t.Run("logs, exec, attach", b.talks)
	t.Run("much, there and back", b.muchData)
	t.Run("port-forward", b.portForward)
	t.Run("proxies", b.proxies)
	t.Run("webhook", func(t *testing.T) { b.CheckAdmissionWebhooks(t, b.onAgent) })
	t.Run("aggregated API", func(t *testing.T) { b.CheckAggregatedAPI(t, b.onAgent) })
	t.Run("many at a time", b.manyAtATime)
	t.Run("the server restarts", b.serverRestarts)
}

// talks reads logs of the pod and runs commands in it.
func (b *behind) talks(t *testing.T) {
	if out := b.Kubectl(t, "logs", "-n", b.ns, "pod"); !strings.HasPrefix(out, "said\n") {
		t.Errorf("logs: %q", out)
	}
	if out := b.Kubectl(t, "exec", "-n", b.ns, "pod", "--", "echo", "run"); out != "run\n" {
		t.Errorf("exec: %q", out)
	}
	if out, err := b.TryKubectl(nil, "exec", "-n", b.ns, "pod", "--", "sh", "-c", "exit 7"); err == nil || !strings.Contains(out+err.Error(), "7") {
		t.Errorf("the exit code: %v, %s", err, out)
	}
}

// muchData sends 30 MiB in and out.
func (b *behind) muchData(t *testing.T) {
	data := make([]byte, 30<<20)
	_, _ = rand.Read(data) // never fails
	out, err := b.TryKubectl(bytes.NewReader(data), "exec", "-i", "-n", b.ns, "pod", "--", "sh", "-c", "cat > /tmp/much; sha256sum </tmp/much")
	if want := fmt.Sprintf("%x  -\n", sha256.Sum256(data)); err != nil || out != want {
		t.Fatalf("there: %v, %q, want %q", err, out, want)
	}
	if out, err = b.TryKubectl(nil, "exec", "-n", b.ns, "pod", "--", "cat", "/tmp/much"); err != nil || out != string(data) {
		t.Errorf("back: %v, %d bytes of %d", err, len(out), len(data))
	}
}

// portForward forwards a port of the pod, three times.
func (b *behind) portForward(t *testing.T) {
	url := forward(t, b.Fleet, b.ns, "pod/pod", 8080)
	for range 3 {
		harness.Eventually(t, 10*time.Second, func() error {
			got, err := b.Get(url)
			if err == nil && strings.TrimSpace(got) != "by-the-pod" {
				err = fmt.Errorf("it answers %q", got)
			}
			return err
		})
	}
}

// proxies asks by the API's proxies to nodes, pods and services.
func (b *behind) proxies(t *testing.T) {
	b.Service(t, b.ns, "shop", "pod", "")
	for path, want := range map[string]string{
		"/api/v1/nodes/" + b.agent.Name + "/proxy/healthz":                                      "ok",
		"/api/v1/nodes/" + b.agent.Name + "/proxy/metrics":                                      "kubelet_running_pods",
		"/api/v1/nodes/" + b.agent.Name + "/proxy/pods":                                         `"name":"pod"`,
		"/api/v1/namespaces/" + b.ns + "/pods/pod:8080/proxy/":                                  "by-the-pod",
		"/api/v1/namespaces/" + b.ns + "/services/shop:80/proxy/":                               "by-the-pod",
		"/api/v1/nodes/" + b.agent.Name + "/proxy/configz":                                      "kubeletconfig",
		fmt.Sprintf("/api/v1/nodes/%s:%d/proxy/healthz", b.agent.Name, b.agent.APIPort+1):       "ok",
		fmt.Sprintf("/api/v1/nodes/https:%s:%d/proxy/healthz", b.agent.Name, b.agent.APIPort+1): "ok",
	} {
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := b.TryKubectl(nil, "get", "--raw", path)
			if err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("%s: %v, %.200q", path, err, out)
			}
			return nil
		})
	}
	if out, err := b.TryKubectl(nil, "get", "--raw", "/api/v1/nodes/"+b.agent.Name+":22/proxy/"); err == nil || !strings.Contains(out, "only the kubelet") {
		t.Errorf("another port of the node: %v, %s", err, out)
	}
}

// manyAtATime reads 200 logs at once, beside 20 that nobody reads.
func (b *behind) manyAtATime(t *testing.T) {
	// More than what a stream and its sockets hold, for those who do not read it.
	b.Apply(t, b.ns, harness.Shell("chatty", `awk 'BEGIN { for (i = 0; i < 50000; i++) print "line " i " of many that are to be read by somebody" }'; exec sleep 3600`, b.onAgent))
	b.WaitPod(t, b.ns, "chatty", false)
	harness.Eventually(t, 30*time.Second, func() error {
		if out := b.Kubectl(t, "logs", "-n", b.ns, "chatty", "--tail=1"); !strings.HasPrefix(out, "line 49999 ") {
			return fmt.Errorf("it has not said all yet: %q", out)
		}
		return nil
	})
	logs := func(o corev1.PodLogOptions) (io.ReadCloser, error) {
		return b.Client.CoreV1().Pods(b.ns).GetLogs("chatty", &o).Stream(t.Context())
	}
	for range 20 {
		r, err := logs(corev1.PodLogOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
	}
	last := int64(2000)
	var all sync.WaitGroup
	for range 200 {
		all.Go(func() {
			r, err := logs(corev1.PodLogOptions{TailLines: &last})
			if err != nil {
				t.Error(err)
				return
			}
			defer r.Close()
			count := int64(0)
			for lines := bufio.NewScanner(r); lines.Scan(); count++ {
				if want := fmt.Sprintf("line %d ", 50000-last+count); !strings.HasPrefix(lines.Text(), want) {
					t.Errorf("in place of %q comes %q", want, lines.Text())
					return
				}
			}
			if count != last {
				t.Errorf("%d lines came, want %d", count, last)
			}
		})
	}
	all.Wait()
}

// serverRestarts starts the server again: the agent comes back by itself.
func (b *behind) serverRestarts(t *testing.T) {
	b.Stop(t, syscall.SIGTERM, 20*time.Second)
	if err := b.Start(); err != nil {
		t.Fatal(err)
	}
	b.StillRuns(t, b.ns, "pod")
}

// TestServerWithoutANode has no way to pods and services but through its agents.
func TestServerWithoutANode(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t, "--disable-agent")
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	onAgent := fmt.Sprintf("nodeName: %s,", a.Name)
	ns := f.Namespace(t)
	f.Servers(t, ns, "web", 1, onAgent)
	f.Service(t, ns, "shop", "web", "")
	for _, path := range []string{"pods/web-0:8080/proxy/", "services/shop:80/proxy/"} {
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := f.TryKubectl(nil, "get", "--raw", "/api/v1/namespaces/"+ns+"/"+path)
			if err != nil || strings.TrimSpace(out) != "web-0" {
				return fmt.Errorf("%s: %v, %.200q", path, err, out)
			}
			return nil
		})
	}
	if out := f.Kubectl(t, "exec", "-n", ns, "web-0", "--", "echo", "run"); out != "run\n" {
		t.Errorf("exec: %q", out)
	}
	f.CheckAdmissionWebhooks(t, onAgent)
	f.CheckAggregatedAPI(t, onAgent)
}

// TestTunnelsToAllServers: each server reaches the kubelets of all nodes, those of the
// other servers too.
func TestTunnelsToAllServers(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t)
	second := harness.NewNode("second")
	second.Network, second.APIPort = f.JoinHost(t), f.APIPort // all servers have one port
	fields := strings.Fields(f.Kedge(t, "token", "create", "--role=server"))
	second.Flags = []string{"--server=" + f.URL(), "--token=" + fields[len(fields)-1]}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", second.Name, second.Tail(40))
		}
		if err := second.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	for _, n := range []*harness.Node{second, a} {
		if err := harness.PrepareImages(n.DataDir()); err != nil {
			t.Fatal(err)
		}
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
	}
	ns := f.Namespace(t)
	for _, n := range []*harness.Node{f.Node, second, a} {
		f.Apply(t, ns, harness.Shell("on-"+n.Name, "exec sleep 3600", "nodeName: "+n.Name+","))
		f.WaitPod(t, ns, "on-"+n.Name, false)
	}
	for _, from := range []*harness.Node{f.Node, second} {
		for _, to := range []*harness.Node{f.Node, second, a} {
			harness.Eventually(t, 20*time.Second, func() error { // the agent hears of the second server when its watch does
				out, err := from.TryKubectl(nil, "exec", "-n", ns, "on-"+to.Name, "--", "echo", "run")
				if err != nil || out != "run\n" {
					return fmt.Errorf("exec from %s to %s: %v, %s", from.Name, to.Name, err, out)
				}
				return nil
			})
		}
	}
	for n, want := range map[*harness.Node]int{f.Node: 1, second: 1, a: 2} {
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := n.Run("status", "--run-dir="+n.RunDir())
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "tunnel ") && strings.Count(line, "192.0.2.") == want {
					return err
				}
			}
			return fmt.Errorf("%s does not have %d tunnels: %v\n%s", n.Name, want, err, out)
		})
	}
}

// forward starts kubectl port-forward, and returns the URL on the server's host.
func forward(t *testing.T, f *harness.Fleet, ns, what string, port int) string {
	t.Helper()
	out, next := harness.LineWriter(t)
	f.StartKubectl(t, nil, out, "port-forward", "-n", ns, what, fmt.Sprint(":", port))
	line, err := next()
	if err != nil {
		t.Fatal(err)
	}
	var local int
	if _, err := fmt.Sscanf(line, "Forwarding from 127.0.0.1:%d -> ", &local); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return fmt.Sprintf("http://127.0.0.1:%d/", local)
}
