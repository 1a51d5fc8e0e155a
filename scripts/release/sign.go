package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"aead.dev/minisign"
	"golang.org/x/term"

	"kedge/appliance/release"
)

// passwordVariable is the environment variable with the password of the secret key, for machines without a terminal.
const passwordVariable = "KEDGE_SIGN_PASSWORD"

// readSecret reads the file of a secret key, as minisign -G writes it, and asks for its password if it has one.
func readSecret(file string) (secret minisign.PrivateKey, err error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return secret, err
	}
	text = bytes.TrimSpace(text)
	if !minisign.IsEncrypted(text) {
		if err := secret.UnmarshalText(text); err != nil {
			return secret, fmt.Errorf("%s is not the secret key of minisign", file)
		}
		return secret, nil
	}
	password := os.Getenv(passwordVariable)
	if password == "" {
		fmt.Fprintf(os.Stderr, "password of %s: ", file)
		typed, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(os.Stderr)
		if err != nil {
			return secret, fmt.Errorf("read the password of %s: %w; set %s where there is no terminal", file, err, passwordVariable)
		}
		password = string(typed)
	}
	if secret, err = minisign.DecryptKey(password, text); err != nil {
		return secret, fmt.Errorf("%s cannot be decrypted with this password", file)
	}
	return secret, nil
}

// sign returns the signature of a list. It says nothing about time or place, so that it is the same each time.
func sign(list []byte, secret minisign.PrivateKey, version string) ([]byte, error) {
	r := minisign.NewReader(bytes.NewReader(list))
	if _, err := io.Copy(io.Discard, r); err != nil {
		return nil, err
	}
	return r.SignWithComments(secret, "kedge "+version, "signature of the files of kedge "+version), nil
}

// trustSecret returns an error unless the executable and the script trust the signatures of a secret key.
func trustSecret(secret minisign.PrivateKey, trusted []release.Key, script []byte) error {
	public := secret.Public().(release.Key)
	if len(trusted) == 0 || !trusted[0].Equal(public) {
		return fmt.Errorf("the executable would not trust this signature: the first line of publicKeys in appliance/release/keys.go is not %s, the public key of KEDGE_SIGN_KEY", public)
	}
	if keyOf(script) != public.String() {
		return fmt.Errorf("install.sh would not trust this signature: the key in scripts/install.sh is not %s, the public key of KEDGE_SIGN_KEY", public)
	}
	return nil
}

// mayUse returns an error if a secret key will turn out to be of no use when all is built. It does not ask for a password.
func (b *build) mayUse(file string, trusted []release.Key) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	script, err := os.ReadFile(b.script())
	if err != nil {
		return err
	}
	if minisign.IsEncrypted(bytes.TrimSpace(text)) {
		if len(trusted) == 0 || keyOf(script) != trusted[0].String() {
			return errors.New("no signature would be trusted: appliance/release/keys.go and scripts/install.sh have no key, or two; docs/release.md says how to create one")
		}
		return nil
	}
	secret, err := readSecret(file)
	if err != nil {
		return err
	}
	return trustSecret(secret, trusted, script)
}

// keyOf returns the key in install.sh, and withKey install.sh with another key. An empty key is for releases that are not
// signed.
func keyOf(script []byte) string {
	for line := range strings.Lines(string(script)) {
		if key, ok := strings.CutPrefix(line, "key='"); ok {
			key, _, _ = strings.Cut(key, "'")
			return key
		}
	}
	return ""
}

func withKey(script []byte, key string) []byte {
	return bytes.Replace(script, []byte("\nkey='"+keyOf(script)+"'\n"), []byte("\nkey='"+key+"'\n"), 1)
}
