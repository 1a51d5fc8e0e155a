package runtime

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/remotes/docker"
	"sigs.k8s.io/yaml"
)

// allRegistries is the key in registries.yaml that stands for every registry
// without a key of its own.
const allRegistries = "*"

// Registries is registries.yaml, field by field as k3s defined it.
type Registries struct {
	Mirrors map[string]Mirror         `json:"mirrors,omitempty"`
	Configs map[string]RegistryConfig `json:"configs,omitempty"`
}

// Mirror says where to look, in order, for the images of one registry.
type Mirror struct {
	Endpoints []string `json:"endpoint,omitempty"`
	// Rewrites change the repository's name for the endpoints, not for the registry
	// itself: from a regular expression to its replacement, with $1 for groups.
	Rewrites map[string]string `json:"rewrite,omitempty"`
}

// RegistryConfig is how to talk to one host: a registry or an endpoint.
type RegistryConfig struct {
	Auth *RegistryAuth `json:"auth,omitempty"`
	TLS  *RegistryTLS  `json:"tls,omitempty"`
}

// RegistryAuth is a name and password, or "name:password" in base64, or a token.
type RegistryAuth struct {
	Username      string `json:"username,omitempty"`
	Password      secret `json:"password,omitempty"`
	Auth          secret `json:"auth,omitempty"`
	IdentityToken secret `json:"identity_token,omitempty"`
}

// RegistryTLS names files that must be readable when an image is pulled.
type RegistryTLS struct {
	CAFile             string `json:"ca_file,omitempty"`
	CertFile           string `json:"cert_file,omitempty"`
	KeyFile            string `json:"key_file,omitempty"`
	InsecureSkipVerify bool   `json:"insecure_skip_verify,omitempty"`
}

// secret is a text that no log line shows.
type secret string

func (secret) String() string                 { return "***" }
func (secret) GoString() string               { return "***" }
func (secret) LogValue() slog.Value           { return slog.StringValue("***") }
func (s secret) MarshalText() ([]byte, error) { return []byte("***"), nil }

