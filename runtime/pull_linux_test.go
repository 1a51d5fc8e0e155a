package runtime

import (
	"archive/tar"
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/internal/pki"
	"kedge/internal/test/image"
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
	if err := image.Archive(&archive, image.OCI, image.BusyboxImage(t, "tool:v1")); err != nil {
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

// secured serves the registry over TLS on all addresses of the machine itself, to who shows
// a certificate of the registry's own authority. It returns the port, and the configuration
// of a client that has one.
func (r *testRegistry) secured(t *testing.T) (port int, client RegistryTLS) {
	t.Helper()
	dir := t.TempDir()
	now := time.Now()
	ca, err := pki.EnsureAuthority(dir, "ca", now)
	if err != nil {
		t.Fatal(err)
	}
	leaf := func(name string, want pki.Leaf) pki.Pair {
		t.Helper()
		want.CommonName = name
		pair, err := ca.EnsureLeaf(dir, name, want, now)
		if err != nil {
			t.Fatal(err)
		}
		return pair
	}
	server := leaf("server", pki.Leaf{Server: true, IPs: []net.IP{{127, 0, 0, 1}, {127, 0, 0, 2}, {127, 0, 0, 3}}})
	robot := leaf("robot", pki.Leaf{Client: true})
	shown, err := tls.LoadX509KeyPair(server.CertFile, server.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AddCert(ca.Cert)
	l, err := net.Listen("tcp4", ":0")
	if err != nil {
		t.Fatal(err)
	}
	s := &httptest.Server{Listener: l, Config: &http.Server{Handler: r, ErrorLog: log.New(io.Discard, "", 0)},
		TLS: &tls.Config{Certificates: []tls.Certificate{shown}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: clients}}
	s.StartTLS()
	t.Cleanup(s.Close)
	return l.Addr().(*net.TCPAddr).Port, RegistryTLS{CAFile: ca.CertFile(), CertFile: robot.CertFile, KeyFile: robot.KeyFile}
}

// deadAddress is one where nobody listens.
func deadAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
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

// TestPullThroughMirrors pulls with a mirror, with credentials, with a repository that
// has another name there, over TLS with a certificate of the registry's own authority and
// one of ours, and from the second of two mirrors when the first is dead.
func TestPullThroughMirrors(t *testing.T) {
	n := newNode(t)
	registry, host := newTestRegistry(t)
	port, client := registry.secured(t)
	text := fmt.Sprintf(`
mirrors:
  plain.example.test:
    endpoint: ["http://%[1]s"]
  renamed.example.test:
    endpoint: ["http://%[1]s"]
    rewrite: {"^team/": "proxied/"}
  secure.example.test:
    endpoint: ["https://%[2]s", "http://%[2]s", "https://127.0.0.1:%[3]d"]
  renamedsecure.example.test:
    endpoint: ["https://127.0.0.1:%[3]d"]
    rewrite: {"^team/": "proxied/"}
  uncertified.example.test:
    endpoint: ["https://127.0.0.2:%[3]d"]
  untrusting.example.test:
    endpoint: ["https://127.0.0.3:%[3]d"]
configs:
  "%[1]s":
    auth: {username: robot, password: hidden}
  "127.0.0.1:%[3]d":
    auth: {username: robot, password: hidden}
    tls: {ca_file: %[4]q, cert_file: %[5]q, key_file: %[6]q}
  "127.0.0.2:%[3]d":
    auth: {username: robot, password: hidden}
    tls: {ca_file: %[4]q}
  "127.0.0.3:%[3]d":
    auth: {username: robot, password: hidden}
    tls: {cert_file: %[5]q, key_file: %[6]q}
`, host, deadAddress(t), port, client.CAFile, client.CertFile, client.KeyFile)
	if err := os.WriteFile(n.cfg.RegistriesFile, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	n.cfg.DisableDefaultRegistryEndpoint = true
	n.start()
	n.expect("imported")
	var out bytes.Buffer
	// The first brings the layers, which those after it find.
	for _, name := range []string{"secure.example.test/proxied/tool:v1", "renamedsecure.example.test/team/tool:v1",
		"plain.example.test/proxied/tool:v1", "renamed.example.test/team/tool:v1"} {
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
	for name, want := range map[string]string{"uncertified": "certificate required", "untrusting": "unknown authority"} {
		err := PullImages(t.Context(), n.cfg.Socket(), &out, []string{name + ".example.test/proxied/tool:v1"})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	if strings.Contains(n.readLog(), "hidden") {
		t.Error("the password is in the log")
	}
	n.stop()
}

// TestFetchAndReadArchive read an image into a folder, as for a bundle: from a registry that a mirror with rewrites and
// credentials stands for, and from archives.
func TestFetchAndReadArchive(t *testing.T) {
	r, address := newTestRegistry(t)
	file := filepath.Join(t.TempDir(), "registries.yaml")
	text := fmt.Sprintf("mirrors:\n  registry.example.com:\n    endpoint: [http://%s]\n    rewrite: {\"^(.*)$\": \"proxied/$1\"}\nconfigs:\n  %q: {auth: {username: robot, password: hidden}}\n", address, address)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	img, err := FetchImage(t.Context(), file, "registry.example.com/tool:v1", []string{goruntime.GOARCH}, dir)
	if err != nil {
		t.Fatal(err)
	}
	if img.Name != "registry.example.com/tool:v1" || img.Target.Digest.String() != r.manifest.Digest {
		t.Errorf("%+v", img)
	}
	present := func(dir string, from map[string][]byte) (n int) {
		for d := range from {
			if _, err := os.Stat(filepath.Join(dir, "blobs", "sha256", strings.TrimPrefix(d, "sha256:"))); err == nil {
				n++
			}
		}
		return n
	}
	if n := present(dir, r.blobs); n < 3 { // manifest, configuration, layer
		t.Errorf("%d blobs are there", n)
	}
	if _, err := FetchImage(t.Context(), "", "localhost:1/tool:v1", nil, t.TempDir()); err == nil || !strings.Contains(err.Error(), "pull localhost:1/tool:v1: ") {
		t.Errorf("a registry that is away: %v", err)
	}

	var archive bytes.Buffer
	if err := image.Archive(&archive, image.Docker, image.BusyboxImage(t, "tool:v2")); err != nil {
		t.Fatal(err)
	}
	joined := append(bytes.Clone(archive.Bytes()), archive.Bytes()...)
	found, err := ReadArchive(t.Context(), "a.tar", bytes.NewReader(joined), t.TempDir())
	if err != nil || len(found) != 2 || found[0].Name != "docker.io/library/tool:v2" {
		t.Errorf("%+v, %v", found, err)
	}
	for name, data := range map[string][]byte{"cut.tar": archive.Bytes()[:archive.Len()/2], "text.tar": []byte(strings.Repeat("text", 1000)), "a.tar.xz": []byte("\xfd7zXZ\x00 and more")} {
		_, err := ReadArchive(t.Context(), name, bytes.NewReader(data), t.TempDir())
		var about *archiveError
		if !errors.As(err, &about) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
