package identity

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/pki"
)

// What runs longer than a certificate lives gets another in time, for the addresses that
// the machine has by then, and nothing is signed before it is needed.
func TestRenewal(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.1")
	cfg := Config{
		Dir: t.TempDir(), NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local",
		Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "default",
	}
	begin := time.Now()
	id, err := Prepare(cfg, begin)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	r := NewRenewal(cfg, id, slog.New(slog.NewTextHandler(&out, nil)))
	read := func() (serving, kubeconfig string) {
		t.Helper()
		var texts [2]string
		for i, path := range []string{id.Serving.CertFile, cfg.Kubeconfig} {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			texts[i] = string(data)
		}
		return texts[0], texts[1]
	}
	serving, kubeconfig := read()
	if err := r.renew(begin.Add(pki.LeafLife / 2)); err != nil {
		t.Fatal(err)
	}
	if s, k := read(); s != serving || k != kubeconfig || out.Len() > 0 {
		t.Errorf("renewed at half of its life: %s", &out)
	}

	cfg.AdvertiseAddress = netip.MustParseAddr("198.51.100.7")
	cfg.NodeIPs = []netip.Addr{cfg.AdvertiseAddress}
	if err := r.Moved(cfg, begin.Add(pki.LeafLife/2)); err != nil {
		t.Fatal(err)
	}
	moved, k := read()
	if moved == serving || k != kubeconfig || strings.Count(out.String(), "was renewed") != 2 {
		t.Errorf("at another address: %s", &out)
	}
	if err := r.renew(begin.Add(pki.LeafLife * 3 / 4)); err != nil {
		t.Fatal(err)
	}
	// What was signed at the move, the two with addresses, is good for longer; the other
	// four were renewed.
	s, k := read()
	if s != moved || k == kubeconfig || strings.Count(out.String(), "was renewed") != 2+4 {
		t.Errorf("at three quarters of its life: %s", &out)
	}
	if err := r.renew(begin.Add(pki.LeafLife * 5 / 4)); err != nil {
		t.Fatal(err)
	}
	s, _ = read()
	c, err := pki.ParseCertificate("serving", []byte(s))
	if err != nil {
		t.Fatal(err)
	}
	if s == moved || c.NotAfter.Before(begin.Add(pki.LeafLife*2)) || c.VerifyHostname("198.51.100.7") != nil || c.VerifyHostname("192.0.2.1") == nil {
		t.Errorf("the next one is valid until %s for %v", c.NotAfter, c.IPAddresses)
	}
}

// TestKubeconfigName: the administrator's kubeconfig has the configured name, and the URL in it is one that the API's
// certificate is for.
func TestKubeconfigName(t *testing.T) {
	address := netip.MustParseAddr("192.0.2.1")
	cfg := Config{
		Dir: t.TempDir(), NodeName: "s1", HTTPSPort: 6443, AdvertiseAddress: address, NodeIPs: []netip.Addr{address}, TLSSANs: []string{"kedge.example.org"},
		ServiceIP: netip.MustParseAddr("10.43.0.1"), ClusterDomain: "cluster.local",
		Kubeconfig: filepath.Join(t.TempDir(), "kubeconfig"), KubeconfigMode: 0o600, KubeconfigName: "site 7: north",
	}
	id, err := Prepare(cfg, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	k, err := clientcmd.LoadFromFile(cfg.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	c := k.Contexts[k.CurrentContext]
	if k.CurrentContext != cfg.KubeconfigName || c == nil || k.Clusters[c.Cluster] == nil || c.Cluster != cfg.KubeconfigName || k.AuthInfos[c.AuthInfo] == nil || c.AuthInfo != cfg.KubeconfigName {
		t.Errorf("it has the context %q, %+v", k.CurrentContext, c)
	}
	for server, fits := range map[string]bool{
		k.Clusters[c.Cluster].Server: true, "https://192.0.2.1:6443": true, "https://kedge.example.org": true,
		"https://192.0.2.2:6443": false, "https://example.org": false,
	} {
		if why, err := id.Unnamed(server); err != nil || (why == "") != fits {
			t.Errorf("%s: %q, %v", server, why, err)
		}
	}
}
