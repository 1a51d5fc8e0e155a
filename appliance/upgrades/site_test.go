package upgrades

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"

	"aead.dev/minisign"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	kruntime "k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/appliance/remote"
)

// site is a cluster whose nodes answer as the test says, and a server with a release.
type site struct {
	*Controller
	t      *testing.T
	client *fake.Clientset
	url    string // of the folder of the release
	folder string
	hash   string // of its executable
	keys   []release.Key
	events *record.FakeRecorder

	mu      sync.Mutex
	nodes   map[string]*machine
	began   []string
	fetches int // of the executable

	fetching func() // called when the executable is fetched; nil for nothing
}

// machine is a node.
type machine struct {
	away    bool
	hash    string
	status  appliance.UpgradeStatus
	result  appliance.Outcome // of its next upgrade
	refuses string            // why it refuses an upgrade
	asked   func()            // called when it is asked for its upgrades, with the lock of the site
}

const (
	newVersion = "v2.0.0"
	ownName    = "s1"
)

// newSite makes a cluster of nodes, of which the servers have names that begin with s.
func newSite(t *testing.T, names ...string) *site {
	t.Helper()
	s := &site{t: t, client: fake.NewClientset(), nodes: map[string]*machine{}, folder: t.TempDir()}
	var servers []string
	for _, name := range names {
		s.nodes[name] = &machine{hash: "old", result: appliance.Outcome{ID: "new-" + name, Result: appliance.Upgraded}}
		if name[0] == 's' {
			servers = append(servers, name)
		}
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Status: corev1.NodeStatus{
			NodeInfo:   corev1.NodeSystemInfo{Architecture: runtime.GOARCH},
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
		}}
		if _, err := s.client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if filepath.Base(r.URL.Path) == release.Executable(runtime.GOARCH) {
			s.mu.Lock()
			s.fetches++
			s.mu.Unlock()
			if s.fetching != nil {
				s.fetching()
			}
		}
		http.FileServer(http.Dir(s.folder)).ServeHTTP(w, r)
	}))
	t.Cleanup(srv.Close)
	s.url = srv.URL
	s.publish(newVersion)
	download := srv.Client()
	download.Transport.(*http.Transport).DisableKeepAlives = true
	cfg := Config{
		Own: ownName, Dir: filepath.Join(t.TempDir(), "rollout"), Source: appliance.Source{Base: srv.URL, Client: download},
		Keys:    func() ([]release.Key, error) { return s.keys, nil },
		Servers: func(context.Context) ([]string, error) { return servers, nil },
		Dial:    s.dial,
		Define:  func(context.Context) error { return nil },
	}
	any := dynamicfake.NewSimpleDynamicClientWithCustomListKinds(kruntime.NewScheme(), map[schema.GroupVersionResource]string{Resource: "UpgradeList"})
	s.Controller = newController(cfg, s.client, any, slog.New(slog.DiscardHandler))
	s.events = record.NewFakeRecorder(1000)
	s.recorder = s.events
	return s
}

// publish makes a signed release in the folder of its version, and in the root.
func (s *site) publish(version string) {
	s.t.Helper()
	public, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		s.t.Fatal(err)
	}
	s.keys = []release.Key{public}
	name := release.Executable(runtime.GOARCH)
	files := map[string][]byte{name: []byte("executable of " + version), release.VersionName: []byte(version + "\n")}
	var list release.List
	for name, data := range files {
		if err := list.Add(name, bytes.NewReader(data)); err != nil {
			s.t.Fatal(err)
		}
	}
	text := list.Text()
	r := minisign.NewReader(bytes.NewReader(text))
	if _, err := io.Copy(io.Discard, r); err != nil {
		s.t.Fatal(err)
	}
	files[release.ListName], files[release.SignatureName] = text, r.Sign(secret)
	for _, dir := range []string{filepath.Join(s.folder, version), s.folder, filepath.Join(s.folder, "channels")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	for name, data := range files {
		err := errors.Join(os.WriteFile(filepath.Join(s.folder, version, name), data, 0o644), os.WriteFile(filepath.Join(s.folder, name), data, 0o644))
		if err != nil {
			s.t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(s.folder, "channels", "stable"), []byte(version+"\n"), 0o644); err != nil {
		s.t.Fatal(err)
	}
	if s.hash, err = appliance.HashFile(filepath.Join(s.folder, name)); err != nil {
		s.t.Fatal(err)
	}
}

// oneConn is a listener with one connection.
type oneConn struct {
	net.Listener
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *oneConn) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

// dial connects to a node.
func (s *site) dial(_ context.Context, name string) (net.Conn, error) {
	s.mu.Lock()
	away := s.nodes[name].away
	s.mu.Unlock()
	if away {
		return nil, errors.New("no tunnel")
	}
	ours, theirs := net.Pipe()
	l := &oneConn{conns: make(chan net.Conn, 1), done: make(chan struct{})}
	l.conns <- theirs
	srv := &http.Server{Handler: s.answers(name), ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			_ = l.Close()
		}
	}}
	go func() { _ = srv.Serve(l) }()
	return ours, nil
}

