package pki

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"
)

func TestSealedForOneKeyAndPurpose(t *testing.T) {
	dir := t.TempDir()
	key, err := EnsureKey(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	other, err := EnsureKey(filepath.Join(dir, "b"))
	if err != nil {
		t.Fatal(err)
	}
	message := bytes.Repeat([]byte("the key of an authority "), 1000)
	sealed, err := Seal(&key.PublicKey, "a purpose", message)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(sealed, []byte("authority")) {
		t.Error("the message can be read without a key")
	}
	got, err := Open(key, "a purpose", sealed)
	if err != nil || !bytes.Equal(got, message) {
		t.Errorf("opened %d bytes of %d, %v", len(got), len(message), err)
	}
	if _, err := Open(other, "a purpose", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("with another key: %v", err)
	}
	if _, err := Open(key, "another purpose", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("for another purpose: %v", err)
	}
	sealed[len(sealed)-1] ^= 1
	if _, err := Open(key, "a purpose", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("changed on the way: %v", err)
	}
	if _, err := Open(key, "a purpose", nil); !errors.Is(err, ErrSealed) {
		t.Errorf("nothing: %v", err)
	}
}
