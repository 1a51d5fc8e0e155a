package e2e

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/joining"
	"kedge/internal/netns"
	"kedge/internal/pki"
	"kedge/internal/servers"
	"kedge/internal/tunnel"
)

// Addresses behind a router.
var (
	routerInside = netip.MustParsePrefix("198.51.100.1/24")
	hostInside   = netip.MustParsePrefix("198.51.100.2/24")
)

// behindNAT makes a network of its own behind a router that is on the fleet's switch
// and translates addresses. Nothing on the switch has a way to the host in it.
func (f *fleet) behindNAT(t *testing.T) *netns.NS {
	t.Helper()
	router := f.host(t)
	t.Cleanup(func() { router.Close() })
	inner, err := netns.New()
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

// TestAgentBehindNAT: nothing can connect to the agent, and the API server does all it
// does with any other node.
func TestAgentBehindNAT(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	a := f.newAgentAt(t, f.behindNAT(t), "--token="+f.token(t))
	if err := prepareImages(a.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	kubelet := netip.AddrPortFrom(hostInside.Addr(), uint16(a.apiPort+1)).String()
	if err := a.inside(func() error {
		c, err := net.DialTimeout("tcp", kubelet, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}); err != nil {
		t.Fatalf("the kubelet does not listen on %s: %v", kubelet, err)
	}
	if err := f.inside(func() error {
		c, err := net.DialTimeout("tcp", kubelet, time.Second)
		if err == nil {
			c.Close()
		}
		return err
	}); err == nil {
		t.Fatal("the server can connect to the kubelet: there is no NAT")
	}
	onAgent := fmt.Sprintf("nodeName: %s,", a.name)
	ns := f.namespace(t)
	f.apply(t, ns, shell("pod", "echo said; exec probe serve :8080 by-the-pod", onAgent))
	f.waitPod(t, ns, "pod", false)

	t.Run("logs, exec, attach", func(t *testing.T) {
		if out := f.kubectl(t, "logs", "-n", ns, "pod"); !strings.HasPrefix(out, "said\n") {
			t.Errorf("logs: %q", out)
		}
		if out := f.kubectl(t, "exec", "-n", ns, "pod", "--", "echo", "run"); out != "run\n" {
			t.Errorf("exec: %q", out)
		}
		if out, err := f.tryKubectl(nil, "exec", "-n", ns, "pod", "--", "sh", "-c", "exit 7"); err == nil || !strings.Contains(out+err.Error(), "7") {
			t.Errorf("the exit code: %v, %s", err, out)
		}
	})

	t.Run("much, there and back", func(t *testing.T) {
		data := make([]byte, 30<<20)
		_, _ = rand.Read(data) // never fails
		out, err := f.tryKubectl(bytes.NewReader(data), "exec", "-i", "-n", ns, "pod", "--", "sh", "-c", "cat > /tmp/much; sha256sum </tmp/much")
		if want := fmt.Sprintf("%x  -\n", sha256.Sum256(data)); err != nil || out != want {
			t.Fatalf("there: %v, %q, want %q", err, out, want)
		}
		if out, err = f.tryKubectl(nil, "exec", "-n", ns, "pod", "--", "cat", "/tmp/much"); err != nil || out != string(data) {
			t.Errorf("back: %v, %d bytes of %d", err, len(out), len(data))
		}
	})

	t.Run("port-forward", func(t *testing.T) {
		url := f.forward(t, ns, "pod/pod", 8080)
		for range 3 {
			eventually(t, 10*time.Second, func() error {
				got, err := f.get(url)
				if err == nil && strings.TrimSpace(got) != "by-the-pod" {
					err = fmt.Errorf("it answers %q", got)
				}
				return err
			})
		}
	})

	t.Run("proxies", func(t *testing.T) {
		f.service(t, ns, "shop", "pod", "")
		for path, want := range map[string]string{
			"/api/v1/nodes/" + a.name + "/proxy/healthz":                                "ok",
			"/api/v1/nodes/" + a.name + "/proxy/metrics":                                "kubelet_running_pods",
			"/api/v1/nodes/" + a.name + "/proxy/pods":                                   `"name":"pod"`,
			"/api/v1/namespaces/" + ns + "/pods/pod:8080/proxy/":                        "by-the-pod",
			"/api/v1/namespaces/" + ns + "/services/shop:80/proxy/":                     "by-the-pod",
			"/api/v1/nodes/" + a.name + "/proxy/configz":                                "kubeletconfig",
			fmt.Sprintf("/api/v1/nodes/%s:%d/proxy/healthz", a.name, a.apiPort+1):       "ok",
			fmt.Sprintf("/api/v1/nodes/https:%s:%d/proxy/healthz", a.name, a.apiPort+1): "ok",
		} {
			eventually(t, 20*time.Second, func() error {
				out, err := f.tryKubectl(nil, "get", "--raw", path)
				if err != nil || !strings.Contains(out, want) {
					return fmt.Errorf("%s: %v, %.200q", path, err, out)
				}
				return nil
			})
		}
		if out, err := f.tryKubectl(nil, "get", "--raw", "/api/v1/nodes/"+a.name+":22/proxy/"); err == nil || !strings.Contains(out, "only the kubelet") {
			t.Errorf("another port of the node: %v, %s", err, out)
		}
	})

	t.Run("webhook", func(t *testing.T) { f.admissionWebhooks(t, onAgent) })
	t.Run("aggregated API", func(t *testing.T) { f.aggregatedAPI(t, onAgent) })

	t.Run("many at a time", func(t *testing.T) {
		// More than what a stream and its sockets hold, for those who do not read it.
		f.apply(t, ns, shell("chatty", `awk 'BEGIN { for (i = 0; i < 50000; i++) print "line " i " of many that are to be read by somebody" }'; exec sleep 3600`, onAgent))
		f.waitPod(t, ns, "chatty", false)
		eventually(t, 30*time.Second, func() error {
			if out := f.kubectl(t, "logs", "-n", ns, "chatty", "--tail=1"); !strings.HasPrefix(out, "line 49999 ") {
				return fmt.Errorf("it has not said all yet: %q", out)
			}
			return nil
		})
		logs := func(o corev1.PodLogOptions) (io.ReadCloser, error) {
			return f.client.CoreV1().Pods(ns).GetLogs("chatty", &o).Stream(t.Context())
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
	})

	t.Run("the server restarts", func(t *testing.T) {
		f.stop(t, syscall.SIGTERM, 20*time.Second)
		if err := f.start(); err != nil {
			t.Fatal(err)
		}
		f.stillRuns(t, ns, "pod")
	})
}

// TestServerWithoutANode has no way to pods and services but through its agents.
func TestServerWithoutANode(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "--disable-agent")
	a := f.newAgent(t, "--token="+f.token(t))
	if err := prepareImages(a.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	onAgent := fmt.Sprintf("nodeName: %s,", a.name)
	ns := f.namespace(t)
	f.servers(t, ns, "web", 1, onAgent)
	f.service(t, ns, "shop", "web", "")
	for _, path := range []string{"pods/web-0:8080/proxy/", "services/shop:80/proxy/"} {
		eventually(t, 20*time.Second, func() error {
			out, err := f.tryKubectl(nil, "get", "--raw", "/api/v1/namespaces/"+ns+"/"+path)
			if err != nil || strings.TrimSpace(out) != "web-0" {
				return fmt.Errorf("%s: %v, %.200q", path, err, out)
			}
			return nil
		})
	}
	if out := f.kubectl(t, "exec", "-n", ns, "web-0", "--", "echo", "run"); out != "run\n" {
		t.Errorf("exec: %q", out)
	}
	f.admissionWebhooks(t, onAgent)
	f.aggregatedAPI(t, onAgent)
}

// TestTunnelsToAllServers: each server reaches the kubelets of all nodes, those of the
// other servers too.
func TestTunnelsToAllServers(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	second := newNode("second")
	second.network, second.apiPort = f.host(t), f.apiPort // all servers have one port
	fields := strings.Fields(f.kedge(t, "token", "create", "--role=server"))
	second.flags = []string{"--server=" + f.url(), "--token=" + fields[len(fields)-1]}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", second.name, second.tail(40))
		}
		if err := second.destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	a := f.newAgent(t, "--token="+f.token(t))
	for _, n := range []*node{second, a} {
		if err := prepareImages(n.dataDir()); err != nil {
			t.Fatal(err)
		}
		if err := n.start(); err != nil {
			t.Fatal(err)
		}
	}
	ns := f.namespace(t)
	for _, n := range []*node{f.node, second, a} {
		f.apply(t, ns, shell("on-"+n.name, "exec sleep 3600", "nodeName: "+n.name+","))
		f.waitPod(t, ns, "on-"+n.name, false)
	}
	for _, from := range []*node{f.node, second} {
		for _, to := range []*node{f.node, second, a} {
			eventually(t, 20*time.Second, func() error { // the agent hears of the second server when its watch does
				out, err := from.tryKubectl(nil, "exec", "-n", ns, "on-"+to.name, "--", "echo", "run")
				if err != nil || out != "run\n" {
					return fmt.Errorf("exec from %s to %s: %v, %s", from.name, to.name, err, out)
				}
				return nil
			})
		}
	}
	for n, want := range map[*node]int{f.node: 1, second: 1, a: 2} {
		eventually(t, 20*time.Second, func() error {
			out, err := n.run("status", "--run-dir="+n.runDir())
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "tunnel ") && strings.Count(line, "192.0.2.") == want {
					return err
				}
			}
			return fmt.Errorf("%s does not have %d tunnels: %v\n%s", n.name, want, err, out)
		})
	}
}

// forward starts kubectl port-forward, and returns the URL on the server's host.
func (f *fleet) forward(t *testing.T, ns, what string, port int) string {
	t.Helper()
	out, next := lines(t)
	f.startKubectl(t, nil, out, "port-forward", "-n", ns, what, fmt.Sprint(":", port))
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

// impostor is who connects in the place of an agent, with its files.
type impostor struct {
	f    *fleet
	ca   []byte
	cert func() (tls.Certificate, error)
}

// connect asks for a tunnel.
func (i impostor) connect(t *testing.T) (net.Conn, error) {
	t.Helper()
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(i.ca) {
		t.Fatal("no authority")
	}
	c := &tls.Config{RootCAs: roots, ServerName: servers.Host, NextProtos: []string{"http/1.1"}}
	if i.cert != nil {
		cert, err := i.cert()
		if err != nil {
			t.Fatal(err)
		}
		c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	raw, err := i.f.dial("tcp", fmt.Sprintf("192.0.2.1:%d", i.f.apiPort))
	if err != nil {
		t.Fatal(err)
	}
	return tunnel.Upgrade(t.Context(), tls.Client(raw, c), servers.Host)
}

// TestCompromisedNode is somebody who has all that a node has, and wants what another
// has.
func TestCompromisedNode(t *testing.T) {
	t.Parallel()
	f := newFleet(t)
	var agents []*node
	for range 2 {
		a := f.newAgent(t, "--token="+f.token(t))
		if err := prepareImages(a.dataDir()); err != nil {
			t.Fatal(err)
		}
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		agents = append(agents, a)
	}
	bad, good := agents[0], agents[1]
	ns := f.namespace(t)
	for name, a := range map[string]*node{"on-bad": bad, "on-good": good} {
		f.apply(t, ns, shell(name, "exec sleep 3600", "nodeName: "+a.name+","))
		f.waitPod(t, ns, name, false)
	}
	exec := func(pod string) (string, error) {
		return f.tryKubectl(nil, "exec", "-n", ns, pod, "--", "hostname")
	}
	file := func(a *node, name string) string { return filepath.Join(a.dataDir(), "agent", name) }
	ca, err := os.ReadFile(file(bad, "server-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}

	t.Run("who gets no tunnel", func(t *testing.T) {
		pair := func(a *node, cert, key string) func() (tls.Certificate, error) {
			return func() (tls.Certificate, error) { return tls.LoadX509KeyPair(file(a, cert), file(a, key)) }
		}
		stranger, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		for who, cert := range map[string]func() (tls.Certificate, error){
			"nobody":              nil,
			"the network's user":  pair(bad, "network.crt", "node.key"),
			"a kubelet as server": pair(bad, "kubelet.crt", "node.key"),
			"an administrator": func() (tls.Certificate, error) {
				tlsDir := filepath.Join(f.dataDir(), "server", "tls")
				return tls.LoadX509KeyPair(filepath.Join(tlsDir, "client-admin.crt"), filepath.Join(tlsDir, "client-admin.key"))
			},
			"the other node, by an authority of its own": func() (tls.Certificate, error) {
				p, err := stranger.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser(good.name), Organizations: []string{"system:nodes"}, Client: true}, time.Now())
				if err != nil {
					return tls.Certificate{}, err
				}
				return tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
			},
			// The cluster's own signature, but not for the key that has the name.
			"the other node, with another key": func() (tls.Certificate, error) {
				clients, err := pki.EnsureAuthority(filepath.Join(f.dataDir(), "server", "tls"), "client-ca", time.Now())
				if err != nil {
					return tls.Certificate{}, err
				}
				p, err := clients.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser(good.name), Organizations: []string{"system:nodes"}, Client: true}, time.Now())
				if err != nil {
					return tls.Certificate{}, err
				}
				return tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
			},
		} {
			if conn, err := (impostor{f, ca, cert}).connect(t); !errors.Is(err, tunnel.ErrNoUpgrade) {
				t.Errorf("%s: %v, %v", who, conn, err)
			}
		}
		if out, err := exec("on-good"); err != nil || out != "on-good\n" {
			t.Errorf("exec: %v, %s", err, out)
		}
	})

	t.Run("addresses that it writes into its status", func(t *testing.T) {
		config := &rest.Config{Host: f.url(), QPS: -1, Dial: f.config.Dial, TLSClientConfig: rest.TLSClientConfig{
			CAFile: file(bad, "server-ca.crt"), CertFile: file(bad, "node.crt"), KeyFile: file(bad, "node.key"),
		}}
		as, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		other, err := f.client.CoreV1().Nodes().Get(t.Context(), good.name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		var addresses []string
		for _, a := range append(other.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: joining.NodeAddress(good.name).String()}) {
			addresses = append(addresses, fmt.Sprintf(`{"type":%q,"address":%q}`, a.Type, a.Address))
		}
		patch := fmt.Sprintf(`{"status":{"addresses":[%s],"daemonEndpoints":{"kubeletEndpoint":{"Port":%d}}}}`, strings.Join(addresses, ","), good.apiPort+1)
		if _, err := as.CoreV1().Nodes().Patch(t.Context(), bad.name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status"); !apierrors.IsForbidden(err) {
			t.Errorf("a node claims another's addresses: %v", err)
		}
		// Each name leads to its own node, before and after the kubelet has mended it.
		for range 5 {
			for _, pod := range []string{"on-bad", "on-good"} {
				if out, err := exec(pod); err != nil || out != pod+"\n" {
					t.Errorf("exec in %s: %v, %s", pod, err, out)
				}
			}
		}
	})

	t.Run("it answers for itself only", func(t *testing.T) {
		bad.stop(t, syscall.SIGTERM, 15*time.Second)
		var mu sync.Mutex
		asked := 0
		conn, err := (impostor{f, ca, func() (tls.Certificate, error) {
			return tls.LoadX509KeyPair(file(bad, "node.crt"), file(bad, "node.key"))
		}}).connect(t)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan error, 1)
		go func() {
			served <- tunnel.Serve(ctx, conn, func(ctx context.Context, _ tunnel.Destination) (net.Conn, error) {
				mu.Lock()
				defer mu.Unlock()
				asked++
				// It passes the connection on to the other node's kubelet.
				return good.dial("tcp", fmt.Sprint("127.0.0.1:", good.apiPort+1))
			}, tunnel.DefaultOptions(), slog.New(slog.DiscardHandler))
		}()
		defer func() {
			cancel()
			<-served
		}()
		if out, err := exec("on-good"); err != nil || out != "on-good\n" {
			t.Errorf("exec in the other's pod: %v, %s", err, out)
		}
		mu.Lock()
		if asked != 0 {
			t.Errorf("it was asked for the other's kubelet %d times", asked)
		}
		mu.Unlock()
		// Nobody else's kubelet has a certificate for its name.
		if out, err := exec("on-bad"); err == nil || !strings.Contains(out, "x509: certificate is valid for") {
			t.Errorf("exec in its own pod, with the other's kubelet at the end of its tunnel: %v, %s", err, out)
		}
		if err := f.kedgeAllow(bad.name); err != nil {
			t.Fatal(err)
		}
		wiped := f.newAgent(t, "--token="+f.token(t), "--node-name="+bad.name)
		if err := wiped.start(); err != nil {
			t.Fatal(err)
		}
		if err := <-served; err == nil {
			t.Error("the session of the old key has ended without a reason")
		} else {
			served <- err // for the one who waits at the end
		}
		if _, err := (impostor{f, ca, func() (tls.Certificate, error) {
			return tls.LoadX509KeyPair(file(bad, "node.crt"), file(bad, "node.key"))
		}}).connect(t); !errors.Is(err, tunnel.ErrNoUpgrade) {
			t.Errorf("the old key after another machine has the name: %v", err)
		}
	})
}

func (f *fleet) kedgeAllow(name string) error {
	out, err := f.tryKedge("node", "allow", name)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