func (s *site) answers(name string) http.Handler {
	mux := http.NewServeMux()
	locked := func(f func(w http.ResponseWriter, m *machine)) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			_, _ = io.Copy(io.Discard, r.Body)
			s.mu.Lock()
			defer s.mu.Unlock()
			f(w, s.nodes[name])
		}
	}
	mux.HandleFunc("GET /v1/installed", locked(func(w http.ResponseWriter, m *machine) {
		_ = json.NewEncoder(w).Encode(remote.Installed{Node: name, Hash: m.hash})
	}))
	mux.HandleFunc("GET /v1/upgrades", locked(func(w http.ResponseWriter, m *machine) {
		if m.asked != nil {
			m.asked()
		}
		_ = json.NewEncoder(w).Encode(m.status)
	}))
	mux.HandleFunc("PUT /v1/files/{name}", locked(func(http.ResponseWriter, *machine) {}))
	mux.HandleFunc("POST /v1/upgrade", locked(func(w http.ResponseWriter, m *machine) {
		if m.refuses != "" {
			http.Error(w, m.refuses, http.StatusUnprocessableEntity)
			return
		}
		s.began = append(s.began, name)
		s.end(m)
	}))
	return mux
}

// end ends the upgrade of a node.
func (s *site) end(m *machine) {
	o := m.result
	o.To.Hash = s.hash
	m.status.Trial = nil
	m.status.History = append(m.status.History, o)
	if o.Result == appliance.Upgraded {
		m.hash = s.hash
	}
}

// notReady makes a node that is not Ready.
func (s *site) ready(name string, is corev1.ConditionStatus) {
	s.t.Helper()
	node, err := s.client.CoreV1().Nodes().Get(s.t.Context(), name, metav1.GetOptions{})
	if err == nil {
		node.Status.Conditions[0].Status = is
		_, err = s.client.CoreV1().Nodes().Update(s.t.Context(), node, metav1.UpdateOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// create creates an Upgrade.
func (s *site) create(name string, spec map[string]any, status map[string]any) {
	s.t.Helper()
	o := map[string]any{
		"apiVersion": "kedge.io/v1", "kind": "Upgrade", "spec": spec,
		"metadata": map[string]any{"name": name, "uid": "uid-" + name, "generation": int64(1)},
	}
	if status != nil {
		status["observedGeneration"] = int64(1)
		o["status"] = status
	}
	if _, err := s.any.Resource(Resource).Create(s.t.Context(), &unstructured.Unstructured{Object: o}, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
}

// changeSpec changes an Upgrade as a user does.
func (s *site) changeSpec(name string, spec map[string]any) {
	s.t.Helper()
	o, err := s.any.Resource(Resource).Get(s.t.Context(), name, metav1.GetOptions{})
	if err == nil {
		o.Object["spec"] = spec
		o.SetGeneration(o.GetGeneration() + 1)
		_, err = s.any.Resource(Resource).Update(s.t.Context(), o, metav1.UpdateOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// read returns an Upgrade as a user sees it.
func (s *site) read(name string) *Upgrade {
	s.t.Helper()
	u, err := s.get(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return u
}

// phases are those of the nodes, in the order of their names.
func phases(u *Upgrade) (list []string) {
	for _, n := range u.Status.Nodes {
		list = append(list, n.Name+" "+string(n.Phase))
	}
	slices.Sort(list)
	return list
}
