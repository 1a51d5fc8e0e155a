package identity

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
)

// TestOwnAccountKey: an administrator's key signs the tokens of service accounts, in any usual form; what cannot be used is
// refused before anything is written.
func TestOwnAccountKey(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for what, block := range map[string]*pem.Block{
		"PKCS #8": {Type: "PRIVATE KEY", Bytes: der}, "PKCS #1": {Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)},
		"a certificate": {Type: "CERTIFICATE", Bytes: der},
	} {
		cfg := testIdentity(t.TempDir())
		path := AccountKeysFile(cfg.Dir)
		text := pem.EncodeToMemory(block)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, text, 0o600)); err != nil {
			t.Fatal(err)
		}
		_, err := Prepare(cfg, time.Now())
		if what == "a certificate" {
			if err == nil || !strings.Contains(err.Error(), "service accounts' tokens cannot be used") || len(contentOf(t, cfg.Dir)) != 1 {
				t.Errorf("%s: %v, %d files", what, err, len(contentOf(t, cfg.Dir)))
			}
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
		cfg.Established = true
		if _, err := Prepare(cfg, time.Now()); err != nil {
			t.Errorf("%s, at the second start: %v", what, err)
		}
		if after, err := os.ReadFile(path); err != nil || string(after) != string(text) {
			t.Errorf("%s: the file was changed: %v", what, err)
		}
	}
}

// TestReplaceAccountKeys: after each step of a change of the keys the next start accepts the files as they are, and afterwards it
// refuses the former file.
func TestReplaceAccountKeys(t *testing.T) {
	now := time.Now()
	cfg := testIdentity(t.TempDir())
	if _, err := Prepare(cfg, now); err != nil {
		t.Fatal(err)
	}
	cfg.Established = true
	path, known := AccountKeysFile(cfg.Dir), filepath.Join(cfg.Dir, knownFile)
	read := func(path string) []byte {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	write := func(path string, data []byte) {
		t.Helper()
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, err := pki.LoadSigningKeys(path)
	if err != nil {
		t.Fatal(err)
	}
	second, err := pki.NewSigningKey()
	if err != nil {
		t.Fatal(err)
	}
	original := read(path)
	for _, next := range [][]pki.SigningKey{{first[0], second}, {second, first[0]}, {second}} {
		fileBefore, knownBefore := read(path), read(known)
		if err := ReplaceAccountKeys(cfg.Dir, next); err != nil {
			t.Fatal(err)
		}
		fileAfter, knownAfter := read(path), read(known)
		// What a crash between the writes leaves: the fingerprints of both, and either file.
		had, err := pki.ParseSigningKeys(path, fileBefore)
		if err != nil {
			t.Fatal(err)
		}
		prints, err := accountKeyPrints(append(had, next...))
		if err != nil {
			t.Fatal(err)
		}
		write(known, knownBefore)
		if err := rememberKeys(cfg.Dir, accountKeysName, prints); err != nil {
			t.Fatal(err)
		}
		between := read(known)
		for _, file := range [][]byte{fileBefore, fileAfter} {
			write(known, between)
			write(path, file)
			if _, err := Prepare(cfg, now); err != nil {
				t.Error(err)
			}
		}
		write(known, knownAfter)
		if _, err := Prepare(cfg, now); err != nil {
			t.Error(err)
		}
	}
	write(path, original)
	if _, err := Prepare(cfg, now); !errors.Is(err, ErrLost) {
		t.Errorf("the former key: %v", err)
	}
}
