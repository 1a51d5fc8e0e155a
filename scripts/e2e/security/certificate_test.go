package security

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestCertificates: "kedge certificate" knows all certificates of a server and of an agent, finds what is wrong with them, and
// makes new ones, which the running node uses without a restart. Some of the cluster's authorities are an administrator's own.
func TestCertificates(t *testing.T) {
	t.Parallel()
	own := map[string][]byte{}
	f := harness.NewPreparedFleet(t, func(n *harness.Node) { own = ownAuthorities(t, filepath.Join(n.DataDir(), "server", "tls")) })
	if !bytes.Equal(f.Config.CAData, own["server-ca"]) {
		t.Errorf("clients are to trust\n%s", f.Config.CAData)
	}
	a := f.StartAgent(t)
	harness.Eventually(t, 30*time.Second, func() error { return f.NodeIsReady(a.Name) })
	ns := f.Namespace(t)
	for _, n := range []*harness.Node{f.Node, a} {
		f.Apply(t, ns, harness.Shell("on-"+n.Name, "exec sleep 3600", "nodeName: "+n.Name+","))
	}
	for _, n := range []*harness.Node{f.Node, a} {
		f.WaitPod(t, ns, "on-"+n.Name, false)
		mustCertificate(t, n, 0, "certificates are good", "check")
		mustCertificate(t, n, 2, "", "rotate", "nothing")
	}
	var listed []struct {
		Name, File, Authority, UsedBy, Problem string
		Ends                                   time.Time
	}
	if err := json.Unmarshal([]byte(mustCertificate(t, f.Node, 0, "", "ls", "-o=json")), &listed); err != nil || len(listed) != 13 {
		t.Errorf("listed are %+v, %v", listed, err)
	}
	mustCertificate(t, f.Node, 2, "is an authority", "rotate", "server-ca")

	address := map[*harness.Node]string{f.Node: "192.0.2.1", a: "192.0.2.2"}
	served := func(n *harness.Node, what string) string {
		t.Helper()
		port := n.APIPort
		if what == "kubelet" {
			port++
		}
		return servedBy(t, f, net.JoinHostPort(address[n], fmt.Sprint(port)))
	}
	works := func(n *harness.Node, before map[string]string) {
		t.Helper()
		for what, old := range before {
			harness.Eventually(t, 90*time.Second, func() error {
				if served(n, what) == old {
					return fmt.Errorf("%s of %s still serves the old certificate", what, n.Name)
				}
				return nil
			})
		}
		for _, on := range []*harness.Node{f.Node, a} {
			if out := f.Kubectl(t, "exec", "-n", ns, "on-"+on.Name, "--", "echo", "here"); out != "here\n" {
				t.Errorf("exec on %s: %q", on.Name, out)
			}
		}
	}
	before := map[string]string{"API": served(f.Node, "API"), "kubelet": served(f.Node, "kubelet")}
	mustCertificate(t, f.Node, 0, "serving-kube-apiserver\n", "rotate")
	works(f.Node, before)
	before = map[string]string{"kubelet": served(a, "kubelet")}
	mustCertificate(t, a, 0, "node\nnetwork\nkubelet\n", "rotate")
	works(a, before)

	// Stopped nodes, which use the new ones when they start.
	a.Stop(t, syscall.SIGTERM, 20*time.Second)
	before = map[string]string{"kubelet": harness.FileContent(a.DataDir(), "agent", "kubelet.crt")}
	mustCertificate(t, a, 0, "node\nnetwork\nkubelet\n", "rotate")
	if harness.FileContent(a.DataDir(), "agent", "kubelet.crt") == before["kubelet"] {
		t.Error("the stopped agent has its old certificate")
	}
	f.Stop(t, syscall.SIGTERM, 20*time.Second)
	mustCertificate(t, a, 1, "no server has renewed", "rotate")
	mustCertificate(t, f.Node, 0, "client-kube-apiserver\n", "rotate", "client-kube-apiserver")
	if err := os.Truncate(filepath.Join(f.DataDir(), "server/tls/peer.crt"), 0); err != nil {
		t.Fatal(err)
	}
	mustCertificate(t, f.Node, 3, "/server/tls/peer.crt", "check")
	for _, n := range []*harness.Node{f.Node, a} {
		if err := n.Start(); err != nil {
			t.Fatal(err)
		}
		mustCertificate(t, n, 0, "certificates are good", "check")
	}
	harness.Eventually(t, 30*time.Second, func() error { return f.NodeIsReady(a.Name) })
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := f.TryKubectl(nil, "exec", "-n", ns, "on-"+a.Name, "--", "echo", "here")
		if err != nil || out != "here\n" {
			return fmt.Errorf("exec on the agent: %v, %s", err, out)
		}
		return nil
	})
}

// mustCertificate runs "kedge certificate" for a node, and checks its exit code and what it prints.
func mustCertificate(t *testing.T, n *harness.Node, code int, want string, args ...string) string {
	t.Helper()
	out, err := n.RunKedge(append([]string{"certificate"}, args...)...) // on its machine, where a stopped agent reaches its servers
	got := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	if got != code || !strings.Contains(out, want) {
		t.Fatalf("certificate %v of %s: exit code %d, want %d, and %q:\n%s", args, n.Name, got, code, want, out)
	}
	return out
}

// servedBy returns the certificate that a port serves with.
func servedBy(t *testing.T, f *harness.Fleet, address string) string {
	t.Helper()
	conn, err := f.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	return string(c.ConnectionState().PeerCertificates[0].Raw)
}

// ownAuthorities makes authorities as an administrator does with openssl, with RSA keys too, in the folder of a server that has
// not started yet. It returns their certificates in PEM.
func ownAuthorities(t *testing.T, dir string) map[string][]byte {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	certs := map[string][]byte{}
	for name, key := range map[string]crypto.Signer{"server-ca": rsaKey, "client-ca": rsaKey, "kubelet-ca": p384} {
		c := &x509.Certificate{
			SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "own " + name}, NotBefore: time.Now().Add(-time.Hour),
			NotAfter: time.Now().Add(10 * 365 * 24 * time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
		der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		certs[name] = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
		err = errors.Join(os.WriteFile(filepath.Join(dir, name+".crt"), certs[name], 0o644),
			os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600))
		if err != nil {
			t.Fatal(err)
		}
	}
	return certs
}
