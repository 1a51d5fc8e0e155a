package release

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"aead.dev/minisign"
)

// signer is a key pair of a test.
type signer struct {
	key    Key
	secret minisign.PrivateKey
}

func newSigner(t *testing.T) signer {
	t.Helper()
	public, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return signer{public, secret}
}

func (s signer) sign(text []byte) []byte {
	r := minisign.NewReader(bytes.NewReader(text))
	if _, err := new(bytes.Buffer).ReadFrom(r); err != nil {
		panic(err)
	}
	return r.SignWithComments(s.secret, "kedge v1.2.3", "signature of a test")
}

// folder writes a signed release of version v1.2.3 and returns its folder.
func folder(t *testing.T, s signer) string {
	t.Helper()
	dir := t.TempDir()
	var l List
	for name, text := range map[string]string{Executable("amd64"): "program", Executable("arm64"): "another", VersionName: "v1.2.3\n"} {
		write(t, dir, name, text)
		if err := l.Add(name, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, ListName, string(l.Text()))
	write(t, dir, SignatureName, string(s.sign(l.Text())))
	return dir
}

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestFolderIsVerified(t *testing.T) {
	s := newSigner(t)
	dir := folder(t, s)
	if err := os.Remove(filepath.Join(dir, Executable("arm64"))); err != nil {
		t.Fatal(err)
	}
	other := newSigner(t)
	f, err := VerifyFolder(dir, []Key{other.key, s.key})
	if err != nil {
		t.Fatal(err)
	}
	if f.Version != "v1.2.3" || !slices.Equal(f.Checked, []string{VersionName, Executable("amd64")}) || !slices.Equal(f.Absent, []string{Executable("arm64")}) {
		t.Errorf("%+v", f)
	}
	if err := f.List.Check(Executable("arm64"), strings.NewReader("another")); err != nil {
		t.Error(err)
	}
}

func TestFolderIsRefused(t *testing.T) {
	s := newSigner(t)
	for _, test := range []struct {
		name   string
		change func(t *testing.T, dir string)
		as     any
		text   string
	}{
		{"executable changed", func(t *testing.T, dir string) { write(t, dir, Executable("amd64"), "progrem") }, new(*HashError), "kedge-linux-amd64 is damaged"},
		{"executable cut", func(t *testing.T, dir string) { write(t, dir, Executable("amd64"), "prog") }, new(*HashError), "kedge-linux-amd64 is damaged"},
		{"list changed", func(t *testing.T, dir string) {
			write(t, dir, ListName, strings.Replace(read(t, dir, ListName), "amd64", "armv7", 1))
		}, new(*SignatureError), "SHA256SUMS is not the list that was signed"},
		{"signed by another key", func(t *testing.T, dir string) {
			write(t, dir, SignatureName, string(newSigner(t).sign([]byte(read(t, dir, ListName)))))
		}, new(*SignatureError), "unknown key"},
		{"signature cut", func(t *testing.T, dir string) { write(t, dir, SignatureName, read(t, dir, SignatureName)[:100]) }, new(*SignatureError), "not a signature of minisign"},
		{"trusted comment changed", func(t *testing.T, dir string) {
			write(t, dir, SignatureName, strings.Replace(read(t, dir, SignatureName), "v1.2.3", "v1.2.4", 1))
		}, new(*SignatureError), "not the list that was signed"},
		{"signature missing", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, SignatureName)) }, new(*MissingError), "has no file SHA256SUMS.minisig"},
		{"list missing", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, ListName)) }, new(*MissingError), "has no file SHA256SUMS"},
		{"version missing", func(t *testing.T, dir string) { os.Remove(filepath.Join(dir, VersionName)) }, new(*MissingError), "has no file VERSION"},
		{"another version", func(t *testing.T, dir string) { write(t, dir, VersionName, "v1.2.4\n") }, new(*VersionError), "not that of version v1.2.4"},
		{"endless list", func(t *testing.T, dir string) { write(t, dir, ListName, strings.Repeat("x", maxList+1)) }, new(*FormatError), "more than 65536 bytes"},
		{"signed, and not a list", func(t *testing.T, dir string) {
			write(t, dir, ListName, "x")
			write(t, dir, SignatureName, string(s.sign([]byte("x"))))
		}, new(*FormatError), "line 1 is not a hash"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := folder(t, s)
			test.change(t, dir)
			_, err := VerifyFolder(dir, []Key{s.key})
			if err == nil || !errors.As(err, test.as) || !strings.Contains(err.Error(), test.text) {
				t.Fatalf("%v (%[1]T)", err)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than a sentence: %v", err)
			}
			if errors.Is(err, ErrSignature) != strings.Contains(err.Error(), "not to be trusted") {
				t.Errorf("ErrSignature is wrong for %v", err)
			}
		})
	}
	if _, err := VerifyFolder(folder(t, s), nil); !errors.Is(err, ErrNoKey) {
		t.Errorf("without a key: %v", err)
	}
}

