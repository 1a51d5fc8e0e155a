package bundle

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"

	"aead.dev/minisign"

	"kedge/appliance/release"
)

// keyPair is a key of a test.
type keyPair struct {
	public release.Key
	secret minisign.PrivateKey
}

func newKey(t *testing.T) keyPair {
	t.Helper()
	public, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	return keyPair{public, secret}
}

func TestSignatures(t *testing.T) {
	key, other := newKey(t), newKey(t)
	dir := t.TempDir()
	signed, unsigned, resigned := filepath.Join(dir, "signed"), filepath.Join(dir, "unsigned"), filepath.Join(dir, "resigned")
	m := simple(t)
	m.write(t, unsigned)
	m.key = &key.secret
	m.write(t, signed)
	// An index that was changed under a signature of the right key.
	m.write(t, resigned)
	func() {
		b := open(t, resigned)
		whole := mustRead(t, resigned)
		raw := bytes.Replace(b.raw, []byte("a=b"), []byte("a=c"), 1)
		at := len(whole) - trailerSize - len(b.raw) - len(b.signature)
		both := append(append([]byte{}, raw...), b.signature...)
		out := append(append([]byte{}, whole[:at]...), both...)
		mustWrite(t, resigned, append(out, trailer{index: int64(len(raw)), signature: int64(len(b.signature)), sum: sha(both)}.bytes()...))
	}()
	for _, test := range []struct {
		name, path string
		trust      Trust
		warning    string
		err        string
	}{
		{"signed, known", signed, Trust{[]release.Key{other.public, key.public}, true}, "", ""},
		{"signed, known to the executable", signed, Trust{[]release.Key{key.public}, false}, "", ""},
		{"signed, unknown", signed, Trust{[]release.Key{other.public}, true}, "", "unknown"},
		{"signed, and the machine trusts nobody", signed, Trust{}, "is unknown", ""},
		{"unsigned", unsigned, Trust{[]release.Key{key.public}, true}, "", "it is not signed"},
		{"unsigned, and the machine trusts nobody", unsigned, Trust{}, "it is not signed", ""},
		{"unsigned, and only releases are trusted", unsigned, Trust{[]release.Key{key.public}, false}, "it is not signed", ""},
		{"changed", resigned, Trust{[]release.Key{key.public}, true}, "", "not what was signed"},
		{"changed, and the key is not demanded", resigned, Trust{[]release.Key{key.public}, false}, "", "not what was signed"},
	} {
		warning, err := open(t, test.path).CheckSignature(test.trust)
		if test.err == "" && (err != nil || !strings.Contains(warning, test.warning) || test.warning == "" && warning != "") {
			t.Errorf("%s: warning %q, error %v", test.name, warning, err)
		}
		if test.err != "" && (!errors.As(err, new(*TrustError)) || !strings.Contains(err.Error(), test.err)) {
			t.Errorf("%s: error %v", test.name, err)
		}
	}
}

func TestKeyFiles(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	key := newKey(t)
	plain, err := key.secret.MarshalText()
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, file, plain)
	got, err := ReadKey(file, nil)
	if err != nil || !got.Equal(key.secret) {
		t.Errorf("a key without a password: %v", err)
	}
	mustWrite(t, file, []byte("x"))
	_, err = ReadKey(file, nil)
	wantError(t, err, "not the secret key of minisign")
	if testing.Short() {
		return // the password's hash needs a second
	}
	locked, err := minisign.EncryptKey("word", key.secret)
	if err != nil {
		t.Fatal(err)
	}
	mustWrite(t, file, locked)
	if got, err = ReadKey(file, func() (string, error) { return "word", nil }); err != nil || !got.Equal(key.secret) {
		t.Errorf("a key with a password: %v", err)
	}
	_, err = ReadKey(file, func() (string, error) { return "wrong", nil })
	wantError(t, err, "cannot be decrypted")
}
