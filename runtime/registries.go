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

// allRegistries is the key in registries.yaml for every registry without a key of its own.
const allRegistries = "*"

// Registries is the content of registries.yaml, with the fields that k3s has defined.
type Registries struct {
	Mirrors map[string]Mirror         `json:"mirrors,omitempty"`
	Configs map[string]RegistryConfig `json:"configs,omitempty"`
}

// Mirror lists the endpoints for the images of one registry, in the order in which they are tried.
type Mirror struct {
	Endpoints []string `json:"endpoint,omitempty"`
	// Rewrites maps regular expressions to replacements for the repository name, with $1 for groups. They apply
	// to the endpoints, not to the registry itself.
	Rewrites map[string]string `json:"rewrite,omitempty"`
}

// RegistryConfig has the credentials and TLS settings for one host: a registry or an endpoint.
type RegistryConfig struct {
	Auth *RegistryAuth `json:"auth,omitempty"`
	TLS  *RegistryTLS  `json:"tls,omitempty"`
}

// RegistryAuth has a user name and password, or "name:password" in base64, or a token.
type RegistryAuth struct {
	Username      string `json:"username,omitempty"`
	Password      secret `json:"password,omitempty"`
	Auth          secret `json:"auth,omitempty"`
	IdentityToken secret `json:"identity_token,omitempty"`
}

// RegistryTLS has the paths of files that must be readable when an image is pulled.
type RegistryTLS struct {
	CAFile             string `json:"ca_file,omitempty"`
	CertFile           string `json:"cert_file,omitempty"`
	KeyFile            string `json:"key_file,omitempty"`
	InsecureSkipVerify bool   `json:"insecure_skip_verify,omitempty"`
}

// secret is a string that is never logged.
type secret string

func (secret) String() string                 { return "***" }
func (secret) GoString() string               { return "***" }
func (secret) LogValue() slog.Value           { return slog.StringValue("***") }
func (s secret) MarshalText() ([]byte, error) { return []byte("***"), nil }

// LoadRegistries reads registries.yaml. A missing file means that no registries are configured.
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

// ParseRegistries parses the text of a registries.yaml and reports all its errors, including unknown keys: a
// mirror that is silently ignored is hard to notice.
func ParseRegistries(data []byte) (Registries, error) {
	var r Registries
	if err := yaml.UnmarshalStrict(data, &r); err != nil {
		// The prefixes of the parser do not help the user.
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

// configFor returns the configuration for a host. For docker.io the name in registries.yaml and the host of the
// connection differ; both are accepted.
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

// auths returns the credentials in the form of containerd's CRI configuration, by the host of the connection.
// Credentials of "*" cannot be expressed there, because containerd looks up hosts exactly.
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
	// Credentials under "*" apply to endpoints of mirrors without credentials of their own.
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

// endpoint is an address from which images may be pulled.
type endpoint struct {
	*url.URL
	// overridePath means that the path is complete, so that /v2 is not appended.
	overridePath bool
}

// parseEndpoint completes an address as containerd does: the scheme is https, except for localhost with a port
// other than 443, and the path is /v2 unless another path is given.
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
		return endpoint{}, fmt.Errorf("endpoint %q is not a URL like https://registry.example.com:5000", text)
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

// applyRegistries writes the files that containerd reads when it pulls: one hosts.toml per registry. It
// replaces the previous files. The returned rewriter must stay open as long as images are pulled.
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
	if err := writeHosts(dir, reg, r.cfg.DisableDefaultRegistryEndpoint, rw.address); err != nil {
		rw.close()
		return nil, err
	}
	if n := len(reg.Mirrors) + len(reg.Configs); n > 0 {
		r.log.Info("registries configured", keyPath, r.cfg.RegistriesFile, "mirrors", sortedKeys(reg.Mirrors), "configs", sortedKeys(reg.Configs))
	}
	return rw, nil
}

// writeHosts writes a hosts.toml for each registry that needs one into a folder.
func writeHosts(dir string, reg Registries, noDefault bool, address func(mirror, endpoint string) string) error {
	for host, text := range hostFiles(reg, noDefault, address) {
		sub := filepath.Join(dir, host)
		if err := os.MkdirAll(sub, 0o700); err != nil {
			return err
		}
		// The address of a rewritten endpoint is a secret; see rewriter.
		if err := os.WriteFile(filepath.Join(sub, "hosts.toml"), []byte(text), 0o600); err != nil {
			return err
		}
	}
	return nil
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
