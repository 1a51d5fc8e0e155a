package join

import (
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"kedge/internal/joining"
	"kedge/internal/pki"
)

// witness joins as a witness with a key in dir.
func (c *cluster) witness(t *testing.T, dir, name, tok string) (joining.WitnessAnswer, *ecdsa.PrivateKey, error) {
	t.Helper()
	key, err := pki.EnsureKey(filepath.Join(dir, "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := joining.ParseToken(tok)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.Request(key)
	if err != nil {
		t.Fatal(err)
	}
	a, err := joining.JoinWitness(context.Background(), c.url, c.cfg.ServerCA.Cert, joining.ServerRequest{
		Request: joining.Request{TokenID: parsed.ID, Secret: string(parsed.Secret), NodeName: name, CSR: string(csr)},
		Peers:   []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:2380")},
	})
	return a, key, err
}

// TestWitnessGetsItsCertificateOnly: a witness gets the certificate of its datastore, renews it with its key, and gets
// nothing with which a node or a server could act.
func TestWitnessGetsItsCertificateOnly(t *testing.T) {
	c := newCluster(t, nil)
	dir := t.TempDir()
	a, key, err := c.witness(t, dir, "w", c.token(t, Spec{Role: joining.Witness}))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(c.admitted, []string{"w"}) || len(a.Admission) == 0 {
		t.Errorf("admitted %v, admission %s", c.admitted, a.Admission)
	}
	proof, err := joining.ProveKey(key, "w", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	renewed, err := joining.RenewWitness(t.Context(), c.url, c.cfg.ServerCA.Cert, proof)
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"join": a.Certificate, "renewal": renewed.Certificate} {
		cert, err := pki.ParseCertificate(what, []byte(text))
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AddCert(c.cfg.PeerCA.Cert)
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: "peer.test", KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if !slices.Equal(cert.Subject.Organization, []string{joining.WitnessGroup}) {
			t.Errorf("%s: the certificate is like a server's: %s", what, cert.Subject)
		}
		if pub, ok := cert.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(&key.PublicKey) {
			t.Errorf("%s: the certificate is for another key", what)
		}
	}
	_, _, err = joining.Renew(t.Context(), c.url, c.cfg.ServerCA.Cert, proof)
	wantRefusal(t, "a witness that asks for the certificates of a node", err, ErrUnknownNode)
}

// TestWhoIsWitness: which tokens let a witness in, and that no other machine renews as one.
func TestWhoIsWitness(t *testing.T) {
	c := newCluster(t, func(cfg *Config) {
		cfg.Preshared = map[joining.Role]joining.Secret{joining.Agent: "the-secret-of-all-agents", joining.Server: "the-secret-of-all-servers"}
	})
	_, _, err := c.witness(t, t.TempDir(), "w1", c.token(t, Spec{Role: joining.Agent}))
	wantRefusal(t, "a token for agents", err, ErrRole)
	_, _, err = c.witness(t, t.TempDir(), "w1", "the-secret-of-all-agents")
	wantRefusal(t, "the secret of agents", err, ErrRole)
	for name, tok := range map[string]string{"w2": c.token(t, Spec{Role: joining.Server}), "w3": "the-secret-of-all-servers"} {
		if _, _, err := c.witness(t, t.TempDir(), name, tok); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	forWitness := c.token(t, Spec{Role: joining.Witness, Uses: 9})
	_, _, err = c.server(t, t.TempDir(), "s", forWitness)
	wantRefusal(t, "a token for witnesses, used by a server", err, ErrRole)
	_, err = c.machine(t.TempDir(), "a", forWitness)
	wantRefusal(t, "a token for witnesses, used by an agent", err, ErrRole)

	dir := t.TempDir()
	agent := c.mustJoin(t, dir, "agent", c.token(t, Spec{}))
	key, err := pki.LoadKey(agent.KeyFile())
	if err != nil {
		t.Fatal(err)
	}
	proof, err := joining.ProveKey(key, "agent", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	_, err = joining.RenewWitness(t.Context(), c.url, c.cfg.ServerCA.Cert, proof)
	wantRefusal(t, "an agent that asks for the certificate of a witness", err, ErrUnknownNode)
}
