package join

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"
	k8stesting "k8s.io/client-go/testing"

	"kedge/internal/joining"
	"kedge/internal/pki"
	"kedge/internal/test/await"
)

var quiet = slog.New(slog.DiscardHandler)

// cluster is a service behind a real listener with TLS, as the API server's.
type cluster struct {
	*Service
	api  *fake.Clientset
	url  string
	asks atomic.Int32 // requests to PathJoin that arrived
	dir  string

	external bool          // the servers that ask have an external datastore
	admitted []string      // names of servers
	full     error         // why the store takes no other
	busy     chan struct{} // a value for each server that a full store has not admitted; may be nil
}

// URLs implements Servers.
func (c *cluster) URLs() []string { return []string{c.url} }

// Credentials implements Servers.
func (c *cluster) Credentials() (joining.Credentials, error) {
	return joining.Credentials{"tls/server-ca.key": []byte("a private key")}, nil
}

// AdmitWitness implements Servers.
func (c *cluster) AdmitWitness(ctx context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error) {
	return c.Admit(ctx, name, peers)
}

// Admit implements Servers.
func (c *cluster) Admit(_ context.Context, name string, peers []netip.AddrPort) (json.RawMessage, error) {
	if c.full != nil {
		select {
		case c.busy <- struct{}{}:
		default:
		}
		return nil, c.full
	}
	c.admitted = append(c.admitted, name)
	return json.Marshal(map[string]any{"name": name, "peers": peers})
}

// server lets a machine ask to be a server.
func (c *cluster) server(t *testing.T, dir, name, tok string) (joining.ServerAnswer, joining.Credentials, error) {
	t.Helper()
	key, err := pki.EnsureKey(filepath.Join(dir, "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	csr, err := pki.Request(key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := joining.ParseToken(tok)
	if err != nil {
		t.Fatal(err)
	}
	return joining.JoinServer(context.Background(), c.url, c.cfg.ServerCA.Cert, key, joining.ServerRequest{
		Request: joining.Request{TokenID: parsed.ID, Secret: string(parsed.Secret), NodeName: name, CSR: string(csr)},
		Peers:   []netip.AddrPort{netip.MustParseAddrPort("192.0.2.7:2380")}, External: c.external,
	})
}

// newCluster makes one; change may change its configuration.
func newCluster(t *testing.T, change func(*Config)) *cluster {
	t.Helper()
	dir := t.TempDir()
	cfg := Config{NetworkGroup: "net", PeerName: "peer.test", Life: Life, Cluster: joining.Cluster{
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}, ServiceCIDRs: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16")},
		ClusterDomain: "cluster.local",
	}}
	for name, into := range map[string]**pki.Authority{"server": &cfg.ServerCA, "client": &cfg.ClientCA, "kubelet": &cfg.KubeletCA, "peer": &cfg.PeerCA} {
		ca, err := pki.EnsureAuthority(dir, name, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		*into = ca
	}
	if change != nil {
		change(&cfg)
	}
	c := &cluster{dir: dir, api: fake.NewClientset()}
	cfg.Servers = c
	c.Service = New(cfg, c.api, quiet)
	pair, err := cfg.ServerCA.EnsureLeaf(dir, "api", pki.Leaf{CommonName: "api", IPs: []net.IP{net.IPv4(127, 0, 0, 1)}, Server: true}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(cfg.ClientCA.Cert)
	handler := c.Handler(http.NotFoundHandler())
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == joining.PathJoin {
			c.asks.Add(1)
		}
		handler.ServeHTTP(w, r)
	}))
	srv.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	// As the API server: it asks for certificates and lets anybody shake hands.
	srv.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert, ClientCAs: roots}
	srv.EnableHTTP2 = true
	srv.StartTLS()
	t.Cleanup(srv.Close)
	c.url = srv.URL
	return c
}

