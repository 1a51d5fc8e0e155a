package join

import (
	"bufio"
	"context"
	"crypto/x509"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"testing"
	"testing/synctest"

	"kedge/internal/pki"
	"kedge/internal/test/await"
)

// noUsers is a cluster without kubeconfigs.
type noUsers struct{}

// Holder implements Users.
func (noUsers) Holder(*x509.Certificate) (string, bool) { return "", false }

// Follow implements Users.
func (noUsers) Follow(ctx context.Context, tell func(map[string]string)) error {
	tell(map[string]string{})
	<-ctx.Done()
	return nil
}

// everyone is a cluster where each certificate is that of a kubeconfig.
type everyone struct {
	mu       sync.Mutex
	valid    map[string]string
	changed  chan struct{}
	followed bool
}

// Holder implements Users.
func (*everyone) Holder(c *x509.Certificate) (string, bool) {
	f, err := pki.FingerprintOf(c)
	return f, err == nil
}

// Follow implements Users.
func (e *everyone) Follow(ctx context.Context, tell func(map[string]string)) error {
	for ctx.Err() == nil {
		e.mu.Lock()
		e.followed = true
		now, changed := maps.Clone(e.valid), e.changed
		e.mu.Unlock()
		tell(now)
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	return nil
}

func (e *everyone) set(valid ...string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.valid = map[string]string{}
	for _, f := range valid {
		e.valid[f] = f
	}
	close(e.changed)
	e.changed = make(chan struct{})
}

// TestGateOfUsers: the certificate of a kubeconfig counts until it is revoked, which ends what is under way, also a connection
// that was taken over from the HTTP server. Nothing is followed before there is a user.
func TestGateOfUsers(t *testing.T) {
	c := newCluster(t, nil)
	m := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	r := request(t, m.ClientCertFile())
	key, err := pki.FingerprintOf(r.TLS.PeerCertificates[0])
	if err != nil {
		t.Fatal(err)
	}
	users := &everyone{changed: make(chan struct{}), valid: map[string]string{key: key}}
	g := c.Gate(users, slog.New(slog.DiscardHandler))
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Run(ctx, func() {}) }()
	defer func() { stop(); <-done }()

	handler := g.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, node := Source(r.Context()); node {
			t.Error("a user counts as a node")
		}
		switch r.URL.Path {
		case "/watch":
			<-r.Context().Done()
			if context.Cause(r.Context()) != errUserRevoked {
				t.Errorf("the watch ended with %v", context.Cause(r.Context()))
			}
		case "/shell":
			conn, _, err := w.(http.Hijacker).Hijack()
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = io.Copy(io.Discard, conn) // until somebody closes it
		}
	}))
	ask := func(path string) int {
		w, q := httptest.NewRecorder(), r.Clone(t.Context())
		q.URL.Path = path
		handler.ServeHTTP(w, q)
		return w.Code
	}
	handler.ServeHTTP(httptest.NewRecorder(), request(t, "")) // nobody's
	users.mu.Lock()
	if users.followed {
		t.Error("kubeconfigs are followed before one is used")
	}
	users.mu.Unlock()
	if code := ask("/"); code != http.StatusOK {
		t.Fatalf("a valid one gets %d", code)
	}
	ours, theirs := net.Pipe()
	defer ours.Close()
	shell := make(chan struct{})
	go func() {
		defer close(shell)
		q := r.Clone(t.Context())
		q.URL.Path = "/shell"
		q.Header.Set("Upgrade", "websocket")
		handler.ServeHTTP(&takenOver{httptest.NewRecorder(), theirs}, q)
	}()
	watch := make(chan int)
	go func() { watch <- ask("/watch") }()
	await.True(t, "are both under way", func() bool {
		g.users.mu.Lock()
		defer g.users.mu.Unlock()
		return len(g.users.running) == 2
	})
	users.set()
	<-watch
	<-shell
	if code := ask("/"); code != http.StatusUnauthorized {
		t.Errorf("a revoked one gets %d", code)
	}
}

// TestConnectionOutlivesItsHandler: only a revocation closes a connection that a handler has taken over. Otherwise the last
// bytes in it would be lost.
func TestConnectionOutlivesItsHandler(t *testing.T) {
	for _, tc := range []struct {
		cause error
		open  bool
	}{{nil, true}, {errRevoked, true}, {errUserRevoked, false}} {
		synctest.Test(t, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer ours.Close()
			defer theirs.Close()
			ctx, end := context.WithCancelCause(t.Context())
			r := httptest.NewRequest(http.MethodGet, "https://server/", nil)
			r.Header.Set("Upgrade", "websocket")
			w := endsWith(ctx, errUserRevoked, &takenOver{httptest.NewRecorder(), theirs}, r)
			if _, _, err := w.(http.Hijacker).Hijack(); err != nil {
				t.Fatal(err)
			}
			end(tc.cause)
			synctest.Wait()
			go func() { _, _ = ours.Write([]byte("x")) }()
			if _, err := theirs.Read(make([]byte, 1)); (err == nil) != tc.open {
				t.Errorf("after the end with %v: %v", tc.cause, err)
			}
		})
	}
}

// takenOver is the response of an HTTP server that gives away its connection.
type takenOver struct {
	*httptest.ResponseRecorder
	conn net.Conn
}

// Hijack implements http.Hijacker.
func (o *takenOver) Hijack() (net.Conn, *bufio.ReadWriter, error) { return o.conn, nil, nil }
