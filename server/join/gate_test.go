package join

import (
	"context"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	k8stesting "k8s.io/client-go/testing"
)

// TestGate: a node's certificates count as long as its key has the name, and what is under
// way ends with that.
func TestGate(t *testing.T) {
	c := newCluster(t, nil)
	a := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	b := c.mustJoin(t, t.TempDir(), "b", c.token(t, Spec{}))
	g := c.Gate(noUsers{}, slog.New(slog.DiscardHandler))
	entered, ended := make(chan struct{}), make(chan error, 1)
	handler := g.Handler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/watch" {
			entered <- struct{}{}
			<-r.Context().Done()
			ended <- context.Cause(r.Context())
		}
	}))
	ask := func(file, path string) int {
		t.Helper()
		w, r := httptest.NewRecorder(), request(t, file)
		r.URL.Path = path
		handler.ServeHTTP(w, r)
		return w.Code
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Run(ctx, func() {}) }()
	defer func() { stop(); <-done }()

	for what, file := range map[string]string{"kubelet": a.ClientCertFile(), "network": a.NetworkCertFile(), "other": b.ClientCertFile(), "nobody": ""} {
		if code := ask(file, "/"); code != http.StatusOK {
			t.Errorf("%s gets %d", what, code)
		}
	}
	if keys, _ := g.Keys(); len(keys) != 2 || keys["a"] == "" || keys["a"] == keys["b"] {
		t.Errorf("the keys are %v", keys)
	}
	// The client of this test forgets what changes between a list and a watch.
	watches := func(a k8stesting.Action) bool { return a.GetVerb() == "watch" }
	for deadline := time.Now().Add(5 * time.Second); !slices.ContainsFunc(c.api.Actions(), watches); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the keys are not watched")
		}
	}
	_, changed := g.Keys()
	go ask(a.NetworkCertFile(), "/watch")
	<-entered
	if err := c.Nodes().Forget(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != errRevoked {
			t.Errorf("the watch ended with %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("the watch of a node that was removed goes on")
	}
	<-changed
	if keys, _ := g.Keys(); keys["a"] != "" || keys["b"] == "" {
		t.Errorf("after the removal the keys are %v", keys)
	}
	for what, file := range map[string]string{"kubelet": a.ClientCertFile(), "network": a.NetworkCertFile()} {
		if code := ask(file, "/"); code != http.StatusUnauthorized {
			t.Errorf("the %s of a removed node gets %d", what, code)
		}
	}
	if code := ask(b.ClientCertFile(), "/"); code != http.StatusOK {
		t.Errorf("the other node gets %d", code)
	}
	// The name comes back with another key: the old one is worth no more than before.
	again := c.mustJoin(t, t.TempDir(), "a", c.token(t, Spec{}))
	deadline := time.Now().Add(5 * time.Second)
	for ask(again.ClientCertFile(), "/") != http.StatusOK {
		if time.Now().After(deadline) {
			t.Fatal("the new machine of the name is refused")
		}
		time.Sleep(10 * time.Millisecond)
	}
	if code := ask(a.ClientCertFile(), "/"); code != http.StatusUnauthorized {
		t.Errorf("the old key gets %d", code)
	}
}
