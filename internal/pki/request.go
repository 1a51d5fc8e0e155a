package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// ErrRequest is wrapped when a certificate signing request cannot be used.
var ErrRequest = errors.New("the certificate signing request is not valid")

// Request makes a certificate signing request in PEM, signed by key. Its subject is empty: the
// signer decides whose key it is.
func Request(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate signing request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), nil
}

// ParseRequest returns the public key of a request in PEM, after it has verified the request's
// signature. Everything else in the request is ignored on purpose.
func ParseRequest(data []byte) (*ecdsa.PublicKey, error) {
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE REQUEST" || len(rest) > 0 {
		return nil, fmt.Errorf("%w: want one in PEM and nothing else", ErrRequest)
	}
	r, err := x509.ParseCertificateRequest(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	key, ok := r.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, fmt.Errorf("%w: want an ECDSA key on P-256", ErrRequest)
	}
	if err := r.CheckSignature(); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrRequest, err)
	}
	return key, nil
}

// Fingerprint names a public key: the hex SHA-256 of its SubjectPublicKeyInfo.
func Fingerprint(key *ecdsa.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", fmt.Errorf("encode a public key: %w", err)
	}
	h := sha256.Sum256(der)
	return hex.EncodeToString(h[:]), nil
}

// FingerprintOf is the [Fingerprint] of the key in a certificate. A key that is no ECDSA key is an error.
func FingerprintOf(c *x509.Certificate) (string, error) {
	key, ok := c.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return "", fmt.Errorf("the certificate has a %T; kedge uses ECDSA keys", c.PublicKey)
	}
	return Fingerprint(key)
}

// ParseCertificate reads the first certificate of data in PEM; name is for errors.
func ParseCertificate(name string, data []byte) (*x509.Certificate, error) {
	return parseCert(name, data)
}

// PEM returns a certificate in PEM.
func PEM(c *x509.Certificate) []byte { return encodeCert(c.Raw) }