// token makes a token and returns its text.
func (c *cluster) token(t *testing.T, s Spec) string {
	t.Helper()
	if s.Role == "" {
		s.Role = joining.Agent
	}
	if s.TTL == 0 {
		s.TTL = time.Hour
	}
	if s.Uses == 0 {
		s.Uses = 1
	}
	made, err := c.Tokens().Create(context.Background(), c.CAHash(), s)
	if err != nil {
		t.Fatal(err)
	}
	return made.Reveal()
}

// machine is a directory that joins.
func (c *cluster) machine(dir, name, tok string) (*joining.Member, error) {
	return joining.Prepare(context.Background(), joining.Config{Dir: dir, Server: c.url, Token: tok, NodeName: name}, quiet)
}

func (c *cluster) mustJoin(t *testing.T, dir, name, tok string) *joining.Member {
	t.Helper()
	m, err := c.machine(dir, name, tok)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func wantRefusal(t *testing.T, what string, err, want error) {
	t.Helper()
	var refused *joining.Refused
	if !errors.As(err, &refused) || !strings.Contains(err.Error(), want.Error()) {
		t.Errorf("%s: got %v, want a refusal with %q", what, err, want)
	}
}

// verify checks a certificate on disk against its authority and returns it.
func verify(t *testing.T, ca *pki.Authority, certFile, keyFile string, usage x509.ExtKeyUsage) *x509.Certificate {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	if _, err := pair.Leaf.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}}); err != nil {
		t.Errorf("%s: %v", certFile, err)
	}
	return pair.Leaf
}

func TestServerDecidesWhatCertificatesSay(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "edge-1", c.token(t, Spec{}))
	for _, w := range []struct {
		ca         *pki.Authority
		file       string
		usage      x509.ExtKeyUsage
		name, org  string
		names, ips int
	}{
		{c.cfg.ClientCA, m.ClientCertFile(), x509.ExtKeyUsageClientAuth, "system:node:edge-1", "system:nodes", 0, 0},
		{c.cfg.ClientCA, m.NetworkCertFile(), x509.ExtKeyUsageClientAuth, "net:edge-1", "net", 0, 0},
		{c.cfg.KubeletCA, m.ServingCertFile(), x509.ExtKeyUsageServerAuth, "system:node:edge-1", "system:nodes", 1, 2},
	} {
		got := verify(t, w.ca, w.file, m.KeyFile(), w.usage)
		if got.Subject.CommonName != w.name || len(got.Subject.Organization) != 1 || got.Subject.Organization[0] != w.org || len(got.DNSNames) != w.names || len(got.IPAddresses) != w.ips {
			t.Errorf("%s says %s, names %v, addresses %v", filepath.Base(w.file), got.Subject, got.DNSNames, got.IPAddresses)
		}
		if left := time.Until(got.NotAfter); left > Life || left < Life-time.Hour {
			t.Errorf("%s lives for %s, want %s", filepath.Base(w.file), left, Life)
		}
	}
	if st, err := os.Stat(m.KeyFile()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key: %v, %v", st.Mode(), err)
	}
	if m.Cluster().ClusterDomain != "cluster.local" || m.Address() != netip.MustParseAddr("127.0.0.1") {
		t.Errorf("settings %+v, address %s", m.Cluster(), m.Address())
	}
}

func TestOwnAddressesAreInNobodysCertificate(t *testing.T) {
	c := newCluster(t, func(c *Config) {
		c.OwnAddresses = func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("127.0.0.1")} }
	})
	m := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	if got := verify(t, c.cfg.KubeletCA, m.ServingCertFile(), m.KeyFile(), x509.ExtKeyUsageServerAuth); len(got.IPAddresses) != 1 || !got.IPAddresses[0].Equal(joining.NodeAddress("a").AsSlice()) {
		t.Errorf("the certificate names %v, want the one that stands for the name and not the server's", got.IPAddresses)
	}
}

