package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"path/filepath"
	"testing"
	"time"
)

func TestRequestProvesItsKey(t *testing.T) {
	key, err := EnsureKey(filepath.Join(t.TempDir(), "k"))
	if err != nil {
		t.Fatal(err)
	}
	request, err := Request(key)
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParseRequest(request)
	if err != nil || !got.Equal(&key.PublicKey) {
		t.Fatalf("parsed %v, %v", got, err)
	}

	block, _ := pem.Decode(request)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	strange, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	ofRSA, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, strange)
	if err != nil {
		t.Fatal(err)
	}
	large, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ofP384, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, large)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	}
	for name, data := range map[string][]byte{
		"nothing": nil, "no PEM": []byte("x"), "a forged signature": encode(forged), "RSA": encode(ofRSA), "P-384": encode(ofP384),
		"two requests": append(bytes.Clone(request), request...),
	} {
		if _, err := ParseRequest(data); !errors.Is(err, ErrRequest) {
			t.Errorf("%s: got %v, want ErrRequest", name, err)
		}
	}
}

func TestSignEndsWithItsAuthority(t *testing.T) {
	dir := t.TempDir()
	ca, err := EnsureAuthority(dir, "ca", now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := EnsureKey(filepath.Join(dir, "k"))
	if err != nil {
		t.Fatal(err)
	}
	for life, want := range map[time.Duration]time.Time{day: now.Add(day), 2 * AuthorityLife: ca.Cert.NotAfter} {
		chain, err := ca.Sign(&key.PublicKey, leaf, life, now)
		if err != nil {
			t.Fatal(err)
		}
		c, err := ParseCertificate("the leaf", chain)
		if err != nil {
			t.Fatal(err)
		}
		if !c.NotAfter.Equal(want) {
			t.Errorf("a life of %s ends %s, want %s", life, c.NotAfter, want)
		}
	}
}
