package secretsencryption

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/peerrequests"
)

func newClient(authority *x509.Certificate, host, certFile, keyFile string) *Client {
	return NewClient(peerrequests.NewClient(authority, host, certFile, keyFile))
}

// TestOnlyServersAreAnswered: the keys are for holders of a certificate of the links between the datastores whose name is a
// server of the cluster. Requests for the API pass.
func TestOnlyServersAreAnswered(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	authority := func(name string) *pki.Authority {
		t.Helper()
		a, err := pki.EnsureAuthority(dir, name, now)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	servers, clients, peersCA := authority("server-ca"), authority("client-ca"), authority("peer-ca")
	leaf := func(by *pki.Authority, name string, want pki.Leaf) pki.Pair {
		t.Helper()
		p, err := by.EnsureLeaf(dir, name, want, now)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	serving := leaf(servers, "serving", pki.Leaf{CommonName: "kube-apiserver", DNSNames: []string{"api.test"}, Server: true})
	peer := leaf(peersCA, "peer-s2", pki.Leaf{CommonName: "s2", Client: true})
	removed := leaf(peersCA, "peer-s9", pki.Leaf{CommonName: "s9", Client: true})
	admin := leaf(clients, "admin", pki.Leaf{CommonName: "s2", Organizations: []string{"system:masters"}, Client: true})

	home := t.TempDir()
	text, err := first(t).file()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(identity.EncryptionConfigFile(home), text, 0o600); err != nil {
		t.Fatal(err)
	}
	k := NewKeeper("s1", home, func() (Store, error) { return nil, errors.New("no datastore") }, nil, slog.New(slog.DiscardHandler))
	api := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "Unauthorized", http.StatusUnauthorized) })
	members := func(context.Context) ([]string, error) { return []string{"s1", "s2"}, nil }
	mux := http.NewServeMux()
	k.Answer(mux)
	srv := httptest.NewUnstartedServer(peerrequests.Handler("s1", peersCA.Cert, members, mux, api))
	cert, err := tls.LoadX509KeyPair(serving.CertFile, serving.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(clients.Cert)
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, ClientCAs: roots}
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.StartTLS()
	defer srv.Close()
	at := address{Name: "s1", API: strings.TrimPrefix(srv.URL, "https://")}

	good := newClient(servers.Cert, "api.test", peer.CertFile, peer.KeyFile)
	if data, err := good.File(t.Context(), at.Name, at.API); err != nil || string(data) != string(text) {
		t.Errorf("a server gets %q, %v", data, err)
	}
	if s, err := good.state(t.Context(), at); err != nil || s.Name != "s1" {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := good.apply(t.Context(), at, text); err == nil || err.Error() != "the API server is starting" {
		t.Errorf("apply: %v", err)
	}
	if _, err := good.state(t.Context(), address{Name: "s3", API: at.API}); err == nil || !strings.Contains(err.Error(), `answers the server "s1"`) {
		t.Errorf("another server at the address: %v", err)
	}
	for what, pair := range map[string]pki.Pair{"an administrator": admin, "a removed server": removed} {
		if _, err := newClient(servers.Cert, "api.test", pair.CertFile, pair.KeyFile).File(t.Context(), at.Name, at.API); err == nil || !strings.Contains(err.Error(), "server") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := newClient(clients.Cert, "api.test", peer.CertFile, peer.KeyFile).state(t.Context(), at); err == nil {
		t.Error("a server with a certificate of another authority was believed")
	}
	plain := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer plain.CloseIdleConnections()
	for path, want := range map[string]int{statePath: http.StatusForbidden, filePath: http.StatusForbidden, "/api": http.StatusUnauthorized} {
		resp, err := plain.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s without a certificate: %d, want %d", path, resp.StatusCode, want)
		}
	}

	// An older kedge has only its API there.
	old := httptest.NewUnstartedServer(api)
	old.TLS = &tls.Config{Certificates: []tls.Certificate{cert}}
	old.StartTLS()
	defer old.Close()
	if _, err := good.state(t.Context(), address{Name: "s1", API: strings.TrimPrefix(old.URL, "https://")}); err == nil || !strings.Contains(err.Error(), "upgrade it") {
		t.Errorf("an older kedge: %v", err)
	}
	if left, err := filepath.Glob(filepath.Join(home, "*")); err != nil || len(left) != 1 {
		t.Errorf("files %v, %v", left, err)
	}
}
