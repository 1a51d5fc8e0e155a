package secretsencryption

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/secretbox"
	"sigs.k8s.io/yaml"

	"kedge/server/identity"
)

// ErrForeign is wrapped in the error for a configuration that kedge has not written.
var ErrForeign = errors.New("the configuration of encryption is not kedge's own")

// plain is the name of the provider that does not encrypt.
const plain = "identity"

// Prefixes of encrypted values, as Kubernetes writes them.
const (
	encrypted       = "k8s:enc:"
	secretboxPrefix = encrypted + "secretbox:v1:"
)

// keyID identifies a provider of a configuration without its key.
type keyID struct {
	Name  string `json:"name"`            // of the key, or plain
	Print string `json:"print,omitempty"` // identity.EncryptionKeyPrint; empty for plain, and for a key that is not made yet
}

// number returns N if the key's name is keyN, and 0 otherwise.
func (k keyID) number() int {
	n, err := strconv.Atoi(strings.TrimPrefix(k.Name, "key"))
	if err != nil {
		return 0
	}
	return n
}

// provider is a provider of a configuration with its key.
type provider struct {
	keyID
	secret string // in base64; empty for plain
	box    value.Transformer
}

// newProvider returns the provider with a key. Its secret is in base64.
func newProvider(name, secret string) (provider, error) {
	raw, err := base64.StdEncoding.DecodeString(secret)
	if err != nil || len(raw) != 32 {
		return provider{}, fmt.Errorf("key %q does not have 32 bytes in base64", name)
	}
	return provider{keyID{name, identity.EncryptionKeyPrint(name, secret)}, secret, secretbox.NewSecretboxTransformer([32]byte(raw))}, nil
}

// generate returns a provider with a new key.
func generate(number int) (provider, error) {
	raw := make([]byte, 32)
	rand.Read(raw) // never fails (crypto/rand)
	return newProvider(fmt.Sprint("key", number), base64.StdEncoding.EncodeToString(raw))
}

// wrote reports whether a stored value is the provider's.
func (p provider) wrote(data []byte) bool {
	if p.Name == plain {
		return !bytes.HasPrefix(data, []byte(encrypted))
	}
	rest, ok := bytes.CutPrefix(data, []byte(secretboxPrefix))
	return ok && bytes.HasPrefix(rest, []byte(p.Name+":"))
}

// read returns the content of a value that the provider wrote.
func (p provider) read(ctx context.Context, data []byte) ([]byte, error) {
	if p.Name == plain {
		return data, nil
	}
	// Upstream's transformer reads a value that was cut off, and says that its output is too small, if the key is wrong.
	content, _, err := p.box.TransformFromStorage(ctx, data[len(secretboxPrefix)+len(p.Name)+1:], value.DefaultContext(nil))
	if err != nil {
		return nil, fmt.Errorf("%s does not decrypt it", p.Name)
	}
	return content, nil
}

// write returns the value of a content.
func (p provider) write(ctx context.Context, content []byte) ([]byte, error) {
	if p.Name == plain {
		return content, nil
	}
	data, err := p.box.TransformToStorage(ctx, content, value.DefaultContext(nil))
	if err != nil {
		return nil, err
	}
	out := slices.Concat([]byte(secretboxPrefix), []byte(p.Name+":"), data)
	// Before the value that it replaces is gone for good.
	if again, err := p.read(ctx, out); err != nil || !bytes.Equal(again, content) {
		return nil, fmt.Errorf("%s does not decrypt what it has encrypted: %w", p.Name, err)
	}
	return out, nil
}

// configuration has the providers in their order: the first writes, all read.
type configuration []provider

// file is the form of a configuration for the API server.
type file struct {
	APIVersion string         `json:"apiVersion"`
	Kind       string         `json:"kind"`
	Resources  []fileResource `json:"resources"`
}

type fileResource struct {
	Resources []string       `json:"resources"`
	Providers []fileProvider `json:"providers"`
}

type fileProvider struct {
	Secretbox *fileKeys `json:"secretbox,omitempty"`
	Identity  *struct{} `json:"identity,omitempty"`
}

type fileKeys struct {
	Keys []fileKey `json:"keys"`
}

type fileKey struct {
	Name   string `json:"name"`
	Secret string `json:"secret"`
}

// parse reads a configuration. The error is ErrForeign if kedge writes none like it.
func parse(data []byte) (configuration, error) {
	var f file
	if err := yaml.UnmarshalStrict(data, &f); err != nil {
		return nil, fmt.Errorf("%w: it has providers or fields that kedge does not write", ErrForeign) // the error may have a part of a key
	}
	if len(f.Resources) != 1 || !slices.Equal(f.Resources[0].Resources, []string{"secrets"}) {
		return nil, fmt.Errorf("%w: it is not for Secrets alone", ErrForeign)
	}
	var c configuration
	for _, p := range f.Resources[0].Providers {
		switch {
		case (p.Secretbox == nil) == (p.Identity == nil):
			return nil, fmt.Errorf("%w: it has a provider that is neither secretbox nor identity", ErrForeign)
		case p.Identity != nil:
			c = append(c, provider{keyID: keyID{Name: plain}})
		default:
			for _, k := range p.Secretbox.Keys {
				made, err := newProvider(k.Name, k.Secret)
				if err != nil {
					return nil, fmt.Errorf("%w: %w", ErrForeign, err)
				}
				c = append(c, made)
			}
		}
	}
	if len(c) == 0 {
		return nil, fmt.Errorf("%w: it has no provider", ErrForeign)
	}
	return c, nil
}

// file returns the content of the configuration's file.
func (c configuration) file() ([]byte, error) {
	r := fileResource{Resources: []string{"secrets"}}
	for _, p := range c {
		if p.Name == plain {
			r.Providers = append(r.Providers, fileProvider{Identity: &struct{}{}})
			continue
		}
		r.Providers = append(r.Providers, fileProvider{Secretbox: &fileKeys{[]fileKey{{p.Name, p.secret}}}})
	}
	return yaml.Marshal(file{"apiserver.config.k8s.io/v1", "EncryptionConfiguration", []fileResource{r}})
}

// ids identifies the providers.
func (c configuration) ids() []keyID {
	var ids []keyID
	for _, p := range c {
		ids = append(ids, p.keyID)
	}
	return ids
}

// pick returns the configuration with these providers, and the names of those that c lacks.
func (c configuration) pick(ids []keyID) (picked configuration, missing []string) {
	for _, id := range ids {
		i := slices.IndexFunc(c, func(p provider) bool { return p.keyID == id })
		switch {
		case i >= 0:
			picked = append(picked, c[i])
		case id.Name == plain:
			picked = append(picked, provider{keyID: id})
		default:
			missing = append(missing, id.Name)
		}
	}
	return picked, missing
}

// read returns the content of a stored value, whichever provider wrote it.
func (c configuration) read(ctx context.Context, data []byte) ([]byte, error) {
	for _, p := range c {
		if p.wrote(data) {
			return p.read(ctx, data)
		}
	}
	return nil, fmt.Errorf("none of the keys %s has encrypted it", names(c.ids()))
}

func names(ids []keyID) string {
	var all []string
	for _, id := range ids {
		all = append(all, id.Name)
	}
	return strings.Join(all, ", ")
}
