package runtime

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"strings"
	"sync"
	"testing"

	"kedge/internal/testimage"
)

// testRegistry serves the images of an OCI archive under the repository proxied/tool
// to whoever knows the password, and notes what it was asked for.
type testRegistry struct {
	mu    sync.Mutex
	asked []string // guarded by mu

	blobs    map[string][]byte // by digest
	manifest struct {
		MediaType string `json:"mediaType"`
		Digest    string `json:"digest"`
	}
}

func newTestRegistry(t *testing.T) (*testRegistry, string) {
	t.Helper()
	var archive bytes.Buffer
	if err := testimage.Archive(&archive, testimage.OCI, testimage.BusyboxImage(t, "tool:v1")); err != nil {
		t.Fatal(err)
	}
	r := &testRegistry{blobs: map[string][]byte{}}
	for tr := tar.NewReader(&archive); ; {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(tr)
		if err != nil {
			t.Fatal(err)
		}
		if h.Name == "index.json" {
			index := struct{ Manifests any }{Manifests: &[]any{&r.manifest}}
			if err := json.Unmarshal(data, &index); err != nil {
				t.Fatal(err)
			}
		}
		r.blobs["sha256:"+path.Base(h.Name)] = data
	}
	s := httptest.NewServer(r)
	t.Cleanup(s.Close)
	return r, strings.TrimPrefix(s.URL, "http://")
}

func (r *testRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	r.mu.Lock()
	r.asked = append(r.asked, req.URL.Path)
	r.mu.Unlock()
	if name, password, _ := req.BasicAuth(); name != "robot" || password != "hidden" {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		w.WriteHeader(http.StatusUnauthorized)
		return
	}
	what, ok := strings.CutPrefix(req.URL.Path, "/v2/proxied/tool/")
	digest := path.Base(what)
	mediaType := "application/octet-stream"
	if strings.HasPrefix(what, "manifests/") {
		digest, mediaType = r.manifest.Digest, r.manifest.MediaType
	}
	data, known := r.blobs[digest]
	if !ok || !known {
		http.NotFound(w, req)
		return
	}
	w.Header().Set("Content-Type", mediaType)
	w.Header().Set("Docker-Content-Digest", digest)
	w.Header().Set("Content-Length", fmt.Sprint(len(data)))
	if req.Method == http.MethodGet {
		w.Write(data)
	}
}

// TestPullThroughMirrors pulls with a mirror, with credentials, and with a repository
// that has another name there.
func TestPullThroughMirrors(t *testing.T) {
	n := newNode(t)
	registry, host := newTestRegistry(t)
	text := fmt.Sprintf(`
mirrors:
  plain.example.test:
    endpoint: ["http://%[1]s"]
  renamed.example.test:
    endpoint: ["http://%[1]s"]
    rewrite: {"^team/": "proxied/"}
configs:
  "%[1]s":
    auth: {username: robot, password: hidden}
`, host)
	if err := os.WriteFile(n.cfg.RegistriesFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.cfg.DisableDefaultRegistryEndpoint = true
	n.start()
	n.expect("imported")
	var out bytes.Buffer
	for _, name := range []string{"plain.example.test/proxied/tool:v1", "renamed.example.test/team/tool:v1"} {
		if err := PullImages(t.Context(), n.cfg.Socket(), &out, []string{name}); err != nil {
			registry.mu.Lock()
			t.Errorf("%v\nthe registry was asked for %v", err, registry.asked)
			registry.mu.Unlock()
		}
	}
	err := PullImages(t.Context(), n.cfg.Socket(), &out, []string{"renamed.example.test/else/tool:v1"})
	if err == nil || !strings.Contains(err.Error(), "not found") {
		t.Errorf("a repository that is not there: %v", err)
	}
	if strings.Contains(n.readLog(), "hidden") {
		t.Error("the password is in the log")
	}
	n.stop()
}
