package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var (
	day  = 24 * time.Hour
	now  = time.Date(2026, 6, 1, 12, 0, 0, 0, time.UTC)
	leaf = Leaf{CommonName: "n", Organizations: []string{"o"}, DNSNames: []string{"a", "b"}, IPs: []net.IP{net.IPv4(10, 0, 0, 1)}, Server: true, Client: true}
)

func ensure(t *testing.T, dir string, want Leaf, at time.Time) (*Authority, Pair) {
	t.Helper()
	ca, err := EnsureAuthority(dir, "ca", at)
	if err != nil {
		t.Fatal(err)
	}
	p, err := ca.EnsureLeaf(dir, "leaf", want, at)
	if err != nil {
		t.Fatal(err)
	}
	return ca, p
}

func TestLeafVerifiesAndIsStable(t *testing.T) {
	dir := t.TempDir()
	ca, p := ensure(t, dir, leaf, now)
	if !p.Renewed {
		t.Error("the first certificate was not signed")
	}
	pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	c, _ := x509.ParseCertificate(pair.Certificate[0])
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	for _, name := range []string{"a", "b", "10.0.0.1"} {
		if _, err := c.Verify(x509.VerifyOptions{DNSName: name, Roots: roots, CurrentTime: now}); err != nil {
			t.Errorf("verify for %s: %v", name, err)
		}
	}
	again, p2 := ensure(t, dir, leaf, now.Add(day))
	if p2.Renewed || again.Hash() != ca.Hash() {
		t.Error("a second call changed the certificate or the authority")
	}
	for file, mode := range map[string]os.FileMode{"ca.key": 0o600, "leaf.key": 0o600, "ca.crt": 0o644, "leaf.crt": 0o644} {
		st, err := os.Stat(filepath.Join(dir, file))
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v; want %v", file, st.Mode(), err, mode)
		}
	}
}

func TestLeafIsRenewed(t *testing.T) {
	other := leaf
	other.DNSNames = []string{"a", "c"}
	for _, tc := range []struct {
		name string
		want Leaf
		at   time.Time
		hurt func(dir string)
		new  bool
	}{
		{"two thirds of its life left", leaf, now.Add(120 * day), nil, false},
		{"less than a third left", leaf, now.Add(250 * day), nil, true},
		{"expired", leaf, now.Add(500 * day), nil, true},
		{"signed while the clock was years ahead", leaf, now.Add(-3 * 365 * day), nil, true},
		{"other names", other, now, nil, true},
		{"certificate lost", leaf, now, func(d string) { os.Remove(filepath.Join(d, "leaf.crt")) }, true},
		{"certificate empty", leaf, now, func(d string) { os.Truncate(filepath.Join(d, "leaf.crt"), 0) }, true},
		{"key lost", leaf, now, func(d string) { os.Remove(filepath.Join(d, "leaf.key")) }, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			ensure(t, dir, leaf, now)
			if tc.hurt != nil {
				tc.hurt(dir)
			}
			_, p := ensure(t, dir, tc.want, tc.at)
			if p.Renewed != tc.new {
				t.Errorf("renewed %v, want %v", p.Renewed, tc.new)
			}
			if _, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile); err != nil {
				t.Error(err)
			}
		})
	}
}

// A crash can happen after any file was written: what was durable before must
// not change afterwards.
func TestAuthorityAfterCrashBetweenKeyAndCertificate(t *testing.T) {
	dir := t.TempDir()
	key, err := EnsureKey(filepath.Join(dir, "ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	ca, err := EnsureAuthority(dir, "ca", now)
	if err != nil {
		t.Fatal(err)
	}
	if !key.Equal(ca.key) {
		t.Error("the key was replaced")
	}
}

func TestBrokenAuthorities(t *testing.T) {
	dir := t.TempDir()
	if _, err := EnsureAuthority(dir, "ca", now); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureAuthority(dir, "ca", now.Add(11*365*day)); !errors.Is(err, ErrExpired) {
		t.Errorf("got %v, want ErrExpired", err)
	}
	os.Remove(filepath.Join(dir, "ca.key"))
	if _, err := EnsureAuthority(dir, "ca", now); err == nil || !strings.Contains(err.Error(), "ca.key is missing") {
		t.Errorf("without its key: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "ca.key")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a key was made for a certificate that has another: %v", err)
	}
	if _, err := EnsureKey(filepath.Join(dir, "ca.key")); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureAuthority(dir, "ca", now); !errors.Is(err, ErrMismatch) {
		t.Errorf("got %v, want ErrMismatch", err)
	}
	os.WriteFile(filepath.Join(dir, "ca.key"), []byte("rubbish"), 0o600)
	if _, err := EnsureAuthority(dir, "ca", now); err == nil {
		t.Error("a damaged key was accepted")
	}
}

// TestLeafOfAnotherAuthority: an authority that was made anew with the old key signs the same, and is another.
func TestLeafOfAnotherAuthority(t *testing.T) {
	dir := t.TempDir()
	ensure(t, dir, leaf, now)
	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	ca, p := ensure(t, dir, leaf, now.Add(day))
	if !p.Renewed {
		t.Error("the certificate of the authority before was kept")
	}
	pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	c, _ := x509.ParseCertificate(pair.Certificate[0])
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	if _, err := c.Verify(x509.VerifyOptions{DNSName: "a", Roots: roots, CurrentTime: now.Add(day)}); err != nil {
		t.Error(err)
	}
}

// TestDamagedLeaf: a leaf's certificate and key are made anew, and so is the rest of the chain.
func TestDamagedLeaf(t *testing.T) {
	for name, damage := range map[string]func(p Pair) error{
		"no key":             func(p Pair) error { return os.Remove(p.KeyFile) },
		"a key of nothing":   func(p Pair) error { return os.WriteFile(p.KeyFile, nil, 0o600) },
		"a certificate of x": func(p Pair) error { return os.WriteFile(p.CertFile, []byte("x"), 0o600) },
		"half a chain":       func(p Pair) error { return os.Truncate(p.CertFile, 700) },
	} {
		dir := t.TempDir()
		ca, p := ensure(t, dir, leaf, now)
		if err := damage(p); err != nil {
			t.Fatal(err)
		}
		if p, err := ca.EnsureLeaf(dir, "leaf", leaf, now); err != nil || !p.Renewed {
			t.Errorf("%s: %+v, %v", name, p, err)
		}
		if pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile); err != nil || len(pair.Certificate) != 2 {
			t.Errorf("%s: %v", name, err)
		}
	}
}
