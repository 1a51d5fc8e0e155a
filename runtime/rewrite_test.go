package runtime

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

// fakeRegistry wants a password for everything and answers with the path it was
// asked for, after sending blobs elsewhere.
func fakeRegistry(t *testing.T) *httptest.Server {
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, password, _ := r.BasicAuth()
		switch {
		case strings.HasPrefix(r.URL.Path, "/elsewhere"):
			fmt.Fprintf(w, "blob %s", r.URL.Path)
		case name != "robot" || password != "hidden":
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
		case strings.Contains(r.URL.Path, "/blobs/"):
			http.Redirect(w, r, "/elsewhere"+r.URL.Path, http.StatusTemporaryRedirect)
		default:
			w.Header().Set("Docker-Content-Digest", "sha256:0")
			fmt.Fprintf(w, "manifest %s?%s for %s", r.URL.Path, r.URL.RawQuery, r.Header.Get("Accept"))
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func TestRewriter(t *testing.T) {
	registry := fakeRegistry(t)
	host := strings.TrimPrefix(registry.URL, "https://")
	r := Registries{
		Mirrors: map[string]Mirror{"docker.io": {
			Endpoints: []string{registry.URL},
			Rewrites:  map[string]string{"^library/(.*)": "official/$1", "^team/": "crew/"},
		}},
		Configs: map[string]RegistryConfig{host: {
			Auth: &RegistryAuth{Username: "robot", Password: "hidden"},
			TLS:  &RegistryTLS{InsecureSkipVerify: true},
		}},
	}
	w, err := startRewriter(r, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	base := w.address("docker.io", registry.URL)
	if !strings.HasPrefix(base, "http://127.0.0.1:") {
		t.Fatalf("served at %s, want the loopback address", base)
	}

	for _, c := range []struct {
		path   string
		status int
		body   string
	}{
		{base + "/library/busybox/manifests/1.36?ns=docker.io", 200, "manifest /v2/official/busybox/manifests/1.36?ns=docker.io for json"},
		{base + "/team/a/b/manifests/latest", 200, "manifest /v2/crew/a/b/manifests/latest? for json"},
		{base + "/other/tool/manifests/latest", 200, "manifest /v2/other/tool/manifests/latest? for json"},
		{base + "/library/busybox/blobs/sha256:1", 200, "blob /elsewhere/v2/official/busybox/blobs/sha256:1"},
		{base + "/library/busybox", 404, ""},
		{strings.Replace(base, w.secret, strings.Repeat("0", 32), 1) + "/library/busybox/manifests/1.36", 404, ""},
		{strings.TrimSuffix(base, "0") + "1/library/busybox/manifests/1.36", 404, ""},
	} {
		req, err := http.NewRequest(http.MethodGet, c.path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Accept", "json")
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		resp.Body.Close()
		if resp.StatusCode != c.status || (c.body != "" && string(body) != c.body) {
			t.Errorf("GET %s: %d %q, want %d %q", c.path, resp.StatusCode, body, c.status, c.body)
		}
	}
	resp, err := http.Post(base+"/library/busybox/blobs/uploads/", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("a push was answered %d", resp.StatusCode)
	}
}

// TestRewriterOnlyWhenNeeded wants no open port without rewrites.
func TestRewriterOnlyWhenNeeded(t *testing.T) {
	w, err := startRewriter(Registries{Mirrors: map[string]Mirror{"docker.io": {Endpoints: []string{"https://a.example"}}}}, slog.Default())
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if w.listener != nil {
		t.Error("listens although nothing is rewritten")
	}
}
