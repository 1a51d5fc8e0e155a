package peerrequests

import (
	"context"
	"crypto/tls"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"kedge/internal/joining"
	"kedge/internal/pki"
)

// TestWhoIsAnswered: a server of the cluster is answered, and neither a witness, nor a server that was removed, nor anybody with a
// certificate of another authority.
func TestWhoIsAnswered(t *testing.T) {
	dir, now := t.TempDir(), time.Now()
	authority := func(name string) *pki.Authority {
		ca, err := pki.EnsureAuthority(dir, name, now)
		if err != nil {
			t.Fatal(err)
		}
		return ca
	}
	api, peers, other := authority("api"), authority("peers"), authority("other")
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+Prefix+"x", func(w http.ResponseWriter, _ *http.Request) { Reply(w, "secret", nil) })
	// A witness could have put itself into the list.
	members := func(context.Context) ([]string, error) { return []string{"s1", "s2", "w"}, nil }
	srv := httptest.NewUnstartedServer(Handler("s1", peers.Cert, members, mux, http.NotFoundHandler()))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	serving, err := api.EnsureLeaf(dir, "serving", pki.Leaf{CommonName: "api", DNSNames: []string{"host"}, IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}, now)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(serving.CertFile, serving.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	defer srv.Close()
	for _, tc := range []struct {
		name string
		by   *pki.Authority
		leaf pki.Leaf
		want string // in the error; empty: it is answered
	}{
		{"server", peers, pki.Leaf{CommonName: "s2", Client: true}, ""},
		{"removed", peers, pki.Leaf{CommonName: "s3", Client: true}, "not a server of the cluster any more"},
		{"witness", peers, pki.Leaf{CommonName: "w", Organizations: []string{joining.WitnessGroup}, Client: true}, "is a witness"},
		{"stranger", other, pki.Leaf{CommonName: "s2", Client: true}, "only servers of the cluster"},
	} {
		pair, err := tc.by.EnsureLeaf(dir, tc.name, tc.leaf, now)
		if err != nil {
			t.Fatal(err)
		}
		var got string
		err = NewClient(api.Cert, "host", pair.CertFile, pair.KeyFile).Ask(t.Context(), 5*time.Second, http.MethodGet,
			Address{Name: "s1", API: strings.TrimPrefix(srv.URL, "https://")}, Prefix+"x", http.NoBody, func(r io.Reader) error {
				data, err := io.ReadAll(r)
				got = string(data)
				return err
			})
		switch {
		case tc.want == "" && (err != nil || !strings.Contains(got, "secret")):
			t.Errorf("%s: %q, %v", tc.name, got, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want) || got != ""):
			t.Errorf("%s: %q, %v, want an error with %q", tc.name, got, err, tc.want)
		}
	}
}
