package external

import (
	"crypto/x509"
	"encoding/pem"
	"strings"
	"testing"
)

func encode(c *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})
}

// TestValidate: a wrong setting is named, with what to do, and without a password in it.
func TestValidate(t *testing.T) {
	ca, cert, key := certificates(t, "etcd")
	otherCA, _, otherKey := certificates(t, "other")
	good := []string{"https://[::1]:2379", "https://etcd.test:2379/"}
	for _, tc := range []struct {
		cfg  Config
		want string // empty for none
	}{
		{Config{Endpoints: good}, ""},
		{Config{Endpoints: good, CAFile: ca, CertFile: cert, KeyFile: key}, ""},
		{Config{Endpoints: []string{"http://192.0.2.1:2379", "unix:///run/etcd.sock"}}, ""},
		{Config{Endpoints: []string{"mysql://root:secret@tcp(db:3306)/k"}}, "kedge supports etcd only, and endpoint 1 is one of mysql"},
		{Config{Endpoints: []string{"postgres://u:secret@h:5432/k"}}, "endpoint 1 is one of postgres"},
		{Config{Endpoints: []string{"nats://h:4222"}}, "endpoint 1 is one of nats"},
		{Config{Endpoints: []string{"sqlite"}}, "kedge supports etcd only"},
		{Config{Endpoints: []string{"u:secret@tcp(h)/k?x=a://b"}}, "kedge supports etcd only"},
		{Config{Endpoints: []string{"https://u:secret@h:2379"}}, "without a user and a password"},
		{Config{Endpoints: []string{"https://h"}}, "with a host, a port and nothing else"},
		{Config{Endpoints: []string{"https://h:2379/path"}}, "with a host, a port and nothing else"},
		{Config{Endpoints: []string{"unix://run/etcd.sock"}}, "absolute path of a socket"},
		{Config{Endpoints: []string{"https://a:1", "http://b:1"}}, "others without"},
		{Config{Endpoints: []string{"http://a:1"}, CAFile: ca}, "--datastore-cafile is for endpoints with https"},
		{Config{Endpoints: good, CertFile: cert}, "give both"},
		{Config{Endpoints: good, CertFile: cert, KeyFile: otherKey}, "does not match"},
		{Config{Endpoints: good, CAFile: key}, "has no certificate"},
		{Config{Endpoints: good, CAFile: otherCA + ".none"}, "--datastore-cafile: open"},
	} {
		err := tc.cfg.Validate()
		switch {
		case tc.want == "" && err != nil:
			t.Errorf("%v: %v", tc.cfg, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "secret")):
			t.Errorf("%v: %v, want %q", tc.cfg, err, tc.want)
		}
	}
}
