package release

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// The files of a release that have the same name in all releases.
const (
	ListName      = "SHA256SUMS"
	SignatureName = "SHA256SUMS.minisig"
	VersionName   = "VERSION"
)

// maxList bounds the size of a list, and of a signature, in bytes.
const maxList = 64 << 10

// Executable returns the name of the executable for an architecture of Go, such as "amd64".
func Executable(arch string) string { return "kedge-linux-" + arch }

// List has the hashes of the files of a release.
type List struct {
	sums map[string][sha256.Size]byte
}

// Add reads a file and adds its hash.
func (l *List) Add(name string, r io.Reader) error {
	if !validName(name) {
		return fmt.Errorf("%q cannot be the name of a file of a release", name)
	}
	if _, twice := l.sums[name]; twice {
		return fmt.Errorf("%s is twice in the release", name)
	}
	sum, err := sumOf(r)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if l.sums == nil {
		l.sums = map[string][sha256.Size]byte{}
	}
	l.sums[name] = sum
	return nil
}

// Names returns the names of the files, sorted.
func (l *List) Names() []string { return slices.Sorted(maps.Keys(l.sums)) }

// Text returns the list in the format of sha256sum, sorted by name.
func (l *List) Text() []byte {
	var out strings.Builder
	for _, name := range l.Names() {
		sum := l.sums[name]
		fmt.Fprintf(&out, "%s  %s\n", hex.EncodeToString(sum[:]), name)
	}
	return []byte(out.String())
}

// Check reads a file to its end and compares its hash with that in the list. It returns a [*NotListedError] or a
// [*HashError], or the error of r.
func (l *List) Check(name string, r io.Reader) error {
	want, ok := l.sums[name]
	if !ok {
		return &NotListedError{Name: name}
	}
	got, err := sumOf(r)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	if got != want {
		return &HashError{Name: name, Want: hex.EncodeToString(want[:]), Got: hex.EncodeToString(got[:])}
	}
	return nil
}

// CheckVersion returns a [*VersionError] if the list is not that of a version. Without it, the signed list of an older
// release, with known faults, could be passed off as a newer release.
func (l *List) CheckVersion(version string) error {
	var wrong *HashError
	err := l.Check(VersionName, strings.NewReader(version+"\n"))
	if errors.As(err, &wrong) {
		return &VersionError{Version: version}
	}
	return err
}

// Parse reads a list. It returns a [*FormatError] for anything that Text does not write, apart from the order of the
// files and the mark of binary files, for which sha256sum has an asterisk.
func Parse(text []byte) (*List, error) {
	if len(text) > maxList {
		return nil, &FormatError{Name: ListName, Reason: fmt.Sprintf("it has more than %d bytes", maxList)}
	}
	l := &List{sums: map[string][sha256.Size]byte{}}
	n := 0
	for line := range strings.Lines(string(text)) {
		n++
		line, whole := strings.CutSuffix(line, "\n")
		sum, name, ok := strings.Cut(line, " ")
		var hash [sha256.Size]byte
		raw, err := hex.DecodeString(sum)
		if !whole || !ok || err != nil || len(raw) != len(hash) || len(name) < 2 || name[0] != ' ' && name[0] != '*' || !validName(name[1:]) {
			return nil, &FormatError{Name: ListName, Reason: fmt.Sprintf("line %d is not a hash with the name of a file", n)}
		}
		copy(hash[:], raw)
		if _, twice := l.sums[name[1:]]; twice {
			return nil, &FormatError{Name: ListName, Reason: fmt.Sprintf("line %d repeats %s", n, name[1:])}
		}
		l.sums[name[1:]] = hash
	}
	if _, ok := l.sums[VersionName]; !ok {
		return nil, &FormatError{Name: ListName, Reason: "it does not list " + VersionName}
	}
	return l, nil
}

// validName reports whether a name can be that of a file of a release: all files are in one folder, and no name can be
// mistaken for a flag or needs quoting in a shell.
func validName(name string) bool {
	if name == "" || len(name) > 100 || name == ListName || name == SignatureName || name[0] == '.' || name[0] == '-' {
		return false
	}
	for _, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("._+-", c):
		default:
			return false
		}
	}
	return true
}

func sumOf(r io.Reader) (sum [sha256.Size]byte, err error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return sum, err
	}
	return [sha256.Size]byte(h.Sum(nil)), nil
}
