package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
)

// SigningKey is a private key that signs tokens. A file can have several: the first signs, and the others are known for the
// tokens that they have signed.
type SigningKey struct {
	crypto.Signer
	ID string // by which tokens name it ("kid"); it reveals nothing of the key
}

// EnsureSigningKeys loads the keys in path (PEM), or makes one there with mode 0600.
func EnsureSigningKeys(path string) ([]SigningKey, error) {
	keys, err := LoadSigningKeys(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return keys, err
	}
	if _, err := writeKey(path); err != nil {
		return nil, err
	}
	return LoadSigningKeys(path)
}

// LoadSigningKeys is EnsureSigningKeys without making a key.
func LoadSigningKeys(path string) ([]SigningKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return ParseSigningKeys(path, data)
}

// ParseSigningKeys reads the keys in the content of a file: ECDSA keys of the three curves that tokens can have, and RSA keys, in
// PKCS #8, SEC 1 or PKCS #1. There is one at least. name is for errors.
func ParseSigningKeys(name string, data []byte) (keys []SigningKey, err error) {
	for {
		var block *pem.Block
		if block, data = nextKey(data); block == nil {
			break
		}
		switch block.Type {
		case "PRIVATE KEY", "EC PRIVATE KEY", "RSA PRIVATE KEY":
		case "ENCRYPTED PRIVATE KEY":
			return nil, fmt.Errorf("%s has a key with a passphrase; give one without", name)
		default:
			return nil, fmt.Errorf("%s has a %s; it may have private keys only, and keys whose tokens are to be accepted too are given with --kube-apiserver-arg=service-account-key-file=FILE", name, block.Type)
		}
		key, err := parseSigner(name, block)
		if err != nil {
			return nil, err
		}
		if ec, ok := key.(*ecdsa.PrivateKey); ok && ec.Curve != elliptic.P256() && ec.Curve != elliptic.P384() && ec.Curve != elliptic.P521() {
			return nil, fmt.Errorf("key %s is on the curve %s; tokens are signed on P-256, P-384 or P-521", name, ec.Curve.Params().Name)
		}
		id, err := signingKeyID(key)
		if err != nil {
			return nil, fmt.Errorf("key %s: %w", name, err)
		}
		if slices.ContainsFunc(keys, func(k SigningKey) bool { return k.ID == id }) {
			return nil, fmt.Errorf("%s has a key twice", name)
		}
		keys = append(keys, SigningKey{key, id})
	}
	if len(keys) == 0 {
		return nil, fmt.Errorf("%w: %s holds no private key in PEM; restore it from a backup", ErrDamaged, name)
	}
	if rest := bytes.TrimSpace(data); len(rest) > 0 {
		return nil, fmt.Errorf("%w: %s has something after its last key that is no PEM block; restore it from a backup", ErrDamaged, name)
	}
	return keys, nil
}

// NewSigningKey makes an ECDSA P-256 key that is in no file.
func NewSigningKey() (SigningKey, error) {
	key, _, err := NewKey()
	if err != nil {
		return SigningKey{}, err
	}
	id, err := signingKeyID(key)
	return SigningKey{key, id}, err
}

// EncodeSigningKeys returns the content of a file with the keys, as [ParseSigningKeys] and Kubernetes read it.
func EncodeSigningKeys(keys []SigningKey) ([]byte, error) {
	var out []byte
	for _, k := range keys {
		block := pem.Block{}
		switch key := k.Signer.(type) {
		case *ecdsa.PrivateKey:
			der, err := x509.MarshalECPrivateKey(key)
			if err != nil {
				return nil, fmt.Errorf("encode a key: %w", err)
			}
			block = pem.Block{Type: "EC PRIVATE KEY", Bytes: der}
		case *rsa.PrivateKey:
			block = pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}
		default:
			return nil, fmt.Errorf("encode a key: it is a %T", key)
		}
		out = append(out, pem.EncodeToMemory(&block)...)
	}
	return out, nil
}

// signingKeyID is the ID that Kubernetes gives a key.
func signingKeyID(key crypto.Signer) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return "", fmt.Errorf("encode a public key: %w", err)
	}
	sum := sha256.Sum256(der)
	return base64.RawURLEncoding.EncodeToString(sum[:]), nil
}
