package s3

import (
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"regexp"
	"strconv"
	"strings"
	"time"

	"kedge/internal/errorkind"
)

// Secret is a string that is hidden in logs and errors.
type Secret string

// String implements [fmt.Stringer].
func (Secret) String() string { return "***" }

// GoString implements [fmt.GoStringer].
func (Secret) GoString() string { return "***" }

// Config says where the objects are, and how to get there.
type Config struct {
	Endpoint  string // HOST or HOST:PORT of the S3 server
	Bucket    string // must exist
	Folder    string // of the objects in the bucket, without a slash at its ends; empty for the bucket itself
	Region    string // of the bucket
	AccessKey string
	SecretKey Secret

	// NamePrefix begins the names of this node's objects in a folder that nodes share. Incomplete uploads of other names
	// are left alone. Empty if the folder belongs to this node.
	NamePrefix string

	SkipVerify bool   // do not verify the server's certificate
	EndpointCA string // authorities of the server's certificate: the path of a PEM file, PEM, or PEM in base64; empty for the system's
	Insecure   bool   // http in place of https

	// Timeout is how long an operation may go on while nothing gets through. It does not limit transfers that proceed.
	Timeout time.Duration
}

// DefaultConfig returns the values that k3s has for settings that are not made.
func DefaultConfig() Config {
	return Config{Endpoint: "s3.amazonaws.com", Region: "us-east-1", Timeout: 5 * time.Minute}
}

var (
	bucketName = regexp.MustCompile(`^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$`)
	folderName = regexp.MustCompile(`^[A-Za-z0-9!_.*'()-]+(/[A-Za-z0-9!_.*'()-]+)*$`)
)

// Validate returns all mistakes in the settings, joined.
func (c Config) Validate() error {
	var errs []error
	bad := func(name, format string, args ...any) {
		errs = append(errs, errorkind.BadSetting(name, format, args...))
	}
	switch host, port := splitEndpoint(c.Endpoint); {
	case c.Endpoint == "":
		bad("s3-endpoint", " is empty: name the S3 server, as HOST or HOST:PORT")
	case strings.Contains(c.Endpoint, "://"):
		bad("s3-endpoint", " %q must have no scheme: write HOST or HOST:PORT, and set --s3-insecure for a server without TLS", c.Endpoint)
	case host == "" || strings.ContainsAny(c.Endpoint, "/?#@ \t\n") || !validPort(port):
		bad("s3-endpoint", " %q is not like HOST or HOST:PORT", c.Endpoint)
	}
	switch {
	case c.Bucket == "":
		bad("s3-bucket", " is empty: name the bucket that the snapshots are to be stored in")
	case !bucketName.MatchString(c.Bucket):
		bad("s3-bucket", " %q is not the name of a bucket: 3 to 63 of a-z, 0-9, dots and dashes", c.Bucket)
	}
	if c.Folder != "" && (!folderName.MatchString(c.Folder) || path.Clean("/"+c.Folder) != "/"+c.Folder) {
		bad("s3-folder", " %q is not the name of a folder: names like a/b, without a slash at the ends", c.Folder)
	}
	if c.AccessKey == "" {
		bad("s3-access-key", " is empty: S3 servers let only those in who have a key")
	}
	if c.SecretKey == "" {
		bad("s3-secret-key", " is empty: S3 servers let only those in who have a key")
	}
	if c.SkipVerify && c.EndpointCA != "" {
		errs = append(errs, errorkind.BadSettings("s3-skip-ssl-verify", "", "s3-endpoint-ca", " contradict each other: leave one out"))
	}
	if c.Insecure && (c.SkipVerify || c.EndpointCA != "") {
		bad("s3-insecure", " is for a server without TLS, which has no certificate: leave it out, or the settings of the certificate")
	}
	if _, err := c.roots(); err != nil {
		errs = append(errs, err)
	}
	if c.Timeout <= 0 {
		bad("s3-timeout", " %s is not a time above zero", c.Timeout)
	}
	return errors.Join(errs...)
}

// splitEndpoint returns the host of an endpoint, and its port, which may be missing.
func splitEndpoint(endpoint string) (host, port string) {
	if h, p, err := net.SplitHostPort(endpoint); err == nil {
		return h, p
	}
	if bare := strings.TrimSuffix(strings.TrimPrefix(endpoint, "["), "]"); net.ParseIP(bare) != nil {
		return bare, ""
	}
	if strings.Contains(endpoint, ":") {
		return "", ""
	}
	return endpoint, ""
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return port == "" || err == nil && n > 0
}

