package pki

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
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
	any, err := loadSigner(path)
	if err != nil {
		return nil, err
	}
	key, ok := any.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("key %s is a %T; kedge uses ECDSA keys", path, any)
	}
	return key, nil
}

// minRSA is the least length of an RSA key, in bits.
const minRSA = 2048

// loadSigner loads the private key in path (PEM, PKCS #8, SEC 1 or PKCS #1): an ECDSA key, or an RSA key, which authorities of
// administrators have.
func loadSigner(path string) (crypto.Signer, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := nextKey(data)
	if block == nil {
		return nil, fmt.Errorf("%w: %s holds no PEM block; restore it from a backup", ErrDamaged, path)
	}
	return parseSigner(path, block)
}

// nextKey returns the next PEM block that is not a curve's name, which openssl writes before the key, and what follows.
func nextKey(data []byte) (*pem.Block, []byte) {
	block, rest := pem.Decode(data)
	for block != nil && block.Type == "EC PARAMETERS" {
		block, rest = pem.Decode(rest)
	}
	return block, rest
}

func parseSigner(path string, block *pem.Block) (crypto.Signer, error) {
	if key, err := x509.ParseECPrivateKey(block.Bytes); err == nil {
		return key, nil
	}
	var (
		key any
		err error
	)
	if key, err = x509.ParsePKCS1PrivateKey(block.Bytes); err != nil {
		if key, err = x509.ParsePKCS8PrivateKey(block.Bytes); err != nil {
			return nil, fmt.Errorf("%w: read key %s: %w; restore it from a backup", ErrDamaged, path, err)
		}
	}
	switch key := key.(type) {
	case *ecdsa.PrivateKey:
		return key, nil
	case *rsa.PrivateKey:
		if bits := key.N.BitLen(); bits < minRSA {
			return nil, fmt.Errorf("key %s is an RSA key of %d bits; it must have %d at least", path, bits, minRSA)
		}
		return key, nil
	default:
		return nil, fmt.Errorf("key %s is a %T; use an ECDSA or RSA key", path, key)
	}
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
