// Package token is the format of join tokens, K1<hash>::<id>.<secret>: the
// SHA-256 of the cluster's authority, by which a joining machine knows the cluster
// before it says anything; the token's name, which is no secret; and the secret.
//
// It keeps no tokens and decides nothing about who may join: that is server/join.
// Any package of kedge may import it.
package token

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// ErrFormat is wrapped when a text is no token.
var ErrFormat = errors.New("that is no join token")

// Preshared is the id of the token that an administrator has fixed with --token.
const Preshared = "preshared"

const (
	prefix    = "K1"
	hashChars = 2 * sha256.Size
	idChars   = 10
	// secretBytes of randomness: nobody guesses 160 bits, hashed or not, so the
	// hash needs no salt and no work factor.
	secretBytes = 20

	// MinPreshared and maxSecret are how many characters a secret may have that
	// somebody else has chosen.
	MinPreshared = 16
	maxSecret    = 512
)

// Token is a parsed token.
type Token struct {
	CAHash string // hex SHA-256 of the cluster's authority; empty in the bare form
	ID     string
	Secret Secret
}

// Secret is a string that does not show in logs and errors.
type Secret string

// String implements [fmt.Stringer].
func (Secret) String() string { return "***" }

// GoString implements [fmt.GoStringer].
func (Secret) GoString() string { return "***" }

// New makes a token with a random id and secret.
func New(caHash string) Token {
	raw := make([]byte, idChars/2+secretBytes)
	rand.Read(raw) // never fails (crypto/rand)
	return Token{CAHash: caHash, ID: hex.EncodeToString(raw[:idChars/2]), Secret: Secret(hex.EncodeToString(raw[idChars/2:]))}
}

// Reveal is the token in full, for the one who is to use it.
func (t Token) Reveal() string {
	if t.CAHash == "" {
		return string(t.Secret)
	}
	return prefix + t.CAHash + "::" + t.ID + "." + string(t.Secret)
}

// Hash is what is kept of a secret, in hex.
func (s Secret) Hash() string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

// Matches reports whether hash is the secret's, in a time that does not depend on
// where they differ.
func (s Secret) Matches(hash string) bool {
	return subtle.ConstantTimeCompare([]byte(s.Hash()), []byte(hash)) == 1
}

// Parse reads a token. A text that does not begin as one is a secret that was
// fixed in advance: its holder knows no authority, and has the server prove that
// it knows the secret too.
func Parse(text string) (Token, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Token{}, fmt.Errorf("%w: it is empty; make one with \"kedge token create\" on a server", ErrFormat)
	case len(text) > len(prefix)+hashChars+2+len(Preshared)+1+maxSecret:
		return Token{}, fmt.Errorf("%w: it is too long; copy the line that \"kedge token create\" printed", ErrFormat)
	case !strings.HasPrefix(text, prefix) || !strings.Contains(text, "::"):
		s := Secret(text)
		return Token{ID: Preshared, Secret: s}, CheckPreshared(s)
	}
	hash, rest, _ := strings.Cut(text[len(prefix):], "::")
	if raw, err := hex.DecodeString(hash); err != nil || len(raw) != sha256.Size || strings.ToLower(hash) != hash {
		return Token{}, fmt.Errorf("%w: the cluster's hash in it is not %d hexadecimal digits; copy all of the line that \"kedge token create\" printed", ErrFormat, hashChars)
	}
	id, secret, ok := strings.Cut(rest, ".")
	if !ok || secret == "" {
		return Token{}, fmt.Errorf("%w: its secret is missing; copy all of the line that \"kedge token create\" printed", ErrFormat)
	}
	if !ValidID(id) {
		return Token{}, fmt.Errorf("%w: %q is no token's name", ErrFormat, id)
	}
	if id == Preshared {
		if err := CheckPreshared(Secret(secret)); err != nil {
			return Token{}, err
		}
	} else if raw, err := hex.DecodeString(secret); err != nil || len(raw) != secretBytes {
		return Token{}, fmt.Errorf("%w: its secret is not whole; copy all of the line that \"kedge token create\" printed", ErrFormat)
	}
	return Token{CAHash: hash, ID: id, Secret: Secret(secret)}, nil
}

// ValidID reports whether id can be a token's: it becomes part of an object's name.
func ValidID(id string) bool {
	if id == Preshared {
		return true
	}
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == idChars/2 && strings.ToLower(id) == id
}

// CheckPreshared says what is wrong with a secret that somebody has chosen. The
// server proves that it knows it before a machine sends it, and that proof can be
// tried against guesses without end: a short one would be found.
func CheckPreshared(s Secret) error {
	if len(s) < MinPreshared || len(s) > maxSecret {
		return fmt.Errorf("%w: a secret of one's own has %d to %d characters, and this one %d; make it longer and random, or make a token with \"kedge token create\" on a server", ErrFormat, MinPreshared, maxSecret, len(s))
	}
	for _, r := range string(s) {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("%w: it has a character besides the printable ones of ASCII", ErrFormat)
		}
	}
	if strings.HasPrefix(string(s), prefix) && strings.Contains(string(s), "::") {
		return fmt.Errorf("%w: a secret of one's own cannot look like a token of a cluster", ErrFormat)
	}
	return nil
}
