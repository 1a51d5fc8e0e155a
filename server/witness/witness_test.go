package witness

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes/fake"

	"kedge/datastore"
	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/server/join"
)

// first is a server that admits witnesses.
type first struct {
	*join.Service
	url      string
	admitted int
}

// URLs implements join.Servers.
func (f *first) URLs() []string { return []string{f.url} }

// Credentials implements join.Servers.
func (f *first) Credentials() (joining.Credentials, error) {
	return nil, errors.New("not for a witness")
}

// Admit implements join.Servers.
func (f *first) Admit(context.Context, string, []netip.AddrPort) (json.RawMessage, error) {
	return nil, errors.New("not for a witness")
}

// AdmitWitness implements join.Servers.
func (f *first) AdmitWitness(_ context.Context, name string, _ []netip.AddrPort) (json.RawMessage, error) {
	f.admitted++
	return json.Marshal(datastore.Admission{Cluster: "1a", Name: name, ID: "2b", URL: "http://127.0.0.2:2380", Members: []datastore.Peer{}})
}

func newFirst(t *testing.T) *first {
	t.Helper()
	dir := t.TempDir()
	cas := map[string]*pki.Authority{}
	for _, name := range []string{"server-ca", "client-ca", "kubelet-ca", "peer-ca"} {
		ca, err := pki.EnsureAuthority(dir, name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		cas[name] = ca
	}
	f := &first{}
	f.Service = join.New(join.Config{
		ServerCA: cas["server-ca"], ClientCA: cas["client-ca"], KubeletCA: cas["kubelet-ca"], PeerCA: cas["peer-ca"], PeerName: datastore.PeerServerName, Servers: f, Life: join.Life,
		Cluster: joining.Cluster{ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")}, ClusterDomain: "cluster.local"},
	}, fake.NewClientset(), slog.New(slog.DiscardHandler))
	pair, err := cas["server-ca"].EnsureLeaf(dir, "api", pki.Leaf{CommonName: "api", IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(f.Handler(http.NotFoundHandler()))
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	srv.StartTLS()
	t.Cleanup(srv.Close)
	f.url = srv.URL
	return f
}

func (f *first) config(t *testing.T, dir string) Config {
	t.Helper()
	made, err := f.Tokens().Create(t.Context(), f.CAHash(), join.Spec{Role: joining.Witness, TTL: time.Hour, Uses: 1})
	if err != nil {
		t.Fatal(err)
	}
	return Config{Dir: filepath.Join(dir, "witness"), Server: f.url, Token: made.Reveal(), NodeName: "w", Peers: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:2380")}, Forget: func() error { return nil }}
}

func prepare(t *testing.T, cfg Config) (*Witness, error) {
	t.Helper()
	return Prepare(t.Context(), cfg, slog.New(slog.DiscardHandler))
}

// TestWitnessJoinsOnce: a machine joins with its token once, needs neither token nor server later, and has the certificate
// of its datastore.
func TestWitnessJoinsOnce(t *testing.T) {
	f := newFirst(t)
	cfg := f.config(t, t.TempDir())
	w, err := prepare(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	if a, err := w.Admission(); err != nil || a.Name != "w" || a.ID != "2b" {
		t.Errorf("admission %+v, %v", a, err)
	}
	peer := PeerConfig(cfg.Dir, 2380, nil)
	if _, err := tls.LoadX509KeyPair(peer.CertFile, peer.KeyFile); err != nil {
		t.Error(err)
	}
	before, err := os.ReadFile(peer.CertFile)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Token, cfg.Server = "", ""
	if err := cfg.Validate(); err != nil {
		t.Errorf("a later start without settings: %v", err)
	}
	if w, err = prepare(t, cfg); err != nil {
		t.Fatalf("a later start: %v", err)
	}
	if err := w.Renew(t.Context()); err != nil {
		t.Fatalf("renewal with the server that it has kept: %v", err)
	}
	if after, err := os.ReadFile(peer.CertFile); err != nil || string(after) == string(before) {
		t.Errorf("the certificate is the same after a renewal (%v)", err)
	}
	if f.admitted != 1 {
		t.Errorf("admitted %d times", f.admitted)
	}
	for _, e := range Certificates(cfg.Dir, time.Now()) {
		if e.Problem != "" {
			t.Errorf("%+v", e)
		}
	}
}

// TestRenewalWhereServersAreNow: when the server that a witness knows is gone, it asks those that the datastore knows.
func TestRenewalWhereServersAreNow(t *testing.T) {
	f := newFirst(t)
	cfg := f.config(t, t.TempDir())
	w, err := prepare(t, cfg)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(f.url)
	if err != nil {
		t.Fatal(err)
	}
	w.cfg.Server, w.state.Cluster.Servers = "", nil
	w.state.Server = "https://127.0.0.2:" + u.Port() // nothing answers there
	if err := w.Renew(t.Context()); err == nil {
		t.Fatal("a server answers that is gone")
	}
	w.SetServers(func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} })
	if err := w.Renew(t.Context()); err != nil {
		t.Error(err)
	}
	if w.state.Server != "https://127.0.0.1:"+u.Port() {
		t.Errorf("it keeps %s", w.state.Server)
	}
}

// TestRemovedWitnessJoinsAnew: with a new token, and keeps its old datastore; without one it stays what it was.
func TestRemovedWitnessJoinsAnew(t *testing.T) {
	f := newFirst(t)
	dir := t.TempDir()
	cfg := f.config(t, dir)
	if _, err := prepare(t, cfg); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(StoreDir(cfg.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(StoreDir(cfg.Dir), "removed"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if removed, err := datastore.Removed(StoreDir(cfg.Dir)); !removed || err != nil {
		t.Fatalf("removed: %v, %v", removed, err)
	}
	without := cfg
	without.Token = ""
	if _, err := prepare(t, without); err != nil || f.admitted != 1 {
		t.Errorf("without a token: %v, admitted %d times", err, f.admitted)
	}
	if _, err := prepare(t, f.config(t, dir)); err != nil || f.admitted != 2 {
		t.Errorf("with a token: %v, admitted %d times", err, f.admitted)
	}
	if kept, err := filepath.Glob(StoreDir(cfg.Dir) + ".removed-*"); len(kept) != 1 || err != nil {
		t.Errorf("kept beside: %v, %v", kept, err)
	}
}

// TestDamagedWitness: of a witness's files the key and the API's authority are named when they are lost or damaged, and
// nothing is made in their place. The certificate of the datastore and its authority are requested again.
func TestDamagedWitness(t *testing.T) {
	other, err := pki.EnsureAuthority(t.TempDir(), "other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string][]byte{"missing": nil, "damaged": []byte("-----BEGIN"), "another's": other.PEM()}
	for _, name := range []string{keyFile, caFile, certFile, peerCAFile} {
		for what, content := range damages {
			if name == caFile && what == "another's" {
				continue // servers with the true authority are not trusted, which the renewal reports
			}
			f := newFirst(t)
			cfg := f.config(t, t.TempDir())
			if _, err := prepare(t, cfg); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(cfg.Dir, name)
			err := os.Remove(path)
			if content != nil {
				err = os.WriteFile(path, content, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			w, err := prepare(t, cfg)
			if name == certFile || name == peerCAFile {
				if err != nil {
					t.Errorf("%s is %s: %v", name, what, err)
				} else if err := w.checkPeer(); err != nil {
					t.Errorf("%s was %s, and after a renewal: %v", name, what, err)
				}
				continue
			}
			if err == nil || !strings.Contains(err.Error(), path) || errorkind.ExitCode(err) != errorkind.ExitConfig {
				t.Errorf("%s is %s: %v (exit code %d)", name, what, err, errorkind.ExitCode(err))
			}
			if after, _ := os.ReadFile(path); string(after) != string(content) {
				t.Errorf("%s is %s, and was changed", name, what)
			}
		}
	}
}

// TestWitnessWithoutToken: a machine that has not joined needs a server and a token.
func TestWitnessWithoutToken(t *testing.T) {
	cfg := Config{Dir: filepath.Join(t.TempDir(), "witness"), NodeName: "w"}
	if err := cfg.Validate(); err == nil || !strings.Contains(err.Error(), "--server https://HOST:6443") {
		t.Errorf("without a server: %v", err)
	}
	cfg.Server = "https://192.0.2.1:6443"
	if _, err := prepare(t, cfg); !errors.Is(err, joining.ErrNotJoined) || !strings.Contains(err.Error(), "--role witness") {
		t.Errorf("without a token: %v", err)
	}
}
