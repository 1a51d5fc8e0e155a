package joining

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
)

// ErrTokenFormat is wrapped when a text is not a valid token.
var ErrTokenFormat = errors.New("invalid join token")

// PresharedID is the id of the token that an administrator has fixed with --token.
const PresharedID = "preshared"

const (
	tokenPrefix    = "K1"
	tokenHashChars = 2 * sha256.Size
	tokenIDChars   = 10
	// secretBytes is the size of random secrets. 160 bits cannot be guessed, hashed or not,
	// so the hash needs no salt and no work factor.
	secretBytes = 20

	// MinPreshared and maxSecret bound the characters of a secret that an administrator
	// has chosen.
	MinPreshared = 16
	maxSecret    = 512
)

// Token is a parsed join token, K1<hash>::<id>.<secret>: the SHA-256 of the cluster's authority, by which a joining
// machine authenticates the cluster before it sends anything; the token's public name; and the secret.
type Token struct {
	CAHash string // hex SHA-256 of the cluster's authority; empty in the bare form
	ID     string
	Secret Secret
}

// Secret is a string that is hidden in logs and errors.
type Secret string

// String implements [fmt.Stringer].
func (Secret) String() string { return "***" }

// GoString implements [fmt.GoStringer].
func (Secret) GoString() string { return "***" }

// NewToken makes a token with a random id and secret.
func NewToken(caHash string) Token {
	raw := make([]byte, tokenIDChars/2+secretBytes)
	rand.Read(raw) // never fails (crypto/rand)
	return Token{CAHash: caHash, ID: hex.EncodeToString(raw[:tokenIDChars/2]), Secret: Secret(hex.EncodeToString(raw[tokenIDChars/2:]))}
}

// Reveal returns the whole token, for its user.
func (t Token) Reveal() string {
	if t.CAHash == "" {
		return string(t.Secret)
	}
	return tokenPrefix + t.CAHash + "::" + t.ID + "." + string(t.Secret)
}

// Hash returns the hash of a secret, in hex, which is stored in its place.
func (s Secret) Hash() string {
	h := sha256.Sum256([]byte(s))
	return hex.EncodeToString(h[:])
}

// Matches reports whether hash is the secret's, in constant time.
func (s Secret) Matches(hash string) bool {
	return subtle.ConstantTimeCompare([]byte(s.Hash()), []byte(hash)) == 1
}

// ParseToken parses a token. A text without a token's tokenPrefix is a preshared secret: its holder does
// not know the authority, and lets the server prove that it knows the secret too.
func ParseToken(text string) (Token, error) {
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return Token{}, fmt.Errorf("%w: it is empty; make one with \"kedge token create\" on a server", ErrTokenFormat)
	case len(text) > len(tokenPrefix)+tokenHashChars+2+len(PresharedID)+1+maxSecret:
		return Token{}, fmt.Errorf("%w: it is too long; copy the line that \"kedge token create\" printed", ErrTokenFormat)
	case !strings.HasPrefix(text, tokenPrefix) || !strings.Contains(text, "::"):
		s := Secret(text)
		return Token{ID: PresharedID, Secret: s}, CheckPreshared(s)
	}
	hash, rest, _ := strings.Cut(text[len(tokenPrefix):], "::")
	if raw, err := hex.DecodeString(hash); err != nil || len(raw) != sha256.Size || strings.ToLower(hash) != hash {
		return Token{}, fmt.Errorf("%w: the cluster's hash in it is not %d hexadecimal digits; copy all of the line that \"kedge token create\" printed", ErrTokenFormat, tokenHashChars)
	}
	id, secret, ok := strings.Cut(rest, ".")
	if !ok || secret == "" {
		return Token{}, fmt.Errorf("%w: its secret is missing; copy all of the line that \"kedge token create\" printed", ErrTokenFormat)
	}
	if !ValidTokenID(id) {
		return Token{}, fmt.Errorf("%w: invalid token name %q", ErrTokenFormat, id)
	}
	if id == PresharedID {
		if err := CheckPreshared(Secret(secret)); err != nil {
			return Token{}, err
		}
	} else if raw, err := hex.DecodeString(secret); err != nil || len(raw) != secretBytes {
		return Token{}, fmt.Errorf("%w: its secret is incomplete; copy all of the line that \"kedge token create\" printed", ErrTokenFormat)
	}
	return Token{CAHash: hash, ID: id, Secret: Secret(secret)}, nil
}

// ValidTokenID reports whether id is valid as the name of a token, which becomes part of an
// object's name.
func ValidTokenID(id string) bool {
	if id == PresharedID {
		return true
	}
	raw, err := hex.DecodeString(id)
	return err == nil && len(raw) == tokenIDChars/2 && strings.ToLower(id) == id
}

// LooksRandom reports whether a secret looks like the output of a random generator, such as
// "openssl rand -hex 20", and not like words: it has 32 characters or more, and either all
// are hexadecimal digits, or they change often between small letters, capitals, digits and
// others. Secrets that people make up can be guessed.
func LooksRandom(s Secret) bool {
	const chars, changesOf20 = 32, 9 // base64 changes 13 times in 20, words with dashes 4 to 8
	if len(s) < chars {
		return false
	}
	hexDigits, changes, seen := 0, 0, map[byte]bool{}
	for i := range len(s) {
		c := s[i]
		seen[c] = true
		if '0' <= c && c <= '9' || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F' {
			hexDigits++
		}
		if i > 0 && class(c) != class(s[i-1]) {
			changes++
		}
	}
	return len(seen) >= 8 && (hexDigits == len(s) || changes*20 >= (len(s)-1)*changesOf20)
}

func class(c byte) int {
	switch {
	case 'a' <= c && c <= 'z':
		return 0
	case 'A' <= c && c <= 'Z':
		return 1
	case '0' <= c && c <= '9':
		return 2
	}
	return 3
}

// CheckPreshared returns an error if a secret chosen by an administrator is not acceptable.
// The server proves that it knows the secret before a machine sends it, and an attacker can
// test guesses against that proof without limit: a short secret would be found.
func CheckPreshared(s Secret) error {
	if len(s) < MinPreshared || len(s) > maxSecret {
		return fmt.Errorf("%w: a preshared secret must have %d to %d characters, not %d; use a longer random secret, or make a token with \"kedge token create\" on a server", ErrTokenFormat, MinPreshared, maxSecret, len(s))
	}
	for _, r := range string(s) {
		if r <= ' ' || r > '~' {
			return fmt.Errorf("%w: a preshared secret may contain only printable ASCII characters without spaces", ErrTokenFormat)
		}
	}
	if strings.HasPrefix(string(s), tokenPrefix) && strings.Contains(string(s), "::") {
		return fmt.Errorf("%w: a preshared secret must not look like a cluster's token", ErrTokenFormat)
	}
	return nil
}
