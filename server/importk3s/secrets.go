package importk3s

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/pbkdf2"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apiserver/pkg/server/options/encryptionconfig"
	"k8s.io/apiserver/pkg/storage/value"
	"sigs.k8s.io/yaml"
)

// How k3s encrypts its bootstrap data with the server token: AES-GCM, with a key from PBKDF2. The value is SALT:BASE64, where
// the decoded text begins with the nonce. Its key in etcd is /bootstrap/ and the beginning of the token's hash.
const (
	rounds     = 4096
	keySize    = 32
	hashDigits = 12
	configName = "EncryptionConfig" // in the bootstrap data
)

// ErrToken is wrapped in the error for a token that is not the one of the snapshot.
var ErrToken = errors.New("the token is not the server token of this snapshot's cluster")

// configOf returns the encryption configuration in the bootstrap data; empty if k3s does not encrypt Secrets.
func configOf(keys []stored, token string) ([]byte, error) {
	if len(keys) == 0 {
		return nil, errors.New("the snapshot has no bootstrap data of k3s; give its encryption configuration with --encryption-config")
	}
	secret := secretOf(token)
	for _, k := range keys {
		if k.key != bootstraps+hashOf(secret) {
			continue
		}
		data, err := open(secret, k.value)
		if err != nil {
			return nil, fmt.Errorf("the bootstrap data %s cannot be decrypted: %w", k.key, err)
		}
		return fileOf(data, configName)
	}
	return nil, fmt.Errorf("%w; it is in /var/lib/rancher/k3s/server/token on k3s's servers, and must be that of the time of the snapshot", ErrToken)
}

// secretOf returns the secret in a token: all of it, or what follows the user in K10HASH::USER:SECRET.
func secretOf(token string) string {
	token = strings.TrimSpace(token)
	if !strings.HasPrefix(token, "K10") {
		return token
	}
	_, credentials, ok := strings.Cut(token, "::")
	if !ok {
		return token
	}
	if _, secret, ok := strings.Cut(credentials, ":"); ok {
		return secret
	}
	return credentials
}

func hashOf(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])[:hashDigits]
}

// open decrypts bootstrap data.
func open(secret string, data []byte) ([]byte, error) {
	salt, text, ok := bytes.Cut(data, []byte(":"))
	if !ok {
		return nil, errors.New("it has no salt")
	}
	sealed, err := base64.StdEncoding.DecodeString(string(text))
	if err != nil {
		return nil, err
	}
	gcm, err := cipherOf(secret, salt)
	if err != nil {
		return nil, err
	}
	if len(sealed) < gcm.NonceSize() {
		return nil, errors.New("it is truncated")
	}
	return gcm.Open(nil, sealed[:gcm.NonceSize()], sealed[gcm.NonceSize():], nil)
}

func cipherOf(secret string, salt []byte) (cipher.AEAD, error) {
	key, err := pbkdf2.Key(sha1.New, secret, salt, rounds, keySize)
	if err != nil {
		return nil, err
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, err
	}
	return cipher.NewGCM(block)
}

// fileOf returns a file in bootstrap data. Old versions of k3s have its content alone, later ones a time beside it.
func fileOf(data []byte, name string) ([]byte, error) {
	var files map[string]json.RawMessage
	if err := json.Unmarshal(data, &files); err != nil {
		return nil, fmt.Errorf("the bootstrap data is not as expected: %w", err)
	}
	raw, ok := files[name]
	if !ok {
		return nil, nil
	}
	var file struct{ Content []byte }
	if json.Unmarshal(raw, &file) == nil {
		return file.Content, nil
	}
	var content []byte
	if err := json.Unmarshal(raw, &content); err != nil {
		return nil, fmt.Errorf("the file %s in the bootstrap data is not as expected: %w", name, err)
	}
	return content, nil
}

// isEncrypted reports whether the API server has encrypted a value.
func isEncrypted(value []byte) bool { return bytes.HasPrefix(value, []byte("k8s:enc:")) }

// decrypter decrypts values as the API server does.
type decrypter struct {
	transformers encryptionconfig.StaticTransformers // nil if nothing is encrypted
}

// newDecrypter returns the decrypter with an encryption configuration, which it writes to a file in dir for Kubernetes' parser.
func newDecrypter(ctx context.Context, config []byte, dir string) (*decrypter, error) {
	var found struct {
		Resources []struct {
			Providers []map[string]any `json:"providers"`
		} `json:"resources"`
	}
	if err := yaml.Unmarshal(config, &found); err != nil {
		return nil, fmt.Errorf("the encryption configuration cannot be read: %w", err)
	}
	for _, r := range found.Resources {
		for _, p := range r.Providers {
			if _, ok := p["kms"]; ok {
				return nil, errors.New("the encryption configuration has a KMS plugin, which only k3s's machine can reach; encrypt Secrets with another provider in k3s first")
			}
		}
	}
	path := filepath.Join(dir, "encryption-config")
	if err := os.WriteFile(path, config, 0o600); err != nil {
		return nil, err
	}
	loaded, err := encryptionconfig.LoadEncryptionConfig(ctx, path, false, "")
	if err != nil {
		return nil, fmt.Errorf("the encryption configuration cannot be used: %w", err)
	}
	return &decrypter{loaded.Transformers}, nil
}

// read returns the content of a value.
func (d *decrypter) read(ctx context.Context, s stored) ([]byte, error) {
	if !isEncrypted(s.value) {
		return s.value, nil
	}
	if d.transformers == nil {
		return nil, errors.New("no key for it is known")
	}
	data, _, err := d.transformers.TransformerForResource(d.resourceOf(s.key)).TransformFromStorage(ctx, s.value, value.DefaultContext(s.key))
	if err != nil {
		return nil, fmt.Errorf("none of the keys decrypts it: %w", err)
	}
	return data, nil
}

// resourceOf returns the resource in a key, as the encryption configuration names it. The keys of Kubernetes' own resources do not
// have the group, so it is taken from the configuration.
func (d *decrypter) resourceOf(key string) schema.GroupResource {
	parts := strings.Split(strings.TrimPrefix(key, registry), "/")
	if len(parts) > 1 && strings.Contains(parts[0], ".") {
		return schema.GroupResource{Group: parts[0], Resource: parts[1]}
	}
	r := schema.GroupResource{Resource: parts[0]}
	if _, ok := d.transformers[r]; ok {
		return r
	}
	for known := range d.transformers {
		if known.Resource == r.Resource {
			return known
		}
	}
	return r
}
