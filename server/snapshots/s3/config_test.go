package s3

import (
	"encoding/base64"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
)

func valid() Config {
	c := DefaultConfig()
	c.Bucket, c.AccessKey, c.SecretKey = "snapshots", "key", "top secret"
	return c
}

func TestValidate(t *testing.T) {
	ca, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range []func(*Config){
		func(*Config) {},
		func(c *Config) { c.Endpoint = "10.0.0.1:9000" },
		func(c *Config) { c.Endpoint = "[fd00::1]:9000" },
		func(c *Config) { c.Endpoint, c.Insecure = "minio.example.com:9000", true },
		func(c *Config) { c.Folder = "site/a" },
		func(c *Config) { c.EndpointCA = ca.CertFile() },
		func(c *Config) { c.EndpointCA = string(ca.PEM()) },
		func(c *Config) { c.EndpointCA = base64.StdEncoding.EncodeToString(ca.PEM()) },
	} {
		c := valid()
		change(&c)
		if err := c.Validate(); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
	}
	for want, change := range map[string]func(*Config){
		`--s3-endpoint is empty`:                               func(c *Config) { c.Endpoint = "" },
		`--s3-endpoint "https://s3" must have no scheme`:       func(c *Config) { c.Endpoint = "https://s3" },
		`--s3-endpoint "s3/x" is not like`:                     func(c *Config) { c.Endpoint = "s3/x" },
		`--s3-endpoint "s3:port" is not like`:                  func(c *Config) { c.Endpoint = "s3:port" },
		`--s3-endpoint "fd00::1:x" is not like`:                func(c *Config) { c.Endpoint = "fd00::1:x" },
		`--s3-bucket is empty`:                                 func(c *Config) { c.Bucket = "" },
		`--s3-bucket "A_b" is not the name`:                    func(c *Config) { c.Bucket = "A_b" },
		`--s3-folder "/a" is not the name`:                     func(c *Config) { c.Folder = "/a" },
		`--s3-folder "a/../b" is not the name`:                 func(c *Config) { c.Folder = "a/../b" },
		`--s3-access-key is empty`:                             func(c *Config) { c.AccessKey = "" },
		`--s3-secret-key is empty`:                             func(c *Config) { c.SecretKey = "" },
		`--s3-skip-ssl-verify and --s3-endpoint-ca contradict`: func(c *Config) { c.SkipVerify, c.EndpointCA = true, ca.CertFile() },
		`--s3-insecure is for a server without TLS`:            func(c *Config) { c.SkipVerify, c.Insecure = true, true },
		`--s3-endpoint-ca cannot be read`:                      func(c *Config) { c.EndpointCA = "/nowhere" },
		`--s3-endpoint-ca has no certificate`:                  func(c *Config) { c.EndpointCA = os.Args[0] },
		`--s3-timeout 0s is not a time above zero`:             func(c *Config) { c.Timeout = 0 },
	} {
		c := valid()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v\nwant %s", err, want)
		}
	}
}

func TestSecretIsHidden(t *testing.T) {
	c := valid()
	for _, format := range []string{"%v", "%+v", "%#v", "%s", "%q"} {
		if text := fmt.Sprintf(format, c); strings.Contains(text, string(c.SecretKey)) {
			t.Errorf("%s shows the secret: %s", format, text)
		}
	}
}

func TestFromSecret(t *testing.T) {
	ca, err := pki.EnsureAuthority(t.TempDir(), "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	full := map[string]string{
		"etcd-s3-endpoint": "minio.example.com:9000", "etcd-s3-bucket": "snapshots", "etcd-s3-folder": "/site/a/", "etcd-s3-region": "eu-central-1",
		"etcd-s3-access-key": "key", "etcd-s3-secret-key": "top secret\n", "etcd-s3-skip-ssl-verify": "false", "etcd-s3-insecure": "false",
		"etcd-s3-endpoint-ca": string(ca.PEM()), "etcd-s3-timeout": "90s",
		// Of k3s's example, and empty there.
		"etcd-s3-endpoint-ca-name": "", "etcd-s3-proxy": "", "note": "of the administrator",
	}
	want := Config{Endpoint: "minio.example.com:9000", Bucket: "snapshots", Folder: "site/a", Region: "eu-central-1", AccessKey: "key", SecretKey: "top secret",
		EndpointCA: strings.TrimSpace(string(ca.PEM())), Timeout: 90 * time.Second}
	if c, err := FromSecret(data(full, "", "")); err != nil || c != want {
		t.Errorf("%+v, %v\nwant %+v", c, err, want)
	}
	if c, err := FromSecret(data(full, "etcd-s3-endpoint-ca", base64.StdEncoding.EncodeToString(ca.PEM()))); err != nil || strings.TrimSpace(c.EndpointCA) != want.EndpointCA {
		t.Errorf("PEM in base64: %+v, %v", c, err)
	}
	c, err := FromSecret(data(map[string]string{"etcd-s3-bucket": "b-1", "etcd-s3-access-key": "key", "etcd-s3-secret-key": "x"}, "", ""))
	if err != nil || c.Endpoint != "s3.amazonaws.com" || c.Region != "us-east-1" || c.Timeout != 5*time.Minute {
		t.Errorf("%+v, %v", c, err)
	}
	for key, test := range map[string]struct{ value, says string }{
		"etcd-s3-skip-ssl-verify":  {"perhaps", `etcd-s3-skip-ssl-verify of the Secret: "perhaps" is neither true nor false`},
		"etcd-s3-timeout":          {"soon", `etcd-s3-timeout of the Secret: "soon" is not a time`},
		"etcd-s3-endpoint-ca":      {ca.CertFile(), "etcd-s3-endpoint-ca of the Secret: there is no certificate"},
		"etcd-s3-proxy":            {"http://proxy", "etcd-s3-proxy of the Secret is a key that kedge does not have"},
		"etcd-s3-endpoint-ca-name": {"configmap", "etcd-s3-endpoint-ca-name of the Secret is a key that kedge does not have"},
		"etcd-s3-bucket":           {"", "etcd-s3-bucket of the Secret is empty"},
		"etcd-s3-insecure":         {"true", "etcd-s3-insecure of the Secret is for a server without TLS"},
	} {
		if _, err := FromSecret(data(full, key, test.value)); err == nil || !strings.Contains(err.Error(), test.says) {
			t.Errorf("%s: %v\nwant %s", key, err, test.says)
		}
	}
}

// data returns the data of a Secret, with one key changed if it is not empty.
func data(values map[string]string, key, value string) map[string][]byte {
	out := map[string][]byte{}
	for k, v := range values {
		out[k] = []byte(v)
	}
	if key != "" {
		out[key] = []byte(value)
	}
	return out
}
