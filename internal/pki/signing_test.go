package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func block(kind string, der []byte, err error) string {
	if err != nil {
		panic(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func ids(keys []SigningKey) (ids []string) {
	for _, k := range keys {
		ids = append(ids, k.ID)
	}
	return ids
}

// TestSigningKeys: keys of administrators are read in each of their forms, and are the same after a way through kedge's file.
func TestSigningKeys(t *testing.T) {
	path := filepath.Join(t.TempDir(), "k.key")
	made, err := EnsureSigningKeys(path)
	if err != nil || len(made) != 1 {
		t.Fatalf("%v, %v", made, err)
	}
	again, err := EnsureSigningKeys(path)
	if err != nil || !slices.Equal(ids(again), ids(made)) {
		t.Fatalf("%v, %v", again, err)
	}
	ec := func(c elliptic.Curve) *ecdsa.PrivateKey {
		key, err := ecdsa.GenerateKey(c, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	sec1 := func(key *ecdsa.PrivateKey) string {
		der, err := x509.MarshalECPrivateKey(key)
		return block("EC PRIVATE KEY", der, err)
	}
	pkcs8 := func(key crypto.Signer) string {
		der, err := x509.MarshalPKCS8PrivateKey(key)
		return block("PRIVATE KEY", der, err)
	}
	rsa := rsaKey(t, 2048)
	all := sec1(ec(elliptic.P256())) + block("EC PARAMETERS", []byte("x"), nil) + sec1(ec(elliptic.P521())) +
		pkcs8(ec(elliptic.P384())) + pkcs8(rsa) + block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsaKey(t, 2048)), nil)
	keys, err := ParseSigningKeys("f", []byte(all))
	if err != nil || len(keys) != 5 || !rsa.Equal(keys[3].Signer) {
		t.Fatalf("%v, %v", keys, err)
	}
	text, err := EncodeSigningKeys(keys)
	if err != nil {
		t.Fatal(err)
	}
	if again, err = ParseSigningKeys("f", text); err != nil || !slices.Equal(ids(again), ids(keys)) {
		t.Fatalf("%v, %v", again, err)
	}
	if another, err := NewSigningKey(); err != nil || len(another.ID) != 43 || another.ID == made[0].ID {
		t.Errorf("%v, %v", another, err)
	}

	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, err := x509.MarshalPKIXPublicKey(rsa.Public())
	for what, text := range map[string]string{
		"no private key":     "",
		"a PUBLIC KEY":       all + block("PUBLIC KEY", public, err),
		"a CERTIFICATE":      block("CERTIFICATE", []byte("x"), nil),
		"with a passphrase":  block("ENCRYPTED PRIVATE KEY", []byte("x"), nil),
		"on the curve P-224": sec1(ec(elliptic.P224())),
		"use an ECDSA or":    pkcs8(edwards),
		"1024 bits":          pkcs8(rsaKey(t, 1024)),
		"twice":              pkcs8(rsa) + block("RSA PRIVATE KEY", x509.MarshalPKCS1PrivateKey(rsa), nil),
		"after its last key": all + "-----BEGIN EC PRIVATE KEY-----\nxx",
		"is damaged":         block("EC PRIVATE KEY", []byte("x"), nil),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if keys, err := EnsureSigningKeys(path); err == nil || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v, %v", what, keys, err)
		}
	}
}