// roots returns the authorities in EndpointCA; nil for the system's.
func (c Config) roots() (*x509.CertPool, error) {
	if c.EndpointCA == "" {
		return nil, nil
	}
	data := []byte(c.EndpointCA)
	if !strings.Contains(c.EndpointCA, "-----BEGIN") {
		if decoded, err := base64.StdEncoding.DecodeString(strings.TrimSpace(c.EndpointCA)); err == nil && strings.Contains(string(decoded), "-----BEGIN") {
			data = decoded
		} else if data, err = os.ReadFile(c.EndpointCA); err != nil {
			return nil, errorkind.BadSetting("s3-endpoint-ca", " cannot be read: %w; give a file with certificates in PEM", err)
		}
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(data) {
		return nil, errorkind.BadSetting("s3-endpoint-ca", " has no certificate in PEM")
	}
	return pool, nil
}

// secretKeys are the keys of a Secret with the configuration, and what each sets.
var secretKeys = map[string]func(c *Config, value string) error{
	"etcd-s3-endpoint":        func(c *Config, v string) error { c.Endpoint = v; return nil },
	"etcd-s3-bucket":          func(c *Config, v string) error { c.Bucket = v; return nil },
	"etcd-s3-folder":          func(c *Config, v string) error { c.Folder = strings.Trim(v, "/"); return nil },
	"etcd-s3-region":          func(c *Config, v string) error { c.Region = v; return nil },
	"etcd-s3-access-key":      func(c *Config, v string) error { c.AccessKey = v; return nil },
	"etcd-s3-secret-key":      func(c *Config, v string) error { c.SecretKey = Secret(v); return nil },
	"etcd-s3-skip-ssl-verify": func(c *Config, v string) error { return setBool(&c.SkipVerify, v) },
	"etcd-s3-insecure":        func(c *Config, v string) error { return setBool(&c.Insecure, v) },
	// k3s takes PEM here, and base64 of PEM from its flag. Never a path: whoever may write the Secret must not choose
	// which files of a server are read.
	"etcd-s3-endpoint-ca": func(c *Config, v string) error { return setInlineCA(&c.EndpointCA, v) },
	"etcd-s3-timeout": func(c *Config, v string) (err error) {
		if c.Timeout, err = time.ParseDuration(v); err != nil {
			return fmt.Errorf("%q is not a time such as 5m", v)
		}
		return nil
	},
}

func setBool(to *bool, value string) (err error) {
	if *to, err = strconv.ParseBool(value); err != nil {
		return fmt.Errorf("%q is neither true nor false", value)
	}
	return nil
}

func setInlineCA(to *string, value string) error {
	pem := value
	if decoded, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value)); err == nil {
		pem = string(decoded)
	}
	if !x509.NewCertPool().AppendCertsFromPEM([]byte(pem)) {
		return errors.New("there is no certificate in PEM, or PEM in base64")
	}
	*to = pem
	return nil
}

// FromSecret returns the configuration in the data of a Secret with the keys that k3s has for it. Empty values count as
// missing, for which there are those of [DefaultConfig]. A key of k3s that kedge cannot follow is an error.
func FromSecret(data map[string][]byte) (Config, error) {
	c := DefaultConfig()
	var errs []error
	for key, raw := range data {
		value := strings.TrimSpace(string(raw))
		set, known := secretKeys[key]
		switch {
		case value == "":
		case known:
			if err := set(&c, value); err != nil {
				errs = append(errs, fmt.Errorf("%s of the Secret: %w", key, err))
			}
		case strings.HasPrefix(key, "etcd-s3-"):
			errs = append(errs, fmt.Errorf("%s of the Secret is a key that kedge does not have: remove it", key))
		}
	}
	if len(errs) > 0 {
		return Config{}, errors.Join(errs...)
	}
	if err := c.Validate(); err != nil {
		return Config{}, inSecret(err)
	}
	return c, nil
}

// inSecret names the keys of the Secret in the errors of Validate.
func inSecret(err error) error {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return err
	}
	var errs []error
	for _, e := range joined.Unwrap() {
		var s *errorkind.SettingError
		if errors.As(e, &s) {
			e = errors.New(s.Text(func(name string) string { return "etcd-" + name + " of the Secret" }))
		}
		errs = append(errs, e)
	}
	return errors.Join(errs...)
}
