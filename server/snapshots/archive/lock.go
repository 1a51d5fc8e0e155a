package archive

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"

	"kedge/internal/atomicfile"
)

// Lock is what closes an archive, and what opens it again: a [Key] or a [Passphrase].
type Lock interface {
	// Name says without a secret what opens the archive: the public half of a key, or that it is a passphrase.
	Name() string

	recipient() (age.Recipient, error)
	identity() (age.Identity, error)
}

// Key is a recovery key. The zero Key is none.
type Key struct{ secret *age.X25519Identity }

// ErrNotKey is wrapped when a text is not a recovery key.
var ErrNotKey = errors.New("that is no recovery key, which begins with AGE-SECRET-KEY-1")

// NewKey returns a new random key.
func NewKey() (Key, error) {
	secret, err := age.GenerateX25519Identity()
	return Key{secret}, err
}

// ParseKey reads a key as [Key.Reveal] writes it: the last line that is not empty, since the output of "kedge recovery-key
// show" ends with it.
func ParseKey(text string) (Key, error) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	secret, err := age.ParseX25519Identity(strings.TrimSpace(lines[len(lines)-1]))
	if err != nil {
		return Key{}, ErrNotKey // the error of age may contain a part of the key
	}
	return Key{secret}, nil
}

const (
	// KeyFile is the copy of the recovery key in every server's directory, so that a server whose datastore is lost can open
	// its own snapshots.
	KeyFile = "recovery-key"
	// keyFileLimit bounds the file, in bytes.
	keyFileLimit = 64 << 10
)

// ReadKey returns the copy of the recovery key in a server's directory. The error is fs.ErrNotExist if there is none.
func ReadKey(dir string) (Key, error) {
	path := filepath.Join(dir, KeyFile)
	if _, err := os.Stat(path); err != nil {
		return Key{}, err
	}
	data, err := atomicfile.ReadSmall(path, keyFileLimit)
	if err != nil {
		return Key{}, err
	}
	key, err := ParseKey(string(data))
	if err != nil {
		return Key{}, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

// IsZero reports whether it is no key.
func (k Key) IsZero() bool { return k.secret == nil }

// Reveal returns the key as text.
func (k Key) Reveal() string { return k.secret.String() }

// String returns the public half, so that the key is not printed by mistake.
func (k Key) String() string { return k.Name() }

// GoString implements fmt.GoStringer, for the same reason.
func (k Key) GoString() string { return k.Name() }

// Name implements Lock.
func (k Key) Name() string {
	if k.secret == nil {
		return "no key"
	}
	return k.secret.Recipient().String()
}

func (k Key) recipient() (age.Recipient, error) {
	if k.secret == nil {
		return nil, errors.New("there is no recovery key")
	}
	return k.secret.Recipient(), nil
}

func (k Key) identity() (age.Identity, error) {
	if k.secret == nil {
		return nil, errors.New("there is no recovery key")
	}
	return k.secret, nil
}

// Passphrase is a text that somebody can remember.
type Passphrase string

const (
	// PassphraseName is the Name of every passphrase.
	PassphraseName = "a passphrase"
	// MinPassphrase is how many bytes a passphrase must have.
	MinPassphrase = 12
	// workFactor is the cost of guessing a passphrase: 2^16 rounds of scrypt, which take 64 MiB and a quarter of a second.
	// age's own 2^18 needs 256 MiB, more than a small machine has.
	workFactor = 16
)

// Validate returns an error if the passphrase is too short to protect a cluster.
func (p Passphrase) Validate() error {
	if len(p) < MinPassphrase {
		return fmt.Errorf("the passphrase has %d characters; use at least %d", len(p), MinPassphrase)
	}
	return nil
}

// String hides the passphrase.
func (Passphrase) String() string { return PassphraseName }

// GoString hides the passphrase.
func (Passphrase) GoString() string { return PassphraseName }

// Name implements Lock.
func (Passphrase) Name() string { return PassphraseName }

func (p Passphrase) recipient() (age.Recipient, error) {
	r, err := age.NewScryptRecipient(string(p))
	if err != nil {
		return nil, err
	}
	r.SetWorkFactor(workFactor)
	return r, nil
}

func (p Passphrase) identity() (age.Identity, error) {
	i, err := age.NewScryptIdentity(string(p))
	if err != nil {
		return nil, err
	}
	i.SetMaxWorkFactor(workFactor)
	return i, nil
}
