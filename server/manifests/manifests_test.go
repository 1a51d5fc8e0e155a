package manifests

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
)

func TestParse(t *testing.T) {
	for _, test := range []struct{ text, want, err string }{
		{"", "", ""},
		{"---\n# nothing\n---\n", "", ""},
		{"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\napiVersion: v1\nkind: Secret\nmetadata: {name: b}\n", "ConfigMap/a Secret/b", ""},
		{`{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"json"}}`, "ConfigMap/json", ""},
		{"apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: a}}\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: b}}\n", "ConfigMap/a ConfigMap/b", ""},
		{"kind: ConfigMap\nmetadata: {name: a}\n", "", "document 1 has no apiVersion or no kind"},
		{"apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\n---\n[\n", "", "document 2"},
		{"text", "", "document 1"},
	} {
		objects, err := parse([]byte(test.text))
		var got []string
		for _, o := range objects {
			got = append(got, o.GetKind()+"/"+o.GetName())
		}
		if text := strings.Join(got, " "); err == nil && (test.err != "" || text != test.want) || err != nil && (test.err == "" || !strings.Contains(err.Error(), test.err)) {
			t.Errorf("%q: %s, %v", test.text, text, err)
		}
	}
}

// cluster is an API with namespaces and ConfigMaps that remembers what was applied. An object is refused until its namespace
// exists.
type cluster struct {
	mu      sync.Mutex
	uid     string
	applied []string
	exists  map[string]bool   // namespaces
	objects map[string][]byte // by path
	late    bool              // whether the kind Late is known
}

func (c *cluster) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.mu.Lock()
	defer c.mu.Unlock()
	answer := func(code int, v any) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(v)
	}
	parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/")
	switch path := strings.Join(parts, "/"); {
	case path == "api":
		answer(200, metav1.APIVersions{TypeMeta: metav1.TypeMeta{Kind: "APIVersions"}, Versions: []string{"v1"}})
	case path == "apis":
		answer(200, metav1.APIGroupList{TypeMeta: metav1.TypeMeta{Kind: "APIGroupList", APIVersion: "v1"}})
	case path == "api/v1":
		kinds := []metav1.APIResource{{Name: "namespaces", Kind: "Namespace"}, {Name: "configmaps", Kind: "ConfigMap", Namespaced: true}}
		if c.late {
			kinds = append(kinds, metav1.APIResource{Name: "lates", Kind: "Late", Namespaced: true})
		}
		answer(200, metav1.APIResourceList{TypeMeta: metav1.TypeMeta{Kind: "APIResourceList"}, GroupVersion: "v1", APIResources: kinds})
	case path == "api/v1/namespaces/kube-system":
		answer(200, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": "kube-system", "uid": c.uid}})
	case r.Method == http.MethodGet && len(parts) >= 4 && c.objects[path] != nil:
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(c.objects[path])
	case r.Method == http.MethodGet && len(parts) >= 4:
		answer(404, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404})
	case r.Method == http.MethodPatch && len(parts) == 4:
		c.exists[parts[3]], c.applied = true, append(c.applied, "namespace "+parts[3])
		c.objects[path], _ = io.ReadAll(r.Body)
		answer(200, map[string]any{"apiVersion": "v1", "kind": "Namespace", "metadata": map[string]any{"name": parts[3]}})
	case r.Method == http.MethodPatch && len(parts) == 6 && !c.exists[parts[3]]:
		answer(404, metav1.Status{TypeMeta: metav1.TypeMeta{Kind: "Status", APIVersion: "v1"}, Status: "Failure", Reason: metav1.StatusReasonNotFound, Code: 404, Message: "no namespace " + parts[3]})
	case r.Method == http.MethodPatch && len(parts) == 6 && r.URL.Query().Get("fieldManager") == fieldManager && r.URL.Query().Get("force") == "true":
		body, _ := io.ReadAll(r.Body)
		c.applied = append(c.applied, parts[3]+"/"+parts[5])
		c.objects[path] = body
		w.Header().Set("Content-Type", "application/json")
		_, _ = w.Write(body)
	default:
		answer(500, fmt.Sprint("unexpected ", r.Method, " ", r.URL))
	}
}

