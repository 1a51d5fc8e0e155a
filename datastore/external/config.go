package external

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kedge/internal/errorkind"
)

// Config says how the etcd is reached.
type Config struct {
	// Endpoints are the URLs of its members: https://HOST:PORT, http://HOST:PORT or unix:///PATH.
	Endpoints []string
	// CAFile has the authority of its certificates; empty for the system's authorities. CertFile and KeyFile are the certificate
	// with which this server logs in, and its key; empty for none.
	CAFile, CertFile, KeyFile string
}

// The settings that the errors are about.
const (
	settingEndpoint = "datastore-endpoint"
	settingCA       = "datastore-cafile"
	settingCert     = "datastore-certfile"
	settingKey      = "datastore-keyfile"
)

// Validate reports all mistakes in c at once. It reads the files. No error has the text of an endpoint that could hold a password.
func (c Config) Validate() error {
	var errs []error
	for i, e := range c.Endpoints {
		if err := checkEndpoint(e, i+1); err != nil {
			errs = append(errs, errorkind.BadItem(settingEndpoint, e, "%w", err))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	if slices.ContainsFunc(c.Endpoints, func(e string) bool { return strings.HasPrefix(e, "https://") != c.secure() }) {
		return errorkind.BadSetting(settingEndpoint, " has endpoints with https and others without; write all of them with https")
	}
	if !c.secure() {
		for _, f := range []struct{ setting, file string }{{settingCA, c.CAFile}, {settingCert, c.CertFile}, {settingKey, c.KeyFile}} {
			if f.file != "" {
				errs = append(errs, errorkind.BadSetting(f.setting, " is for endpoints with https; write https:// in --%s, or leave it out", settingEndpoint))
			}
		}
		return errors.Join(errs...)
	}
	_, err := c.tls()
	return err
}

// checkEndpoint returns what is wrong with the nth endpoint.
func checkEndpoint(text string, n int) error {
	scheme, rest, ok := strings.Cut(text, "://")
	u, err := url.Parse(text)
	switch {
	case !ok || !isWord(scheme):
		// It may be one of the drivers of a database whose address has no scheme, with a password in it.
		return fmt.Errorf(": endpoint %d is not a URL such as https://HOST:2379; kedge supports etcd only", n)
	case !slices.Contains([]string{"http", "https", "unix"}, scheme):
		return fmt.Errorf(": kedge supports etcd only, and endpoint %d is one of %s; write endpoints of an etcd, such as https://HOST:2379, or leave the setting out for kedge's own datastore", n, scheme)
	case err != nil || u.User != nil || strings.Contains(rest, "@"):
		return fmt.Errorf(": endpoint %d is not a URL such as https://HOST:2379, without a user and a password; kedge logs in with %s and %s", n, "--"+settingCert, "--"+settingKey)
	case scheme == "unix" && (u.Host != "" || !filepath.IsAbs(u.Path)):
		return fmt.Errorf(": endpoint %d is not the absolute path of a socket, as in unix:///run/etcd.sock", n)
	case scheme != "unix" && (u.Hostname() == "" || u.Port() == "" || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != ""):
		return fmt.Errorf(": endpoint %d is not like https://HOST:2379, with a host, a port and nothing else", n)
	}
	return nil
}

// isWord reports whether text is only of letters, digits and plus signs.
func isWord(text string) bool {
	return text != "" && !strings.ContainsFunc(text, func(r rune) bool { return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '+' })
}

// tls returns the configuration of connections to https endpoints. The certificate is read for each connection, so that another
// one needs no restart.
func (c Config) tls() (*tls.Config, error) {
	var errs []error
	out := &tls.Config{MinVersion: tls.VersionTLS12}
	if c.CAFile != "" {
		data, err := os.ReadFile(c.CAFile)
		if err == nil {
			out.RootCAs = x509.NewCertPool()
			if !out.RootCAs.AppendCertsFromPEM(data) {
				err = fmt.Errorf("%s has no certificate", c.CAFile)
			}
		}
		if err != nil {
			errs = append(errs, errorkind.BadSetting(settingCA, ": %w", err))
		}
	}
	switch {
	case (c.CertFile == "") != (c.KeyFile == ""):
		errs = append(errs, errorkind.BadSettings(settingCert, "", settingKey, " belong together: give both, or neither"))
	case c.CertFile != "":
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(c.CertFile, c.KeyFile)
			return &pair, err
		}
		if _, err := load(); err != nil {
			errs = append(errs, errorkind.BadSettings(settingCert, "", settingKey, ": %w", err))
		}
		out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return out, errors.Join(errs...)
}

// secure reports whether the connections use TLS.
func (c Config) secure() bool { return strings.HasPrefix(c.Endpoints[0], "https://") }

// String names the etcd for messages.
func (c Config) String() string { return strings.Join(c.Endpoints, ", ") }
