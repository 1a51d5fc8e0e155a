package identity

import (
	"bytes"
	"crypto/x509"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"kedge/internal/pki"
)

// TestPodsCA: with what every pod has kubelets can be verified, and what their authority signs
// does not pass for the API.
func TestPodsCA(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.1")
	cfg := Config{
		Dir: t.TempDir(), NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local",
		Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "default",
	}
	now := time.Now()
	id, err := Prepare(cfg, now)
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := os.ReadFile(id.PodsCA)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(id.PodsCA); err != nil {
		t.Fatal(err)
	}
	if _, err := Prepare(cfg, now.Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if again, err := os.ReadFile(id.PodsCA); err != nil || !bytes.Equal(again, bundle) {
		t.Errorf("another start, or another server, makes another file (%v): it is in a ConfigMap of every namespace", err)
	}

	leaf := func(pair pki.Pair) []byte {
		data, err := os.ReadFile(pair.CertFile)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	key, err := pki.EnsureKey(filepath.Join(t.TempDir(), "key"))
	if err != nil {
		t.Fatal(err)
	}
	signed := func(names []string, ips ...string) []byte {
		want := pki.Leaf{CommonName: "system:node:evil", DNSNames: names, Server: true}
		for _, ip := range ips {
			want.IPs = append(want.IPs, net.ParseIP(ip))
		}
		data, err := id.KubeletCA.Sign(&key.PublicKey, want, time.Hour, now)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, c := range []struct {
		what, host string
		cert       []byte
		good       bool
	}{
		{"the API", "kubernetes.default.svc.cluster.local", leaf(id.Serving), true},
		{"the API by its service's address", "10.43.0.1", leaf(id.Serving), true},
		{"the kubelet", "192.0.2.1", leaf(id.KubeletServing), true},
		{"the kubelet by name", "s1", leaf(id.KubeletServing), true},
		{"another node", "evil", signed([]string{"evil"}), true},
		{"a node that calls itself like the API", "kubernetes.default.svc", signed([]string{"evil", "kubernetes.default.svc"}), false},
		{"all of its names count", "evil", signed([]string{"evil", "kubernetes.default.svc.cluster.local"}), false},
		{"a node with the API's address", "10.43.0.1", signed([]string{"evil"}, "10.43.0.1"), false},
	} {
		for _, from := range []struct {
			what  string
			roots []byte
			good  bool
		}{{"with what pods have", bundle, c.good}, {"with the whole authorities", append(id.ServerCA.PEM(), id.KubeletCA.PEM()...), true}} {
			roots, others := x509.NewCertPool(), x509.NewCertPool()
			roots.AppendCertsFromPEM(from.roots)
			others.AppendCertsFromPEM(c.cert) // a server sends its authority too
			first, err := pki.ParseCertificate("leaf", c.cert)
			if err != nil {
				t.Fatal(err)
			}
			_, err = first.Verify(x509.VerifyOptions{DNSName: c.host, Roots: roots, Intermediates: others})
			if (err == nil) != from.good {
				t.Errorf("%s, %s: %v", c.what, from.what, err)
			}
		}
	}
}