// LoadRegistries reads registries.yaml. No file means no registries.
func LoadRegistries(name string) (Registries, error) {
	if name == "" {
		return Registries{}, nil
	}
	data, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Registries{}, nil
	}
	if err != nil {
		return Registries{}, err
	}
	r, err := ParseRegistries(data)
	if err != nil {
		return Registries{}, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// ParseRegistries reads the text of a registries.yaml and reports all that is wrong
// with it, misspelt keys included: a mirror that is silently not used is found late.
func ParseRegistries(data []byte) (Registries, error) {
	var r Registries
	if err := yaml.UnmarshalStrict(data, &r); err != nil {
		// The parser's own way to it is nothing to the reader.
		what := strings.TrimPrefix(err.Error(), "error unmarshaling JSON: while decoding JSON: ")
		return Registries{}, errors.New(strings.TrimPrefix(what, "json: "))
	}
	return r, r.validate()
}

func (r Registries) validate() error {
	var errs []error
	for _, host := range sortedKeys(r.Mirrors) {
		m := r.Mirrors[host]
		for _, e := range m.Endpoints {
			if _, err := parseEndpoint(e); err != nil {
				errs = append(errs, fmt.Errorf("mirror %s: %w", host, err))
			}
		}
		for _, pattern := range sortedKeys(m.Rewrites) {
			if _, err := regexp.Compile(pattern); err != nil {
				errs = append(errs, fmt.Errorf("mirror %s: rewrite: %w", host, err))
			}
		}
	}
	for _, host := range sortedKeys(r.Configs) {
		if t := r.Configs[host].TLS; t != nil && (t.CertFile == "") != (t.KeyFile == "") {
			errs = append(errs, fmt.Errorf("config %s: cert_file and key_file must be given together", host))
		}
	}
	return errors.Join(errs...)
}

// configFor returns what is configured for a host, under the name that users know
// it by or the one that is connected to, which differ for docker.io.
func (r Registries) configFor(host string) RegistryConfig {
	if known, _ := docker.DefaultHost(host); known != host {
		if c, ok := r.Configs[known]; ok {
			return c
		}
	}
	if host == "registry-1.docker.io" {
		if c, ok := r.Configs[host]; ok {
			return c
		}
		host = "docker.io"
	}
	if c, ok := r.Configs[host]; ok {
		return c
	}
	return r.Configs[allRegistries]
}

// auths is the credentials as containerd's CRI takes them, by the host that is
// connected to. Those of "*" cannot be expressed: it looks hosts up exactly.
func (r Registries) auths() map[string]table {
	out := map[string]table{}
	for host, c := range r.Configs {
		if c.Auth == nil || host == allRegistries {
			continue
		}
		known, _ := docker.DefaultHost(host)
		out[known] = table{
			"username":      c.Auth.Username,
			"password":      string(c.Auth.Password),
			"auth":          string(c.Auth.Auth),
			"identitytoken": string(c.Auth.IdentityToken),
		}
	}
	// A mirror's endpoint may be covered by "*" only.
	if all, ok := r.Configs[allRegistries]; ok && all.Auth != nil {
		for _, m := range r.Mirrors {
			for _, e := range m.Endpoints {
				u, err := parseEndpoint(e)
				if err != nil || out[u.Host] != nil {
					continue
				}
				out[u.Host] = table{
					"username":      all.Auth.Username,
					"password":      string(all.Auth.Password),
					"auth":          string(all.Auth.Auth),
					"identitytoken": string(all.Auth.IdentityToken),
				}
			}
		}
	}
	return out
}

// endpoint is one address that images may be pulled from.
type endpoint struct {
	*url.URL
	// overridePath says that the path is the whole of it, and not to be followed by /v2.
	overridePath bool
}

// parseEndpoint completes an address as containerd does: https, except for the
// machine itself on an unusual port, and /v2 unless there is another path.
func parseEndpoint(text string) (endpoint, error) {
	full := text
	if !strings.Contains(full, "://") {
		full = "//" + full
	}
	u, err := url.Parse(full)
	if err != nil {
		return endpoint{}, fmt.Errorf("endpoint %q: %w", text, err)
	}
	if u.Host == "" || (u.Scheme != "" && u.Scheme != "http" && u.Scheme != "https") {
		return endpoint{}, fmt.Errorf("endpoint %q is not an address like https://registry.example.com:5000", text)
	}
	if u.Scheme == "" {
		u.Scheme = "https"
		if p := u.Port(); docker.IsLocalhost(u.Host) && p != "" && p != "443" {
			u.Scheme = "http"
		}
	}
	u.Host, _ = docker.DefaultHost(u.Host)
	u.Path = strings.TrimSuffix(u.Path, "/")
	switch u.Path {
	case "", "/v2":
		u.Path = "/v2"
		return endpoint{URL: u}, nil
	}
	return endpoint{URL: u, overridePath: true}, nil
}

// applyRegistries writes what containerd reads when it pulls: one hosts.toml per
// registry. Whatever was there is replaced. Rewrites need the returned helper for
// as long as images are pulled.
func (r *Runtime) applyRegistries(reg Registries) (*rewriter, error) {
	dir := r.cfg.certsDir()
	if err := os.RemoveAll(dir); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	rw, err := startRewriter(reg, r.log)
	if err != nil {
		return nil, fmt.Errorf("serve registry rewrites: %w", err)
	}
	for host, text := range hostFiles(reg, r.cfg.DisableDefaultRegistryEndpoint, rw.address) {
		sub := filepath.Join(dir, host)
		err := os.MkdirAll(sub, 0o700)
		if err == nil {
			// The address of a rewritten endpoint is a secret; see rewriter.
			err = os.WriteFile(filepath.Join(sub, "hosts.toml"), []byte(text), 0o600)
		}
		if err != nil {
			rw.close()
			return nil, err
		}
	}
	if n := len(reg.Mirrors) + len(reg.Configs); n > 0 {
		r.log.Info("registries configured", keyPath, r.cfg.RegistriesFile, "mirrors", sortedKeys(reg.Mirrors), "configs", sortedKeys(reg.Configs))
	}
	return rw, nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
