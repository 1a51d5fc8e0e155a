package pki

import (
	"crypto/ecdsa"
	"crypto/hpke"
	"errors"
	"fmt"
)

// ErrSealed is wrapped when a sealed message cannot be opened: it is for another key or another
// purpose, or was changed on the way.
var ErrSealed = errors.New("the sealed message is not for this key")

// Seal encrypts a message so that only the holder of the private key can read it
// (HPKE, RFC 9180, in base mode: the sender is not authenticated). purpose must be the
// same at [Open].
func Seal(to *ecdsa.PublicKey, purpose string, message []byte) ([]byte, error) {
	pub, err := to.ECDH()
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	recipient, err := hpke.NewDHKEMPublicKey(pub)
	if err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return hpke.Seal(recipient, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(purpose), message)
}

// Open decrypts a message that was sealed for the key.
func Open(with *ecdsa.PrivateKey, purpose string, sealed []byte) ([]byte, error) {
	key, err := with.ECDH()
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	recipient, err := hpke.NewDHKEMPrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	message, err := hpke.Open(recipient, hpke.HKDFSHA256(), hpke.AES256GCM(), []byte(purpose), sealed)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrSealed, err)
	}
	return message, nil
}
