package security

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/servers"
	"kedge/internal/tunnel"
	"kedge/scripts/e2e/harness"
)

// impostor is who connects in the place of an agent, with its files.
type impostor struct {
	f    *harness.Fleet
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
	raw, err := i.f.Dial("tcp", fmt.Sprintf("192.0.2.1:%d", i.f.APIPort))
	if err != nil {
		t.Fatal(err)
	}
	return tunnel.Upgrade(t.Context(), tls.Client(raw, c), servers.Host)
}

// takenOver is a cluster with two agents, of which one does what somebody wants who has taken its machine over.
type takenOver struct {
	*harness.Fleet
	bad, good *harness.Node
	ns        string // with the pods on-bad and on-good
	ca        []byte // of the servers, as the bad node has it
}

func newTakenOver(t *testing.T) *takenOver {
	t.Helper()
	f := harness.NewFleet(t)
	c := &takenOver{Fleet: f, bad: f.StartAgent(t), good: f.StartAgent(t)}
	c.ns = f.Namespace(t)
	for name, a := range map[string]*harness.Node{"on-bad": c.bad, "on-good": c.good} {
		f.Apply(t, c.ns, harness.Shell(name, "exec sleep 3600", "nodeName: "+a.Name+","))
		f.WaitPod(t, c.ns, name, false)
	}
	var err error
	if c.ca, err = os.ReadFile(agentFile(c.bad, "server-ca.crt")); err != nil {
		t.Fatal(err)
	}
	return c
}

// exec asks a pod for its name, by the API server and the node's tunnel.
func (c *takenOver) exec(pod string) (string, error) {
	return c.TryKubectl(nil, "exec", "-n", c.ns, pod, "--", "hostname")
}

// agentFile is the path of a file of an agent's keys and certificates.
func agentFile(a *harness.Node, name string) string { return filepath.Join(a.DataDir(), "agent", name) }

// TestCompromisedNode is somebody who has all that a node has, and wants what another
// has.
func TestCompromisedNode(t *testing.T) {
	t.Parallel()
	c := newTakenOver(t)
	t.Run("who gets no tunnel", c.noTunnel)
	t.Run("addresses that it writes into its status", c.addressesOfAnother)
	t.Run("what it may write", func(t *testing.T) { compromised(t, c) })
	t.Run("it answers for itself only", c.answersForItself)
}

// noTunnel asks for tunnels with certificates that are none of a node, or not of its key.
func (c *takenOver) noTunnel(t *testing.T) {
	pair := func(a *harness.Node, cert, key string) func() (tls.Certificate, error) {
		return func() (tls.Certificate, error) { return tls.LoadX509KeyPair(agentFile(a, cert), agentFile(a, key)) }
	}
	stranger, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for who, cert := range map[string]func() (tls.Certificate, error){
		"nobody":              nil,
		"the network's user":  pair(c.bad, "network.crt", "node.key"),
		"a kubelet as server": pair(c.bad, "kubelet.crt", "node.key"),
		"an administrator": func() (tls.Certificate, error) {
			tlsDir := filepath.Join(c.DataDir(), "server", "tls")
			return tls.LoadX509KeyPair(filepath.Join(tlsDir, "client-admin.crt"), filepath.Join(tlsDir, "client-admin.key"))
		},
		"the other node, by an authority of its own": func() (tls.Certificate, error) {
			p, err := stranger.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser(c.good.Name), Organizations: []string{"system:nodes"}, Client: true}, time.Now())
			if err != nil {
				return tls.Certificate{}, err
			}
			return tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
		},
		// The cluster's own signature, but not for the key that has the name.
		"the other node, with another key": func() (tls.Certificate, error) {
			clients, err := pki.EnsureAuthority(filepath.Join(c.DataDir(), "server", "tls"), "client-ca", time.Now())
			if err != nil {
				return tls.Certificate{}, err
			}
			p, err := clients.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: joining.NodeUser(c.good.Name), Organizations: []string{"system:nodes"}, Client: true}, time.Now())
			if err != nil {
				return tls.Certificate{}, err
			}
			return tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
		},
	} {
		if conn, err := (impostor{c.Fleet, c.ca, cert}).connect(t); !errors.Is(err, tunnel.ErrNoUpgrade) {
			t.Errorf("%s: %v, %v", who, conn, err)
		}
	}
	if out, err := c.exec("on-good"); err != nil || out != "on-good\n" {
		t.Errorf("exec: %v, %s", err, out)
	}
}