// take returns what was applied since the last call.
func (c *cluster) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := c.applied
	c.applied = nil
	return out
}

func TestManifestsAreAppliedOnce(t *testing.T) {
	c := &cluster{uid: "one", exists: map[string]bool{"default": true}, objects: map[string][]byte{}}
	srv := httptest.NewServer(c)
	defer srv.Close()
	cfg := Config{Folder: filepath.Join(t.TempDir(), "manifests"), Record: filepath.Join(t.TempDir(), "record")}
	httpClient := srv.Client()
	defer httpClient.CloseIdleConnections()
	apply := func() error {
		t.Helper()
		a, err := New(cfg, &rest.Config{Host: srv.URL, Transport: httpClient.Transport}, slog.New(slog.DiscardHandler)) // as after a restart
		if err != nil {
			t.Fatal(err)
		}
		return a.applyAll(t.Context())
	}
	want := func(step string, applied ...string) {
		t.Helper()
		if got := c.take(); !slices.Equal(got, applied) {
			t.Errorf("%s: applied %q, want %q", step, got, applied)
		}
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(cfg.Folder, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("without a folder")
	if err := os.Mkdir(cfg.Folder, 0o755); err != nil {
		t.Fatal(err)
	}
	write("001.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: early, namespace: late}\n---\napiVersion: v1\nkind: Namespace\nmetadata: {name: late}\n")
	write("002.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: plain}\n")
	if err := apply(); err == nil || !strings.Contains(err.Error(), "001.yaml: ConfigMap early") {
		t.Errorf("without its namespace: %v", err)
	}
	want("first", "namespace late", "default/plain")
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("second", "late/early")
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("third")
	write("002.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: changed}\n")
	write("003.yaml", "apiVersion: v1\nkind: Unknown\nmetadata: {name: x}\n")
	if err := apply(); err == nil || !strings.Contains(err.Error(), "003.yaml: Unknown x") {
		t.Errorf("an unknown kind: %v", err)
	}
	want("changed", "default/changed")
	if err := os.Remove(filepath.Join(cfg.Folder, "003.yaml")); err != nil {
		t.Fatal(err)
	}
	// Without the record, as on another server of the cluster, the objects show what was applied.
	if err := os.WriteFile(cfg.Record, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("damaged record")
	// An object that a user has deleted stays away; with the record of another cluster it is created.
	c.take()
	c.mu.Lock()
	delete(c.objects, "api/v1/namespaces/default/configmaps/changed")
	c.mu.Unlock()
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("deleted by a user")
	c.mu.Lock()
	c.uid = "two"
	c.mu.Unlock()
	if err := apply(); err != nil {
		t.Error(err)
	}
	want("another cluster", "default/changed")
}

// TestKindsThatComeLater: an object whose kind is defined only after the first attempt is applied by the next.
func TestKindsThatComeLater(t *testing.T) {
	c := &cluster{uid: "one", exists: map[string]bool{"default": true}, objects: map[string][]byte{}}
	srv := httptest.NewServer(c)
	defer srv.Close()
	httpClient := srv.Client()
	defer httpClient.CloseIdleConnections()
	folder := t.TempDir()
	if err := os.WriteFile(filepath.Join(folder, "001.yaml"), []byte("apiVersion: v1\nkind: Late\nmetadata: {name: x}\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	a, err := New(Config{Folder: folder, Record: filepath.Join(t.TempDir(), "record")}, &rest.Config{Host: srv.URL, Transport: httpClient.Transport}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := a.applyAll(t.Context()); err == nil || !strings.Contains(err.Error(), "Late x") {
		t.Errorf("without its kind: %v", err)
	}
	c.mu.Lock()
	c.late = true
	c.mu.Unlock()
	if err := a.applyAll(t.Context()); err != nil {
		t.Error(err)
	}
	if got := c.take(); !slices.Equal(got, []string{"default/x"}) {
		t.Errorf("applied %q", got)
	}
}
