package bundle

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"aead.dev/minisign"

	"kedge/appliance/release"
	"kedge/internal/atomicfile"
)

// Trust is what a machine demands of the signatures of bundles.
type Trust struct {
	Keys []release.Key
	// Demanded means that an unsigned bundle is refused, because the machine was told which keys to trust.
	Demanded bool
}

// MachineTrust returns the trust of this machine: the keys in a file such as [release.TrustedKeysFile], and those that the
// executable has. Only the file makes a signature necessary: releases, and not bundles, are signed with the others.
func MachineTrust(file string) (Trust, error) {
	keys, err := release.Trusted(file)
	return Trust{Keys: keys, Demanded: len(keys) > len(release.BuiltIn())}, err
}

// Signed returns the ID of the key that has signed the bundle, as minisign prints it, or an empty text.
func (b *File) Signed() string {
	var s minisign.Signature
	if len(b.signature) == 0 || s.UnmarshalText(b.signature) != nil {
		return ""
	}
	return fmt.Sprintf("%016X", s.KeyID)
}

// CheckSignature returns a [*TrustError] if a bundle is not signed as trust demands. A warning is for a bundle that is
// accepted without a valid signature.
func (b *File) CheckSignature(trust Trust) (warning string, err error) {
	id := b.Signed()
	var reason string
	switch {
	case len(b.signature) == 0:
		reason = "it is not signed"
	case id == "":
		return "", &TrustError{b.Path, "its signature is damaged; copy it again"}
	default:
		known := false
		for _, k := range trust.Keys {
			if minisign.Verify(k, b.raw, b.signature) {
				return "", nil
			}
			known = known || fmt.Sprintf("%016X", k.ID()) == id
		}
		if known {
			return "", &TrustError{b.Path, "its content is not what was signed; copy it again, and do not use it if the error stays"}
		}
		reason = "it is signed with key " + id + ", which is unknown"
	}
	if trust.Demanded {
		return "", &TrustError{b.Path, reason + "; sign it with a key of " + release.TrustedKeysFile + ", or add the key to that file"}
	}
	return fmt.Sprintf("the bundle %s is used without a check of its origin: %s, and %s names no key", b.Path, reason, release.TrustedKeysFile), nil
}

// ReadKey reads the file of a secret key, as minisign -G writes it. password is asked for the password of a key that has
// one.
func ReadKey(file string, password func() (string, error)) (key minisign.PrivateKey, err error) {
	text, err := atomicfile.ReadSmall(file, maxSignature)
	if err != nil {
		return key, err
	}
	text = bytes.TrimSpace(text)
	if !minisign.IsEncrypted(text) {
		if err := key.UnmarshalText(text); err != nil {
			return key, fmt.Errorf("%s is not the secret key of minisign; create one with minisign -G", file)
		}
		return key, nil
	}
	word, err := password()
	if err != nil {
		return key, err
	}
	if key, err = minisign.DecryptKey(word, text); err != nil {
		return key, fmt.Errorf("%s cannot be decrypted with this password", file)
	}
	return key, nil
}

// sign returns the signature of an index. It says nothing about time or place, so that it is the same each time.
func sign(index []byte, id string, key minisign.PrivateKey) ([]byte, error) {
	r := minisign.NewReader(bytes.NewReader(index))
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	text := r.SignWithComments(key, "bundle "+id, "signature of a bundle of kedge")
	if len(text) > maxSignature {
		return nil, errors.New("the signature is too long")
	}
	return text, nil
}