// addressesOfAnother claims the other node's addresses, by which its kubelet would be reached.
func (c *takenOver) addressesOfAnother(t *testing.T) {
	config := &rest.Config{Host: c.URL(), QPS: -1, Dial: c.Config.Dial, TLSClientConfig: rest.TLSClientConfig{
		CAFile: agentFile(c.bad, "server-ca.crt"), CertFile: agentFile(c.bad, "node.crt"), KeyFile: agentFile(c.bad, "node.key"),
	}}
	as, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	other, err := c.Client.CoreV1().Nodes().Get(t.Context(), c.good.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var addresses []string
	for _, a := range append(other.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: joining.NodeAddress(c.good.Name).String()}) {
		addresses = append(addresses, fmt.Sprintf(`{"type":%q,"address":%q}`, a.Type, a.Address))
	}
	patch := fmt.Sprintf(`{"status":{"addresses":[%s],"daemonEndpoints":{"kubeletEndpoint":{"Port":%d}}}}`, strings.Join(addresses, ","), c.good.APIPort+1)
	if _, err := as.CoreV1().Nodes().Patch(t.Context(), c.bad.Name, types.StrategicMergePatchType, []byte(patch), metav1.PatchOptions{}, "status"); !apierrors.IsForbidden(err) {
		t.Errorf("a node claims another's addresses: %v", err)
	}
	// Each name leads to its own node, before and after the kubelet has mended it.
	for range 5 {
		for _, pod := range []string{"on-bad", "on-good"} {
			if out, err := c.exec(pod); err != nil || out != pod+"\n" {
				t.Errorf("exec in %s: %v, %s", pod, err, out)
			}
		}
	}
}

// answersForItself passes what comes through the bad node's tunnel on to the other node.
func (c *takenOver) answersForItself(t *testing.T) {
	c.bad.Stop(t, syscall.SIGTERM, 15*time.Second)
	var mu sync.Mutex
	asked := 0
	conn, err := (impostor{c.Fleet, c.ca, func() (tls.Certificate, error) {
		return tls.LoadX509KeyPair(agentFile(c.bad, "node.crt"), agentFile(c.bad, "node.key"))
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
			return c.good.Dial("tcp", fmt.Sprint("127.0.0.1:", c.good.APIPort+1))
		}, tunnel.DefaultOptions(), slog.New(slog.DiscardHandler))
	}()
	defer func() {
		cancel()
		<-served
	}()
	if out, err := c.exec("on-good"); err != nil || out != "on-good\n" {
		t.Errorf("exec in the other's pod: %v, %s", err, out)
	}
	mu.Lock()
	if asked != 0 {
		t.Errorf("it was asked for the other's kubelet %d times", asked)
	}
	mu.Unlock()
	// Nobody else's kubelet has a certificate for its name.
	if out, err := c.exec("on-bad"); err == nil || !strings.Contains(out, "x509: certificate is valid for") {
		t.Errorf("exec in its own pod, with the other's kubelet at the end of its tunnel: %v, %s", err, out)
	}
	if err := kedgeAllow(c.Fleet, c.bad.Name); err != nil {
		t.Fatal(err)
	}
	wiped := c.NewAgent(t, "--token="+c.NewToken(t), "--node-name="+c.bad.Name)
	if err := wiped.Start(); err != nil {
		t.Fatal(err)
	}
	if err := <-served; err == nil {
		t.Error("the session of the old key has ended without a reason")
	} else {
		served <- err // for the one who waits at the end
	}
	if _, err := (impostor{c.Fleet, c.ca, func() (tls.Certificate, error) {
		return tls.LoadX509KeyPair(agentFile(c.bad, "node.crt"), agentFile(c.bad, "node.key"))
	}}).connect(t); !errors.Is(err, tunnel.ErrNoUpgrade) {
		t.Errorf("the old key after another machine has the name: %v", err)
	}
}

func kedgeAllow(f *harness.Fleet, name string) error {
	out, err := f.TryKedge("node", "allow", name)
	if err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	return nil
}
