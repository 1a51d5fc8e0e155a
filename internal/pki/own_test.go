package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// issued is a certificate that an administrator has made, with its key.
type issued struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// issue signs a certificate for a key; by is nil for its own signature. change alters what is usual for an authority.
func issue(t *testing.T, name string, key crypto.Signer, by *issued, change func(*x509.Certificate)) *issued {
	t.Helper()
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: now.Add(-day), NotAfter: now.Add(1000 * day),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if change != nil {
		change(c)
	}
	if by == nil {
		by = &issued{c, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, c, by.cert, key.Public(), by.key)
	if err != nil {
		t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &issued{made, key}
}

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// put writes the files of an authority, as openssl writes them.
func put(t *testing.T, dir, name string, cert []byte, key crypto.Signer) {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(os.WriteFile(filepath.Join(dir, name+".crt"), cert, 0o644),
		os.WriteFile(filepath.Join(dir, name+".key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600))
	if err != nil {
		t.Fatal(err)
	}
}

// TestOwnAuthority: an administrator's authority signs, also one with an RSA key that another one has signed.
func TestOwnAuthority(t *testing.T) {
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	root := issue(t, "root", rsaKey(t, 2048), nil, nil)
	for name, own := range map[string]*issued{
		"rsa":          issue(t, "own", rsaKey(t, 2048), nil, nil),
		"p384":         issue(t, "own", p384, nil, nil),
		"intermediate": issue(t, "own", rsaKey(t, 3072), root, func(c *x509.Certificate) { c.MaxPathLenZero = true }),
	} {
		dir := t.TempDir()
		put(t, dir, "ca", encodeCert(own.cert.Raw), own.key)
		ca, p := ensure(t, dir, leaf, now)
		if !ca.Cert.Equal(own.cert) {
			t.Errorf("%s: the authority was replaced", name)
		}
		pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		c, err := x509.ParseCertificate(pair.Certificate[0])
		if err != nil {
			t.Fatal(err)
		}
		roots := x509.NewCertPool()
		roots.AddCert(ca.Cert)
		if _, err := c.Verify(x509.VerifyOptions{DNSName: "a", Roots: roots, CurrentTime: now}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if _, p := ensure(t, dir, leaf, now.Add(day)); p.Renewed {
			t.Errorf("%s: the second call signed again", name)
		}
		if e := (File{Name: "ca", CertFile: ca.CertFile(), KeyFile: ca.KeyFile()}).Examine(now); e.Problem != "" {
			t.Errorf("%s: %s", name, e.Problem)
		}
		first, err := ca.Limited([]string{"x"}, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
		second, _ := ca.Limited([]string{"x"}, []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")})
		if err != nil || !bytes.Equal(first, second) {
			t.Errorf("%s: limited certificates differ: %v", name, err)
		}
	}
}

func TestOwnAuthorityRefused(t *testing.T) {
	own := issue(t, "own", rsaKey(t, 2048), nil, nil)
	root := issue(t, "root", rsaKey(t, 2048), nil, nil)
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	short := rsaKey(t, 1024)
	for sentence, files := range map[string]*issued{
		"do not belong together":           {own.cert, root.key},
		"it needs CA:TRUE and keyCertSign": issue(t, "leaf", rsaKey(t, 2048), nil, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, x509.KeyUsageDigitalSignature }),
		"CA:TRUE and keyCertSign":          issue(t, "no signer", rsaKey(t, 2048), nil, func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }),
		"needs CA:TRUE and keyCertSign":    issue(t, "no authority", rsaKey(t, 2048), nil, func(c *x509.Certificate) { c.IsCA, c.KeyUsage = false, 0 }),
		"RSA key of 1024 bits":             issue(t, "short", short, nil, nil),
		"use an ECDSA or RSA key":          issue(t, "edwards", edwards, nil, nil),
		"has expired":                      issue(t, "old", rsaKey(t, 2048), nil, func(c *x509.Certificate) { c.NotAfter = now.Add(-1) }),
	} {
		dir := t.TempDir()
		put(t, dir, "ca", encodeCert(files.cert.Raw), files.key)
		if _, err := EnsureAuthority(dir, "ca", now); err == nil || !strings.Contains(err.Error(), sentence) {
			t.Errorf("%s: %v", sentence, err)
		}
	}
	dir := t.TempDir()
	put(t, dir, "ca", append(encodeCert(own.cert.Raw), encodeCert(root.cert.Raw)...), own.key)
	if _, err := EnsureAuthority(dir, "ca", now); err == nil || !strings.Contains(err.Error(), "holds 2 certificates") {
		t.Errorf("a chain: %v", err)
	}
}