func TestTokensAreRefused(t *testing.T) {
	c, other := newCluster(t, nil), newCluster(t, nil)
	soon := c.token(t, Spec{TTL: time.Minute})
	once := c.token(t, Spec{})
	c.mustJoin(t, t.TempDir(), "first", once)
	named := c.token(t, Spec{NodeName: "chosen"})
	guess := joining.NewToken(c.CAHash())
	removed := c.token(t, Spec{})
	parsed, err := joining.ParseToken(removed)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Tokens().Remove(context.Background(), parsed.ID); err != nil {
		t.Fatal(err)
	}
	half, err := joining.ParseToken(once)
	if err != nil {
		t.Fatal(err)
	}
	half.Secret = guess.Secret

	for name, tc := range map[string]struct {
		token string
		want  error
	}{
		"used up": {once, ErrUsedUp}, "another name": {named, ErrName}, "guessed": {guess.Reveal(), ErrUnknownToken},
		"removed": {removed, ErrUnknownToken}, "known id, guessed secret": {half.Reveal(), ErrUnknownToken},
		"for servers": {c.token(t, Spec{Role: joining.Server}), ErrRole}, "no secret was fixed": {"K1" + c.CAHash() + "::preshared.0123456789abcdef", ErrUnknownToken},
	} {
		_, err := c.machine(t.TempDir(), "second", tc.token)
		wantRefusal(t, name, err, tc.want)
	}
	c.tokens.now = func() time.Time { return time.Now().Add(2 * time.Minute) }
	_, err = c.machine(t.TempDir(), "second", soon)
	wantRefusal(t, "expired", err, ErrExpired)

	// Nothing may be sent to a server that has another authority.
	before := c.asks.Load()
	if _, err := c.machine(t.TempDir(), "second", other.token(t, Spec{})); !errors.Is(err, joining.ErrWrongCA) {
		t.Errorf("token of another cluster: got %v", err)
	}
	if c.asks.Load() != before {
		t.Error("the token of another cluster was sent")
	}
}

