package external

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/internal/errorkind"
)

// TestWrongServers: what does not pass by itself ends the start with one sentence.
func TestWrongServers(t *testing.T) {
	e := newEtcd(t, "https")
	e.CA, e.Cert, e.Key = certificates(t, "etcd")
	otherCA, otherCert, otherKey := certificates(t, "other")
	plain := newEtcd(t, "http")
	for _, etcd := range []*etcd{e, plain} {
		etcd.start(t)
	}
	// Both answer before the cases, so that none of them waits for a start.
	launch(t, Config{Endpoints: []string{e.URL}, CAFile: e.CA, CertFile: e.Cert, KeyFile: e.Key}, Server{Name: "s1", Cluster: "abc"}).awaitReady(t)
	launch(t, Config{Endpoints: []string{plain.URL}}, Server{Name: "s1", Cluster: "abc"}).awaitReady(t)
	web := httptest.NewServer(http.NotFoundHandler())
	defer web.Close()
	modern := httptest.NewUnstartedServer(http.NotFoundHandler())
	modern.EnableHTTP2 = true
	modern.StartTLS()
	defer modern.Close()

	for _, tc := range []struct {
		name string
		cfg  Config
		want string
	}{
		{"an authority that is not trusted", Config{Endpoints: []string{e.URL}, CAFile: otherCA, CertFile: e.Cert, KeyFile: e.Key}, "does not trust"},
		{"a certificate that is not trusted", Config{Endpoints: []string{e.URL}, CAFile: e.CA, CertFile: otherCert, KeyFile: otherKey}, "refuses this server's certificate"},
		{"no certificate", Config{Endpoints: []string{e.URL}, CAFile: e.CA}, "refuses this server's certificate"},
		{"another name", Config{Endpoints: []string{strings.Replace(e.URL, "127.0.0.1", "localhost", 1)}, CAFile: e.CA, CertFile: e.Cert, KeyFile: e.Key}, "is not valid for it"},
		{"TLS where there is none", Config{Endpoints: []string{strings.Replace(plain.URL, "http:", "https:", 1)}}, "answers without TLS"},
		{"no TLS where there is some", Config{Endpoints: []string{strings.Replace(e.URL, "https:", "http:", 1)}}, "answers with TLS only"},
		{"a web server", Config{Endpoints: []string{web.URL}}, "is not an etcd"},
		{"a web server with TLS", Config{Endpoints: []string{modern.URL}, CAFile: authorityOf(t, modern)}, "is not an etcd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := launch(t, tc.cfg, Server{Name: "s2", Cluster: "abc"}).refusal(t)
			if errorkind.ExitCode(err) != errorkind.ExitConfig || !strings.Contains(err.Error(), tc.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("it ended with %v, want %q", err, tc.want)
			}
		})
	}
}

// authorityOf returns the file with the authority of a test server's certificate.
func authorityOf(t *testing.T, s *httptest.Server) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(file, encode(s.Certificate()), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
