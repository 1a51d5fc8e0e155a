package loopback

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

func loopbackClient(t *testing.T, h http.HandlerFunc) *http.Client {
	t.Helper()
	l := New()
	l.Serve(h)
	c, err := rest.HTTPClientFor(l.Config("alice", "friends"))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLoopbackCarriesIdentityHeaderAndBody(t *testing.T) {
	c := loopbackClient(t, func(w http.ResponseWriter, r *http.Request) {
		resp, ok, err := Authenticator().AuthenticateRequest(r)
		if err != nil || !ok {
			t.Errorf("not authenticated: %v", err)
			return
		}
		body, _ := io.ReadAll(r.Body)
		w.Header().Set("X-Test", "1")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprintf(w, "%s %v %s %s %s", resp.User.GetName(), resp.User.GetGroups(), r.Method, r.RequestURI, body)
	})
	resp, err := c.Post("http://x/a/b?c=d", "text/plain", strings.NewReader("hello"))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	want := "alice [system:authenticated friends] POST /a/b?c=d hello"
	if err != nil || string(got) != want || resp.StatusCode != http.StatusTeapot || resp.Header.Get("X-Test") != "1" {
		t.Errorf("got %d %q, %v; want %q", resp.StatusCode, got, err, want)
	}
}

// A request from the network must not be taken for one of our own, whatever its
// headers say.
func TestLoopbackIdentityCannotBeForged(t *testing.T) {
	r, _ := http.NewRequest("GET", "https://x/", nil)
	r.Header.Set("Identitykey", "system:kedge")
	if _, ok, _ := Authenticator().AuthenticateRequest(r); ok {
		t.Error("a plain request was authenticated")
	}
}

func TestLoopbackStreamsAndCloseEndsTheHandler(t *testing.T) {
	ended := make(chan struct{})
	c := loopbackClient(t, func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "one\n")
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(ended)
	})
	resp, err := c.Get("http://x/watch")
	if err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 10)
	if n, err := resp.Body.Read(buf); err != nil || string(buf[:n]) != "one\n" {
		t.Errorf("read %q, %v", buf[:n], err)
	}
	resp.Body.Close()
	select {
	case <-ended:
	case <-time.After(5 * time.Second):
		t.Error("the handler goes on after the body was closed")
	}
}

// A response without a body may be over before the client has looked for its header.
func TestHeaderOfWhatIsOver(t *testing.T) {
	for range 100 { // by chance one would do
		w := newMemoryWriter(context.WithCancel(t.Context()))
		w.finish(io.EOF)
		if err := w.awaitHeader(); err != nil {
			t.Fatal(err)
		}
	}
}

// The same through the client: many at once, so that some are late.
func TestLoopbackEmptyResponses(t *testing.T) {
	c := loopbackClient(t, func(http.ResponseWriter, *http.Request) {})
	var clients sync.WaitGroup
	for range 16 {
		clients.Go(func() {
			for range 500 {
				resp, err := c.Get("http://x/")
				if err != nil {
					t.Error(err)
					return
				}
				if body, err := io.ReadAll(resp.Body); resp.StatusCode != http.StatusOK || len(body) > 0 || err != nil {
					t.Errorf("status %d, body %q, %v", resp.StatusCode, body, err)
					return
				}
			}
		})
	}
	clients.Wait()
}

func TestLoopbackRequestContextEndsBothSides(t *testing.T) {
	ended := make(chan struct{})
	c := loopbackClient(t, func(w http.ResponseWriter, r *http.Request) {
		w.(http.Flusher).Flush()
		<-r.Context().Done()
		close(ended)
	})
	ctx, cancel := context.WithCancel(t.Context())
	req, _ := http.NewRequestWithContext(ctx, "GET", "http://x/watch", nil)
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	cancel()
	if _, err := io.ReadAll(resp.Body); !errors.Is(err, context.Canceled) {
		t.Errorf("read error %v, want canceled", err)
	}
	<-ended
}

func TestLoopbackSlowReaderHoldsTheWriterBack(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 3*maxBuffered)
	done := make(chan struct{})
	c := loopbackClient(t, func(w http.ResponseWriter, _ *http.Request) {
		for range 4 {
			w.Write(big)
		}
		close(done)
	})
	resp, err := c.Get("http://x/")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	select {
	case <-done:
		t.Error("the handler wrote everything although nobody read")
	case <-time.After(50 * time.Millisecond):
	}
	got, err := io.ReadAll(resp.Body)
	if err != nil || len(got) != 4*len(big) {
		t.Errorf("read %d bytes, %v", len(got), err)
	}
}

func TestLoopbackPanicAndNotServing(t *testing.T) {
	c := loopbackClient(t, func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	if _, err := c.Get("http://x/"); err == nil {
		t.Error("a panic before the header gave no error")
	}
	c = loopbackClient(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(200)
		panic(http.ErrAbortHandler)
	})
	resp, err := c.Get("http://x/")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(resp.Body); err == nil {
		t.Error("a panic after the header gave no read error")
	}
	idle, err := rest.HTTPClientFor(New().Admin())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := idle.Get("http://x/"); !errors.Is(err, ErrAPINotServing) {
		t.Errorf("got %v, want ErrAPINotServing", err)
	}
}

// term is a condition for tests.
type term struct {
	mu      sync.Mutex
	holds   bool
	changed chan struct{}
}

func (c *term) Holds() (bool, <-chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.holds, c.changed
}

func (c *term) set(holds bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.holds = holds
	close(c.changed)
	c.changed = make(chan struct{})
}

// TestWritesOfATermThatHasEnded: a part that has not stopped yet when another server leads cannot write any more, also
// not what is on its way.
func TestWritesOfATermThatHasEnded(t *testing.T) {
	inside := make(chan struct{}, 1)
	l, leads := New(), &term{holds: true, changed: make(chan struct{})}
	l.Serve(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/slow" {
			inside <- struct{}{}
			<-r.Context().Done()
		}
	}))
	c, err := rest.HTTPClientFor(l.While(leads).Config("scheduler"))
	if err != nil {
		t.Fatal(err)
	}
	do := func(method, path string) error {
		req, _ := http.NewRequestWithContext(t.Context(), method, "http://x"+path, nil)
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.ReadAll(resp.Body)
		return err
	}
	if err := do(http.MethodPost, "/"); err != nil {
		t.Errorf("a write of the leader: %v", err)
	}
	leads.set(true) // which may happen without news
	done := make(chan error, 1)
	go func() { done <- do(http.MethodPut, "/slow") }()
	<-inside
	leads.set(true)
	leads.set(false)
	if err := <-done; err == nil {
		t.Error("a write that was on its way has ended as if nothing were")
	}
	for _, method := range []string{http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete} {
		if err := do(method, "/"); !errors.Is(err, ErrNotLeading) {
			t.Errorf("%s: %v", method, err)
		}
	}
	if err := do(http.MethodGet, "/"); err != nil {
		t.Errorf("a read: %v", err)
	}
	leads.set(true)
	if err := do(http.MethodPost, "/"); err != nil {
		t.Errorf("a write of the next term: %v", err)
	}
}