func TestParse(t *testing.T) {
	hash := strings.Repeat("ab", 32)
	version := hash + "  VERSION\n"
	for text, want := range map[string]string{
		version + hash + " *kedge\n":            "",
		version + hash + " kedge\n":             "line 2 is not",
		version + hash + "  kedge":              "line 2 is not", // cut off
		version + hash + "  ../kedge\n":         "line 2 is not",
		version + hash + "  .kedge\n":           "line 2 is not",
		version + hash + "  -kedge\n":           "line 2 is not",
		version + hash + "  a b\n":              "line 2 is not",
		version + hash + "  SHA256SUMS\n":       "line 2 is not",
		version + hash[2:] + "  kedge\n":        "line 2 is not",
		version + "xx" + hash[2:] + "  kedge\n": "line 2 is not",
		version + "\n":                          "line 2 is not",
		version + version:                       "line 2 repeats VERSION",
		hash + "  kedge\n":                      "does not list VERSION",
		"":                                      "does not list VERSION",
	} {
		_, err := Parse([]byte(text))
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%q: %v, want %q", text, err, want)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(strings.Repeat("ab", 32) + "  VERSION\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		l, err := Parse(text)
		if err != nil {
			return
		}
		again, err := Parse(l.Text())
		if err != nil || !bytes.Equal(again.Text(), l.Text()) {
			t.Errorf("%q is written as %q: %v", text, l.Text(), err)
		}
	})
}

func TestTrustedKeys(t *testing.T) {
	a, b := newSigner(t), newSigner(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "trusted.keys")
	owner := uint32(os.Geteuid())
	if keys, err := trusted(file, owner); err != nil || len(keys) != len(BuiltIn()) {
		t.Errorf("without the file: %v, %v", keys, err)
	}
	withComment, err := a.key.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	write(t, dir, "trusted.keys", "# ours\n"+string(withComment)+"\n\n"+b.key.String()+"\n")
	keys, err := trusted(file, owner)
	if err != nil || len(keys) != len(BuiltIn())+2 || !keys[len(keys)-2].Equal(a.key) || !keys[len(keys)-1].Equal(b.key) {
		t.Errorf("%v, %v", keys, err)
	}

	var format *FormatError
	if _, err := trusted(file, owner+1); !errors.As(err, &format) {
		t.Errorf("the file of another user: %v", err)
	}
	for path, modes := range map[string][2]os.FileMode{file: {0o664, 0o644}, dir: {0o777, 0o755}} {
		if err := os.Chmod(path, modes[0]); err != nil {
			t.Fatal(err)
		}
		if _, err := trusted(file, owner); !errors.As(err, &format) {
			t.Errorf("%s writable by others: %v", path, err)
		}
		if err := os.Chmod(path, modes[1]); err != nil {
			t.Fatal(err)
		}
	}
	write(t, dir, "trusted.keys", b.key.String()+"\nRWQ=\n")
	if _, err := trusted(file, owner); !errors.As(err, &format) || !strings.Contains(err.Error(), "line 2") {
		t.Errorf("a line that is not a key: %v", err)
	}
	if _, err := trusted(dir, owner); !errors.As(err, &format) {
		t.Errorf("a folder: %v", err)
	}
}

func TestBuiltInKeysAreKeys(t *testing.T) { BuiltIn() }

// minisign's own program accepts kedge's signatures, and kedge accepts those of minisign.
func TestMinisignProgram(t *testing.T) {
	program, err := exec.LookPath("minisign")
	if err != nil {
		t.Skip("the program minisign is not installed")
	}
	s := newSigner(t)
	dir := folder(t, s)
	list := filepath.Join(dir, ListName)
	if out, err := exec.Command(program, "-V", "-H", "-P", s.key.String(), "-m", list).CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if out, err := exec.Command(program, "-G", "-W", "-p", dir+"/key.pub", "-s", dir+"/key").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if out, err := exec.Command(program, "-S", "-s", dir+"/key", "-m", list).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	keys, err := parseKeys("key.pub", read(t, dir, "key.pub"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyFolder(dir, keys); err != nil {
		t.Error(err)
	}
}
