package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"kedge/internal/atomicfile"
)

// ErrDamaged is wrapped when a file does not have the expected content.
var ErrDamaged = errors.New("the file is damaged")

// EnsureKey loads the ECDSA P-256 private key in path (PEM, PKCS #8 or SEC 1),
// or makes one there with mode 0600.
func EnsureKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := LoadKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		return writeKey(path)
	}
	return key, err
}

// LoadKey is EnsureKey without making a key.
func LoadKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%w: %s holds no PEM block; restore it from a backup", ErrDamaged, path)
	}
	if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	any, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: read key %s: %w; restore it from a backup", ErrDamaged, path, err)
	}
	key, ok := any.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key %s is a %T; kedge uses ECDSA keys", path, any)
	}
	return key, nil
}

// writeKey makes a key in path, in place of another.
func writeKey(path string) (*ecdsa.PrivateKey, error) {
	key, data, err := NewKey()
	if err != nil {
		return nil, fmt.Errorf("key %s: %w", path, err)
	}
	return key, atomicfile.Write(path, data, 0o600)
}

// NewKey makes an ECDSA P-256 private key that is in no file. data is the key in PEM.
func NewKey() (key *ecdsa.PrivateKey, data []byte, err error) {
	if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	// SEC 1 rather than PKCS #8: the service account token signer of
	// Kubernetes and every older tool read it.
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		return nil, nil, fmt.Errorf("encode a key: %w", err)
	}
	return key, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der}), nil
}

func encodeCert(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func parseCert(path string, data []byte) (*x509.Certificate, error) {
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%w: %s holds no certificate in PEM; restore it from a backup", ErrDamaged, path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: read certificate %s: %w; restore it from a backup", ErrDamaged, path, err)
	}
	return c, nil
}
