package servers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"crypto/tls"

	"kedge/internal/pki"
)

// api is a server of a cluster: it tells its name, and follows no end of a watch.
type api struct {
	*httptest.Server
	name  string
	ready atomic.Bool
	mute  atomic.Bool // connections are taken and nothing is answered
}

// cluster makes servers of one authority.
type cluster struct {
	t   *testing.T
	dir string
	ca  *pki.Authority
}

func newCluster(t *testing.T) *cluster {
	t.Helper()
	dir := t.TempDir()
	ca, err := pki.EnsureAuthority(dir, "ca", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &cluster{t, dir, ca}
}

func (c *cluster) server(name string) *api {
	c.t.Helper()
	pair, err := c.ca.EnsureLeaf(c.dir, "serving", pki.Leaf{CommonName: "api", DNSNames: []string{Host}, Server: true}, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		c.t.Fatal(err)
	}
	a := &api{name: name}
	a.ready.Store(true)
	a.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if a.mute.Load() {
			<-r.Context().Done()
			return
		}
		switch r.URL.Path {
		case "/readyz":
			if !a.ready.Load() {
				http.Error(w, "not ready", http.StatusInternalServerError)
			}
		case "/watch":
			fmt.Fprint(w, a.name)
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		default:
			who := "nobody"
			if len(r.TLS.PeerCertificates) > 0 {
				who = r.TLS.PeerCertificates[0].Subject.CommonName
			}
			fmt.Fprintf(w, "%s of %s over %s", who, a.name, r.Proto)
		}
	}))
	a.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequestClientCert}
	a.EnableHTTP2 = true
	a.StartTLS()
	c.t.Cleanup(a.stop)
	return a
}

// stop ends a server as a crash does.
func (a *api) stop() {
	a.Listener.Close()
	a.CloseClientConnections()
}

// client is one of a pool that runs.
func (c *cluster) client(list *List) (*Pool, *http.Client) {
	c.t.Helper()
	quick := Times{Probe: 20 * time.Millisecond, Others: 50 * time.Millisecond, Answer: 200 * time.Millisecond, Dial: time.Second}
	p, err := New(list, c.ca.CertFile(), quick, slog.New(slog.DiscardHandler))
	if err != nil {
		c.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(c.t.Context())
	done := make(chan error, 1)
	go func() { done <- p.Run(ctx, func() {}) }()
	c.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			c.t.Error(err)
		}
	})
	transport := p.Transport(c.cert("a")).(*http.Transport)
	c.t.Cleanup(transport.CloseIdleConnections)
	return p, &http.Client{Transport: transport}
}

