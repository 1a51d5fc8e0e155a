package release

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"aead.dev/minisign"
)

// publicKeys has the public keys of kedge's releases in minisign's format, one a line; the first key signs,
// and the others are earlier or future keys. It is empty until the project has a key: docs/release.md
// says how to create it. scripts/install.sh has the first one too.
const publicKeys = ""

// TrustedKeysFile is a file in which root may name further keys: of a site that builds its own releases, or of
// developers.
const TrustedKeysFile = "/etc/kedge/trusted.keys"

// Key is a public key that signs releases.
type Key = minisign.PublicKey

// BuiltIn returns the keys that this executable trusts.
func BuiltIn() []Key {
	keys, err := parseKeys("the executable", publicKeys)
	if err != nil {
		panic(err) // a test parses the constant
	}
	return keys
}

// Trusted returns the built-in keys, and those in a file if it exists. The file must be one that only root can have
// written: a key in it may replace the program that runs as root.
func Trusted(file string) ([]Key, error) { return trusted(file, 0) }

// trusted is Trusted for a file that belongs to user owner.
func trusted(file string, owner uint32) ([]Key, error) {
	keys := BuiltIn()
	f, err := os.OpenFile(file, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe would block
	if errors.Is(err, fs.ErrNotExist) {
		return keys, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the trusted keys: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read the trusted keys: %w", err)
	}
	if !st.Mode().IsRegular() {
		return nil, &FormatError{Name: file, Reason: "it is not a regular file"}
	}
	dir, err := os.Stat(filepath.Dir(file))
	if err != nil {
		return nil, fmt.Errorf("read the trusted keys: %w", err)
	}
	for _, info := range []fs.FileInfo{st, dir} {
		if info.Sys().(*syscall.Stat_t).Uid != owner || info.Mode().Perm()&0o022 != 0 {
			return nil, &FormatError{Name: file, Reason: "the file and its folder must belong to root, and be writable by root only"}
		}
	}
	text, err := io.ReadAll(io.LimitReader(f, maxList))
	if err != nil {
		return nil, fmt.Errorf("read the trusted keys: %w", err)
	}
	more, err := parseKeys(file, string(text))
	return append(keys, more...), err
}

// parseKeys reads keys, one a line, and the files that minisign writes, whose first line is a comment.
func parseKeys(name, text string) (keys []Key, err error) {
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || strings.HasPrefix(line, "untrusted comment:") {
			continue
		}
		var k Key
		if err := k.UnmarshalText([]byte(line)); err != nil {
			return nil, &FormatError{Name: name, Reason: fmt.Sprintf("line %d is not a public key of minisign", n)}
		}
		keys = append(keys, k)
	}
	return keys, nil
}