func TestOneUseIsForOneMachine(t *testing.T) {
	c := newCluster(t, nil)
	// The fake API does not compare versions, as the real one does on an update.
	var mu sync.Mutex
	version := 0
	client := fake.NewClientset()
	client.PrependReactor("update", "secrets", func(a k8stesting.Action) (bool, runtime.Object, error) {
		s := a.(k8stesting.UpdateAction).GetObject().(*corev1.Secret)
		mu.Lock()
		defer mu.Unlock()
		if s.Type != tokenType {
			return false, nil, nil
		}
		if s.ResourceVersion != "" && s.ResourceVersion != fmt.Sprint(version) {
			return true, nil, apierrors.NewConflict(corev1.Resource("secrets"), s.Name, errors.New("changed"))
		}
		version++
		s.ResourceVersion = fmt.Sprint(version)
		return true, s, client.Tracker().Update(corev1.SchemeGroupVersion.WithResource("secrets"), s, s.Namespace)
	})
	c.tokens.secrets = client.CoreV1().Secrets("kube-system")
	tok := c.token(t, Spec{Uses: 2})
	var joined atomic.Int32
	var wg sync.WaitGroup
	for i := range 8 {
		dir := t.TempDir()
		wg.Go(func() {
			if _, err := c.machine(dir, fmt.Sprint("m", i), tok); err == nil {
				joined.Add(1)
			} else if !strings.Contains(err.Error(), ErrUsedUp.Error()) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if joined.Load() != 2 {
		t.Errorf("%d machines joined with a token for two", joined.Load())
	}
}

func TestNameBelongsToItsKey(t *testing.T) {
	c := newCluster(t, nil)
	dir := t.TempDir()
	c.mustJoin(t, dir, "edge", c.token(t, Spec{}))

	_, err := c.machine(t.TempDir(), "edge", c.token(t, Spec{}))
	wantRefusal(t, "another key", err, ErrNameTaken)

	// The old key proves itself at each start and needs no token.
	again := c.mustJoin(t, dir, "edge", "")

	// Also when its certificates are lost.
	if err := os.Remove(again.ClientCertFile()); err != nil {
		t.Fatal(err)
	}
	verify(t, c.cfg.ClientCA, c.mustJoin(t, dir, "edge", "").ClientCertFile(), again.KeyFile(), x509.ExtKeyUsageClientAuth)

	// After an operator has said so, the name goes to the next key, and to one only.
	if err := c.Nodes().Allow(context.Background(), "edge"); err != nil {
		t.Fatal(err)
	}
	c.mustJoin(t, t.TempDir(), "edge", c.token(t, Spec{}))
	_, err = c.machine(dir, "edge", "")
	wantRefusal(t, "the key that was replaced", err, ErrNameTaken)
	_, err = c.machine(t.TempDir(), "edge", c.token(t, Spec{}))
	wantRefusal(t, "a third key", err, ErrNameTaken)

	if err := c.Nodes().Allow(context.Background(), "nobody"); !errors.Is(err, ErrUnknownNode) {
		t.Errorf("allow a node that there is not: %v", err)
	}
}

func TestSameKeyNeedsNoSecondUse(t *testing.T) {
	c := newCluster(t, nil)
	dir, tok := t.TempDir(), c.token(t, Spec{})
	m := c.mustJoin(t, dir, "edge", tok)
	// As if the answer to the first request had been lost.
	if err := os.Remove(filepath.Join(dir, "cluster.json")); err != nil {
		t.Fatal(err)
	}
	c.mustJoin(t, dir, "edge", tok)
	// Another name is another machine.
	other := t.TempDir()
	key, err := os.ReadFile(m.KeyFile())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "node.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = c.machine(other, "edge-2", tok)
	wantRefusal(t, "the same key under another name", err, ErrUsedUp)
}

func TestSecretFixedInAdvance(t *testing.T) {
	const secret = "a secret of our own, long enough"
	fixed := joining.Secret(strings.ReplaceAll(secret, " ", "-"))
	c := newCluster(t, func(c *Config) { c.Preshared = map[joining.Role]joining.Secret{joining.Agent: fixed} })
	c.mustJoin(t, t.TempDir(), "bare", string(fixed))
	c.mustJoin(t, t.TempDir(), "full", joining.Token{CAHash: c.CAHash(), ID: joining.PresharedID, Secret: fixed}.Reveal())

	before := c.asks.Load()
	for name, tok := range map[string]string{"wrong": string(fixed) + "x"} {
		if _, err := c.machine(t.TempDir(), "x", tok); !errors.Is(err, joining.ErrWrongCA) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	// A server that does not know the secret cannot make one for its own authority.
	if _, err := newCluster(t, nil).machine(t.TempDir(), "x", string(fixed)); !errors.Is(err, joining.ErrWrongCA) {
		t.Errorf("a server without the secret: got %v", err)
	}
	if c.asks.Load() != before {
		t.Error("a secret was sent to a server that had not proved itself")
	}
}

func TestServersGetTheKeysOnlyOnTheirToken(t *testing.T) {
	fixed, forServers := joining.Secret("a-secret-of-our-own-long-enough"), joining.Secret("another-secret-of-our-own")
	c := newCluster(t, func(c *Config) {
		c.Preshared = map[joining.Role]joining.Secret{joining.Agent: fixed, joining.Server: forServers}
	})
	answer, credentials, err := c.server(t, t.TempDir(), "s2", c.token(t, Spec{Role: joining.Server}))
	if err != nil || string(credentials["tls/server-ca.key"]) != "a private key" || len(answer.Admission) == 0 || answer.Cluster.ClusterDomain != "cluster.local" {
		t.Errorf("got %+v, %d credentials, %v", answer.Cluster, len(credentials), err)
	}
	if bytes.Contains(answer.Sealed, []byte("private key")) {
		t.Error("the credentials are not sealed")
	}
	if len(c.admitted) != 1 || c.admitted[0] != "s2" {
		t.Errorf("admitted %v", c.admitted)
	}

	_, _, err = c.server(t, t.TempDir(), "s3", c.token(t, Spec{}))
	wantRefusal(t, "a token for agents", err, ErrRole)
	_, _, err = c.server(t, t.TempDir(), "s3", joining.Token{CAHash: c.CAHash(), ID: joining.PresharedID, Secret: fixed}.Reveal())
	wantRefusal(t, "the secret that is fixed for agents", err, ErrRole)
	_, err = c.machine(t.TempDir(), "s3", string(forServers))
	wantRefusal(t, "an agent with the secret that is fixed for servers", err, ErrRole)
	if _, _, err := c.server(t, t.TempDir(), "fixed", string(forServers)); err != nil {
		t.Errorf("a server with the secret that is fixed for servers: %v", err)
	}
	c.admitted = c.admitted[:1]

	// Whoever is known as an agent is not known as a server.
	dir, used := t.TempDir(), c.token(t, Spec{Role: joining.Server})
	c.mustJoin(t, dir, "edge", c.token(t, Spec{}))
	if _, _, err := c.server(t, t.TempDir(), "s3", used); err != nil {
		t.Fatal(err)
	}
	_, _, err = c.server(t, dir, "edge", used)
	wantRefusal(t, "an agent with a token that is used up", err, ErrUsedUp)
	if len(c.admitted) != 2 {
		t.Errorf("admitted %v", c.admitted)
	}

	// The same key may ask again when the answer was lost, and the store may be busy.
	again, tok := t.TempDir(), c.token(t, Spec{Role: joining.Server})
	c.full = errors.New("another server is on its way")
	_, _, err = c.server(t, again, "s4", tok)
	var refused *joining.Refused
	if err == nil || errors.As(err, &refused) || !strings.Contains(err.Error(), "on its way") {
		t.Errorf("a busy store: got %v, want an error that is worth a second try", err)
	}
	c.full = nil
	if _, _, err = c.server(t, again, "s4", tok); err != nil {
		t.Errorf("the second try: %v", err)
	}
}

// TestServersHaveOneDatastore: a machine with another datastore is refused before its token is used.
func TestServersHaveOneDatastore(t *testing.T) {
	for _, external := range []bool{false, true} {
		c := newCluster(t, func(cfg *Config) { cfg.External = external })
		made, err := c.Tokens().Create(t.Context(), c.CAHash(), Spec{Role: joining.Server, TTL: time.Hour, Uses: 1})
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		c.external = !external
		_, _, err = c.server(t, dir, "s2", made.Reveal())
		var refused *joining.Refused
		if !errors.As(err, &refused) || !strings.Contains(err.Error(), "same datastore") || strings.Contains(err.Error(), "kedge's own") == external || len(c.admitted) > 0 {
			t.Errorf("external %v: %v, admitted %v", external, err, c.admitted)
		}
		c.external = external
		if _, _, err := c.server(t, dir, "s2", made.Reveal()); err != nil {
			t.Errorf("external %v, with the same: %v", external, err)
		}
	}
}

func TestMemberOfAnotherCluster(t *testing.T) {
	a, b := newCluster(t, nil), newCluster(t, nil)
	dir := t.TempDir()
	a.mustJoin(t, dir, "edge", a.token(t, Spec{}))
	if _, err := b.machine(dir, "edge", b.token(t, Spec{})); !errors.Is(err, joining.ErrOtherCluster) {
		t.Errorf("got %v, want ErrOtherCluster", err)
	}
	// Without a token it is not taken for a member of the other one either: it goes
	// on with what it knows.
	if m, err := b.machine(dir, "edge", ""); err != nil || m.Server() != a.url {
		t.Errorf("got server %v, %v", m, err)
	}
}

func TestNodesAreRefused(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "edge", c.token(t, Spec{}))
	stolen, err := tls.LoadX509KeyPair(m.NetworkCertFile(), m.KeyFile())
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = joining.Renew(context.Background(), c.url, c.cfg.ServerCA.Cert, stolen)
	wantRefusal(t, "the certificate of another user", err, errRequest)

	// A key that nobody knows, and a name whose key is another.
	for name, want := range map[string]error{"edge": ErrNameTaken, "ghost": ErrUnknownNode, "../x": ErrBadName} {
		p, err := c.cfg.ClientCA.EnsureLeaf(t.TempDir(), "x", pki.Leaf{CommonName: "system:node:" + name, Client: true}, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		pair, err := tls.LoadX509KeyPair(p.CertFile, p.KeyFile)
		if err != nil {
			t.Fatal(err)
		}
		_, _, err = joining.Renew(context.Background(), c.url, c.cfg.ServerCA.Cert, pair)
		wantRefusal(t, name, err, want)
	}
	_, err = c.machine(t.TempDir(), "Not_A_Name", c.token(t, Spec{}))
	wantRefusal(t, "a bad name", err, ErrBadName)
}

func TestRequestsAreBounded(t *testing.T) {
	c := newCluster(t, nil)
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
	defer client.CloseIdleConnections()
	post := func(path string, body io.Reader) int {
		resp, err := client.Post(c.url+path, "application/json", body)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		io.Copy(io.Discard, resp.Body)
		return resp.StatusCode
	}
	if got := post(joining.PathJoin, bytes.NewReader(bytes.Repeat([]byte(" "), 2*joining.MaxBody))); got != http.StatusBadRequest {
		t.Errorf("a huge request: %d", got)
	}
	if got := post(joining.PathRenew, strings.NewReader("{}")); got != http.StatusBadRequest {
		t.Errorf("renewal without a certificate: %d", got)
	}
	if got := post(joining.Prefix+"other", strings.NewReader("{}")); got != http.StatusNotFound {
		t.Errorf("a path that there is not: %d", got)
	}
	refused := 0
	for range 3 * burst {
		if post(joining.PathJoin, strings.NewReader("{}")) == http.StatusTooManyRequests {
			refused++
		}
	}
	if refused == 0 {
		t.Error("one address may guess without end")
	}
}

func TestDawdlersTakeNoSlots(t *testing.T) {
	c := newCluster(t, nil)
	for range maxAtOnce + 2 {
		conn, err := tls.Dial("tcp", strings.TrimPrefix(c.url, "https://"), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{", joining.PathJoin)
	}
	await.True(t, "all requests have begun", func() bool { return c.asks.Load() >= maxAtOnce+2 })
	begin := time.Now()
	c.mustJoin(t, t.TempDir(), "edge", c.token(t, Spec{}))
	if took := time.Since(begin); took >= bodyWithin {
		t.Errorf("joining took %s", took)
	}
}

func TestLimiterForgetsAndIsBounded(t *testing.T) {
	now := time.Now()
	l := &limiter{now: func() time.Time { return now }, sources: map[netip.Prefix]allowance{}}
	a := netip.MustParseAddr("10.0.0.1")
	for range burst {
		if !l.allow(a) {
			t.Fatal("refused within the allowance")
		}
	}
	if l.allow(a) || !l.allow(a.Next()) {
		t.Error("the allowance is not that of one source")
	}
	v6 := netip.MustParseAddr("2001:db8::1")
	for range burst {
		l.allow(v6)
	}
	if l.allow(v6.Next()) {
		t.Error("another address of the same network has an allowance of its own")
	}
	// A site has 65,536 networks.
	allowed := 0
	for i := range 3 * siteFactor * burst {
		if l.allow(netip.MustParseAddr(fmt.Sprintf("2001:db8:1:%x::1", i))) {
			allowed++
		}
	}
	if allowed != siteFactor*burst {
		t.Errorf("a site may ask %d times at once, want %d", allowed, siteFactor*burst)
	}
	for i, b := 0, netip.MustParseAddr("11.0.0.1"); i < 2*maxSources; i, b = i+1, b.Next() {
		l.allow(b)
	}
	if len(l.sources) > maxSources {
		t.Errorf("%d sources are remembered", len(l.sources))
	}
	if !l.allow(netip.MustParseAddr("12.0.0.9")) {
		t.Error("a new source is refused because others flood")
	}
	now = now.Add(time.Minute)
	if !l.allow(netip.MustParseAddr("12.0.0.1")) || len(l.sources) > 10 {
		t.Errorf("after a minute %d sources are remembered", len(l.sources))
	}
	if l.allow(netip.Addr{}) {
		t.Error("a request of nobody is allowed")
	}
}

func TestTokensAreStoredHashedAndForgotten(t *testing.T) {
	c := newCluster(t, nil)
	ctx := context.Background()
	text := c.token(t, Spec{TTL: time.Minute})
	made, err := joining.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}
	s, err := c.tokens.secrets.Get(ctx, tokenPrefix+made.ID, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range s.Data {
		data = append(data, v...)
	}
	if bytes.Contains(data, []byte(made.Secret)) {
		t.Error("the secret is stored")
	}
	c.tokens.now = func() time.Time { return time.Now().Add(2 * keepExpired) }
	c.token(t, Spec{})
	all, err := c.Tokens().List(ctx)
	if err != nil || len(all) != 1 || all[0].ID == made.ID {
		t.Errorf("listed %+v, %v; want the new one only", all, err)
	}
	if err := (Spec{Role: "boss", TTL: -1, Uses: 0, NodeName: "A"}).Validate(); err == nil || strings.Count(err.Error(), "\n") != 3 {
		t.Errorf("four mistakes: %v", err)
	}
}

func TestRenewalWhileRunning(t *testing.T) {
	c := newCluster(t, func(c *Config) { c.Life = 2 * time.Second })
	m := c.mustJoin(t, t.TempDir(), "edge", c.token(t, Spec{}))
	first, err := os.ReadFile(m.ClientCertFile())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- m.Run(ctx, func() {}) }()
	for {
		now, err := os.ReadFile(m.ClientCertFile())
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(now, first) {
			break
		}
		if err := m.Check(ctx); err != nil || ctx.Err() != nil {
			t.Fatalf("not renewed before the end: %v, %v", err, ctx.Err())
		}
		time.Sleep(20 * time.Millisecond)
	}
	verify(t, c.cfg.ClientCA, m.ClientCertFile(), m.KeyFile(), x509.ExtKeyUsageClientAuth)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func FuzzJoinRequest(f *testing.F) {
	dir := f.TempDir()
	cfg := Config{NetworkGroup: "net", Life: Life}
	for name, into := range map[string]**pki.Authority{"server": &cfg.ServerCA, "client": &cfg.ClientCA, "kubelet": &cfg.KubeletCA} {
		ca, err := pki.EnsureAuthority(dir, name, time.Now())
		if err != nil {
			f.Fatal(err)
		}
		*into = ca
	}
	s := New(cfg, fake.NewClientset(), quiet)
	key, err := pki.EnsureKey(filepath.Join(dir, "k"))
	if err != nil {
		f.Fatal(err)
	}
	csr, err := pki.Request(key)
	if err != nil {
		f.Fatal(err)
	}
	seed, err := json.Marshal(joining.Request{TokenID: "0123456789", Secret: "x", NodeName: "n", CSR: string(csr)})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(seed)
	f.Add([]byte("{}"))
	f.Fuzz(func(t *testing.T, body []byte) {
		r := httptest.NewRequest(http.MethodPost, joining.PathJoin, bytes.NewReader(body))
		w := httptest.NewRecorder()
		answering(s, s.admitAgent)(w, r)
		if w.Code == http.StatusOK || w.Code == http.StatusInternalServerError {
			t.Errorf("%q is answered %d %s", body, w.Code, w.Body)
		}
	})
}