// cert is a client's, signed anew for a name.
func (c *cluster) cert(name string) *Certificate {
	c.t.Helper()
	pair, err := c.ca.EnsureLeaf(c.dir, "client", pki.Leaf{CommonName: name, Client: true}, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	return &Certificate{CertFile: pair.CertFile, KeyFile: pair.KeyFile}
}

func (c *cluster) list(urls []string, fallback ...string) *List {
	c.t.Helper()
	l, _, err := Load(filepath.Join(c.t.TempDir(), "servers.json"), fallback...)
	if err == nil {
		err = l.Set(urls)
	}
	if err != nil {
		c.t.Fatal(err)
	}
	return l
}

func get(t *testing.T, c *http.Client, path string) (string, error) {
	t.Helper()
	resp, err := c.Get("https://" + Host + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

// soon calls f until it returns nil.
func soon(t *testing.T, f func() error) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("still: %v", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Each way in which a server can fail moves requests and ends watches.
func TestFailover(t *testing.T) {
	for name, fail := range map[string]func(*api){
		"it is gone":        (*api).stop,
		"it is not ready":   func(a *api) { a.ready.Store(false) },
		"it answers nobody": func(a *api) { a.mute.Store(true) },
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			servers := map[string]*api{}
			for _, name := range []string{"one", "two", "three"} {
				a := c.server(name)
				servers[a.URL] = a
			}
			var urls []string
			for url := range servers {
				urls = append(urls, url)
			}
			p, client := c.client(c.list(urls))
			soon(t, func() error { return p.Check(t.Context()) })
			before := servers[p.Current()]
			if got, err := get(t, client, "/"); err != nil || got != "a of "+before.name+" over HTTP/2.0" {
				t.Fatalf("got %q, %v; in use is %s", got, err, before.name)
			}
			watch, err := client.Get("https://" + Host + "/watch")
			if err != nil {
				t.Fatal(err)
			}
			defer watch.Body.Close()
			// What a server has sent may be lost with the connection.
			first := make([]byte, len(before.name))
			if _, err := io.ReadFull(watch.Body, first); err != nil || string(first) != before.name {
				t.Fatalf("the watch began with %q, %v", first, err)
			}
			fail(before)
			// Does not come back before the connection is closed.
			if seen, err := io.ReadAll(watch.Body); err == nil || len(seen) > 0 {
				t.Errorf("the watch ended with %q, %v", seen, err)
			}
			soon(t, func() error {
				got, err := get(t, client, "/")
				if err == nil && got != "a of "+servers[p.Current()].name+" over HTTP/2.0" {
					err = fmt.Errorf("got %q", got)
				}
				return err
			})
			if p.Current() == before.URL {
				t.Error("the server that has failed is in use still")
			}
		})
	}
}

// With nowhere else to go, nothing is cut: the server may come back.
func TestTheOnlyServerIsKept(t *testing.T) {
	c := newCluster(t)
	a := c.server("one")
	p, client := c.client(c.list(nil, a.URL))
	soon(t, func() error { return p.Check(t.Context()) })
	watch, err := client.Get("https://" + Host + "/watch")
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Body.Close()
	a.ready.Store(false)
	soon(t, func() error {
		if err := p.Check(t.Context()); !errors.Is(err, ErrNoServer) {
			return fmt.Errorf("the pool says %v", err)
		}
		return nil
	})
	if got, err := get(t, client, "/"); err != nil || got != "a of one over HTTP/2.0" {
		t.Errorf("got %q, %v", got, err)
	}
	if _, err := io.ReadFull(watch.Body, make([]byte, 3)); err != nil {
		t.Errorf("the watch: %v", err)
	}
	a.ready.Store(true)
	soon(t, func() error { return p.Check(t.Context()) })
}

// Servers that are named are used, those that are named no more are left, and the
// administrator's are the last resort.
func TestServersComeAndGo(t *testing.T) {
	c := newCluster(t)
	first, second := c.server("first"), c.server("second")
	list := c.list(nil, first.URL)
	p, client := c.client(list)
	uses := func(want *api) {
		t.Helper()
		soon(t, func() error {
			got, err := get(t, client, "/")
			if err == nil && got != "a of "+want.name+" over HTTP/2.0" {
				err = fmt.Errorf("got %q, want %s", got, want.name)
			}
			return err
		})
	}
	uses(first)
	if err := list.Set([]string{second.URL}); err != nil {
		t.Fatal(err)
	}
	first.stop()
	uses(second)
	third := c.server("third")
	if err := list.Set([]string{third.URL}); err != nil {
		t.Fatal(err)
	}
	uses(third)
	if got := p.Current(); got != third.URL {
		t.Errorf("in use is %s, want %s", got, third.URL)
	}
}

// A renewed certificate is used by new connections, and there are no others.
func TestCertificateIsRenewed(t *testing.T) {
	c := newCluster(t)
	a := c.server("one")
	_, client := c.client(c.list([]string{a.URL}))
	if got, err := get(t, client, "/"); err != nil || got != "a of one over HTTP/2.0" {
		t.Fatalf("got %q, %v", got, err)
	}
	c.cert("b")
	soon(t, func() error {
		got, err := get(t, client, "/")
		if err == nil && got != "b of one over HTTP/2.0" {
			err = fmt.Errorf("got %q", got)
		}
		return err
	})
}

// A server of another authority gets nothing, whatever address it has.
func TestStrangersAreRefused(t *testing.T) {
	stranger := newCluster(t).server("stranger")
	c := newCluster(t)
	p, client := c.client(c.list([]string{stranger.URL}))
	if got, err := get(t, client, "/"); err == nil {
		t.Errorf("a stranger answers %q", got)
	}
	if conn, err := p.DialTLS(t.Context(), stranger.URL, c.cert("a")); err == nil {
		conn.Close()
		t.Error("a connection to a stranger")
	}
	if err := p.Check(t.Context()); err == nil {
		t.Error("the pool is content with a stranger")
	}
}

func TestList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "servers.json")
	l, _, err := Load(path, "https://b:6443", "https://named")
	if err != nil {
		t.Fatal(err)
	}
	_, changed := l.Known()
	for _, urls := range [][]string{{"https://b:6443", "https://a:6443", "https://a:6443"}, nil} { // none are no news
		if err := l.Set(urls); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-changed:
	default:
		t.Error("nobody was told")
	}
	if l, _, err = Load(path, "https://b:6443", "https://named"); err != nil {
		t.Fatal(err)
	}
	if got, want := l.All(), []string{"https://a:6443", "https://b:6443", "https://named"}; !slices.Equal(got, want) {
		t.Errorf("after a restart the servers are %v, want %v", got, want)
	}
	if err := l.Set([]string{"http://a"}); err == nil {
		t.Error("a URL without TLS is taken")
	}
	for _, damage := range []string{"", "[", `["ftp://x"]`} {
		if err := os.WriteFile(path, []byte(damage), 0o600); err != nil {
			t.Fatal(err)
		}
		l, damaged, err := Load(path, "https://named")
		if err != nil || damaged == nil || !strings.Contains(damaged.Error(), path) {
			t.Fatalf("%q is read as a list: %v, %v", damage, damaged, err)
		}
		if got := l.All(); !slices.Equal(got, []string{"https://named"}) {
			t.Errorf("%q: %v", damage, got)
		}
	}
	for url, want := range map[string]string{"https://a": "a:443", "https://[2001:db8::1]:6443": "[2001:db8::1]:6443"} {
		if got, err := hostPort(url); err != nil || got != want {
			t.Errorf("%s leads to %s, %v", url, got, err)
		}
	}
}

var _ net.Conn = (*conn)(nil)
