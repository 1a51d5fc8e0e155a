package release

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"aead.dev/minisign"
)

// Verify returns the list in text if one of the keys has signed it. It returns [ErrNoKey], a [*SignatureError], or a
// [*FormatError].
func Verify(text, signature []byte, keys []Key) (*List, error) {
	if len(keys) == 0 {
		return nil, ErrNoKey
	}
	var s minisign.Signature
	if err := s.UnmarshalText(signature); err != nil {
		return nil, &SignatureError{Reason: SignatureName + " is not a signature of minisign"}
	}
	known := false
	for _, k := range keys {
		if minisign.Verify(k, text, signature) {
			return Parse(text) // no part of the list is read before its signature was checked
		}
		known = known || k.ID() == s.KeyID
	}
	if known {
		return nil, &SignatureError{Reason: ListName + " is not the list that was signed"}
	}
	return nil, &SignatureError{Reason: fmt.Sprintf("it is signed with the unknown key %016X", s.KeyID)}
}

// Folder is the result of verifying a folder.
type Folder struct {
	List    *List
	Version string
	Checked []string // names of files with the right content
	Absent  []string // names of files of the release that the folder does not have
}

// VerifyFolder verifies the list of a release in a folder, and the files of the release that are there. The file VERSION
// must be. The error of the first wrong file is returned. Other files in the folder are not looked at.
func VerifyFolder(dir string, keys []Key) (Folder, error) {
	var f Folder
	text, err := small(dir, ListName)
	if err != nil {
		return f, err
	}
	signature, err := small(dir, SignatureName)
	if err != nil {
		return f, err
	}
	if f.List, err = Verify(text, signature, keys); err != nil {
		return f, err
	}
	version, err := small(dir, VersionName)
	if err != nil {
		return f, err
	}
	f.Version = strings.TrimSuffix(string(version), "\n")
	if err := f.List.CheckVersion(f.Version); err != nil {
		return f, err
	}
	for _, name := range f.List.Names() {
		switch err := f.check(dir, name); {
		case errors.Is(err, fs.ErrNotExist):
			f.Absent = append(f.Absent, name)
		case err != nil:
			return f, err
		default:
			f.Checked = append(f.Checked, name)
		}
	}
	return f, nil
}

func (f *Folder) check(dir, name string) error {
	file, err := os.Open(filepath.Join(dir, name))
	if err != nil {
		return err
	}
	defer file.Close()
	return f.List.Check(name, file)
}

// small reads a file that must be there and is small.
func small(dir, name string) ([]byte, error) {
	f, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &MissingError{Folder: dir, Name: name}
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var text bytes.Buffer
	if n, err := io.Copy(&text, io.LimitReader(f, maxList+1)); err != nil {
		return nil, err
	} else if n > maxList {
		return nil, &FormatError{Name: name, Reason: fmt.Sprintf("it has more than %d bytes", maxList)}
	}
	return text.Bytes(), nil
}
