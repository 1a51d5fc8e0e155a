package remote

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/appliance"
	"kedge/appliance/release"
	"kedge/launcher/bootguard"
)

// newNode returns a node with a data directory, whose executable is a shell script: it notes its arguments, says what the
// script says, and ends with its exit code.
func newNode(t *testing.T, script string) (*Node, Client) {
	t.Helper()
	dir := t.TempDir()
	launcher := filepath.Join(dir, "kedge")
	text := "#!/bin/sh\necho \"$@\" >" + dir + "/arguments\n" + script + "\n"
	if err := errors.Join(os.WriteFile(launcher, []byte(text), 0o755), os.Mkdir(filepath.Join(dir, "data"), 0o755)); err != nil {
		t.Fatal(err)
	}
	n := &Node{Name: "a", Version: "v1", Launcher: launcher, DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"),
		Flags: []string{"--data-dir=x"}, Restart: func() {}, Log: slog.New(slog.DiscardHandler)}
	return n, Client{Dial: func(context.Context) (net.Conn, error) { return n.Conn(), nil }}
}

func TestNode(t *testing.T) {
	n, c := newNode(t, "exit 0")
	ctx := t.Context()
	want, err := appliance.HashFile(n.Launcher)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second from memory
		if i, err := c.Installed(ctx); err != nil || i.Hash != want || i.Path != n.Launcher || i.Node != "a" || i.Arch != runtime.GOARCH {
			t.Errorf("%+v, %v", i, err)
		}
	}
	if err := os.WriteFile(n.Launcher, []byte("#!/bin/sh\necho \"$@\" >"+filepath.Dir(n.Launcher)+"/arguments\n# changed\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if i, err := c.Installed(ctx); err != nil || i.Hash == want {
		t.Errorf("after a change of the file: %+v, %v", i, err)
	}
	if s, err := c.Upgrades(ctx); err != nil || s.Trial != nil || len(s.History) != 0 {
		t.Errorf("%+v, %v", s, err)
	}
	file := filepath.Join(t.TempDir(), release.Executable(runtime.GOARCH))
	if err := os.WriteFile(file, []byte(strings.Repeat("new executable ", 100_000)), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ctx, file); err != nil {
		t.Fatal(err)
	}
	received := bootguard.Path(n.DataDir, incoming, filepath.Base(file))
	if data, err := os.ReadFile(received); err != nil || len(data) != 15*100_000 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
	if err := c.Begin(ctx, Begin{Observe: time.Second, Wait: time.Minute}); err != nil {
		t.Fatal(err)
	}
	arguments, err := os.ReadFile(filepath.Join(filepath.Dir(n.Launcher), "arguments"))
	if want := "upgrade --file=" + received + " --no-wait --observe=1s --wait=1m0s --data-dir=x\n"; err != nil || string(arguments) != want {
		t.Errorf("%v: it is called with %q, want %q", err, arguments, want)
	}
	if _, err := os.Stat(received); err == nil {
		t.Error("what was received is left")
	}
}

func TestNodeRefuses(t *testing.T) {
	_, c := newNode(t, "echo warning >&2\necho 'kedge: not \x1b[31mthis\x1b[0m one' >&2\nexit 78")
	ctx := t.Context()
	if err := c.Begin(ctx, Begin{}); err == nil || err.Error() != "not [31mthis[0m one" {
		t.Errorf("an executable that refuses: %v", err)
	}
	other := filepath.Join(t.TempDir(), "authorized_keys")
	if err := os.WriteFile(other, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := c.Send(ctx, other); err == nil || !strings.Contains(err.Error(), "is no file for an upgrade") {
		t.Errorf("another file: %v", err)
	}
	conn, err := c.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, "PUT /v1/files/..%2f..%2fx HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if answer, err := io.ReadAll(conn); err != nil || strings.Contains(string(answer), " 200 ") {
		t.Errorf("a path: %v, %s", err, answer)
	}
}

func TestSupportBundle(t *testing.T) {
	n, c := newNode(t, `[ "$1" = support-bundle ] && echo "state of the node" >"${2#--output=}"`)
	var got strings.Builder
	if err := c.SupportBundle(t.Context(), &got); err != nil || got.String() != "state of the node\n" {
		t.Errorf("%q, %v", got.String(), err)
	}
	if left, err := filepath.Glob(filepath.Join(n.DataDir, ".tmp-*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	_, c = newNode(t, "echo 'kedge: the disk is full' >&2; exit 1")
	if err := c.SupportBundle(t.Context(), io.Discard); err == nil || err.Error() != "the disk is full" {
		t.Errorf("a node that cannot: %v", err)
	}
}

// site is a cluster whose nodes are upgraded as the test says.
type site struct {
	mu        sync.Mutex
	hashes    map[string]string
	result    map[string]appliance.Outcome // of the nodes' next upgrade
	histories map[string][]appliance.Outcome
	began     []string
	at, most  int // nodes that are being upgraded, and the most at a time
}

func newSite(names ...string) *site {
	s := &site{hashes: map[string]string{}, result: map[string]appliance.Outcome{}, histories: map[string][]appliance.Outcome{}}
	for _, name := range names {
		s.hashes[name] = "old"
		s.result[name] = appliance.Outcome{ID: "1-" + name, Result: appliance.Upgraded}
	}
	return s
}

// dial connects to a node that answers from the site.
func (s *site) dial(_ context.Context, name string) (net.Conn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.hashes[name] == "" {
		return nil, errors.New("no tunnel")
	}
	ours, theirs := net.Pipe()
	l := &oneConn{conn: theirs, closed: make(chan struct{})}
	srv := &http.Server{Handler: s.answers(name), ConnState: func(_ net.Conn, state http.ConnState) {
		if state == http.StateClosed {
			l.Close()
		}
	}}
	go func() { _ = srv.Serve(l) }()
	return ours, nil
}

func (s *site) answers(name string) http.Handler {
	mux := http.NewServeMux()
	reply := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	mux.HandleFunc("GET /v1/installed", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		reply(w, Installed{Node: name, Hash: s.hashes[name]})
	})
	mux.HandleFunc("GET /v1/upgrades", func(w http.ResponseWriter, _ *http.Request) {
		s.mu.Lock()
		defer s.mu.Unlock()
		reply(w, appliance.UpgradeStatus{History: s.histories[name]})
	})
	mux.HandleFunc("PUT /v1/files/{name}", func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
	mux.HandleFunc("POST /v1/upgrade", func(http.ResponseWriter, *http.Request) {
		s.mu.Lock()
		s.at++
		s.most = max(s.most, s.at)
		s.mu.Unlock()
		time.Sleep(50 * time.Millisecond) // so that others can begin meanwhile
		s.mu.Lock()
		defer s.mu.Unlock()
		s.at--
		s.began = append(s.began, name)
		o := s.result[name]
		if o.Result == "" {
			return // it ends without a result
		}
		s.histories[name] = append(s.histories[name], o)
		if o.Result == appliance.Upgraded {
			s.hashes[name] = "new"
		}
	})
	return mux
}

// rollout returns a rollout from server s1 to three servers and three agents.
func (s *site) rollout(t *testing.T) Rollout {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, release.Executable("amd64")), []byte("new"), 0o644); err != nil {
		t.Fatal(err)
	}
	var targets []Target
	for name := range s.hashes {
		targets = append(targets, Target{Name: name, Server: name[0] == 's', Arch: "amd64"})
	}
	return Rollout{
		Own: "s2", Targets: targets, Files: map[string]Files{"amd64": {Dir: dir, Hash: "new"}}, Dial: s.dial, Say: func(string) {}, patience: time.Millisecond,
		OwnInstalled: func() (string, error) { return s.hashes["s2"], nil },
		UpgradeOwn: func(context.Context) error {
			s.began = append(s.began, "s2")
			if r := s.result["s2"]; r.Result != appliance.Upgraded {
				return errors.New("it went back")
			}
			s.hashes["s2"] = "new"
			return nil
		},
	}
}

func outcomes(results []Result) (list []string) {
	for _, r := range results {
		list = append(list, r.Node+" "+string(r.Outcome))
	}
	return list
}

func TestRollout(t *testing.T) {
	s := newSite("s1", "s2", "s3", "a1", "a2", "a3")
	r := s.rollout(t)
	r.Parallel = 2
	var around []string
	var mu sync.Mutex
	note := func(what string) func(context.Context, string) error {
		return func(_ context.Context, node string) error {
			mu.Lock()
			defer mu.Unlock()
			around = append(around, what+" "+node)
			return nil
		}
	}
	r.Before, r.After = note("drain"), note("uncordon")
	results, err := r.Run(t.Context())
	if err != nil {
		t.Fatalf("%v: %v", err, results)
	}
	if want := []string{"s2 upgraded", "s1 upgraded", "s3 upgraded", "a1 upgraded", "a2 upgraded", "a3 upgraded"}; !slices.Equal(outcomes(results), want) {
		t.Errorf("%v", results)
	}
	if want := []string{"s2", "s1", "s3"}; !slices.Equal(s.began[:3], want) || s.most != 2 {
		t.Errorf("they began in the order %v, at most %d at a time", s.began, s.most)
	}
	if len(around) != 12 || around[0] != "drain s2" || around[1] != "uncordon s2" {
		t.Errorf("around the upgrades: %v", around)
	}
	// Again, there is nothing to do.
	s.began = nil
	results, err = r.Run(t.Context())
	if err != nil || len(s.began) > 0 || results[0].Outcome != Had || results[5].Outcome != Had {
		t.Errorf("again: %v, %v, began %v", results, err, s.began)
	}
}

// After is called whatever happens, also if Before has done a part of its work, and again while the API is away.
func TestRolloutCallsAfter(t *testing.T) {
	for name, change := range map[string]func(s *site, r *Rollout){
		"it goes back": func(s *site, _ *Rollout) { s.result["s2"] = appliance.Outcome{} },
		"it cannot be drained": func(_ *site, r *Rollout) {
			r.Before = func(context.Context, string) error { return errors.New("full") }
		},
		"the user interrupts": func(_ *site, r *Rollout) { r.UpgradeOwn = func(context.Context) error { return context.Canceled } },
		"another node goes back": func(s *site, _ *Rollout) {
			s.result["a1"] = appliance.Outcome{ID: "x", Result: appliance.WentBack}
		},
	} {
		s := newSite("s2", "a1")
		r := s.rollout(t)
		r.patience = time.Minute
		touched, calls := map[string]bool{}, map[string]int{}
		r.Before = func(_ context.Context, node string) error { touched[node] = true; return nil }
		change(s, &r)
		before := r.Before
		r.Before = func(ctx context.Context, node string) error { touched[node] = true; return before(ctx, node) }
		r.After = func(ctx context.Context, node string) error {
			calls[node]++
			if calls[node] == 1 {
				return errors.New("the API is away")
			}
			return ctx.Err()
		}
		ctx, cancel := context.WithCancel(t.Context())
		results, err := r.Run(ctx)
		cancel()
		if err == nil || strings.Contains(err.Error(), "is away") {
			t.Errorf("%s: %v, %v", name, results, err)
		}
		for node := range touched {
			if calls[node] != 2 {
				t.Errorf("%s: of %s it was called %d times", name, node, calls[node])
			}
		}
	}
}

// A rollout stops at the first node that goes back, and another one resumes it.
func TestRolloutStops(t *testing.T) {
	s := newSite("s1", "s2", "a1", "a2")
	s.result["a1"] = appliance.Outcome{ID: "x", Result: appliance.WentBack, Reason: "it \x1b[31mpanics"}
	r := s.rollout(t)
	results, err := r.Run(t.Context())
	if want := []string{"s2 upgraded", "s1 upgraded", "a1 went back", "a2 untouched"}; err == nil || !slices.Equal(outcomes(results), want) {
		t.Errorf("%v, %v", results, err)
	}
	if err != nil && (!strings.Contains(err.Error(), "the upgrade stopped at node a1") || strings.Contains(err.Error(), "\x1b")) {
		t.Errorf("%q", err)
	}
	s.result["a1"] = appliance.Outcome{ID: "y", Result: appliance.Upgraded}
	s.began = nil
	if results, err := r.Run(t.Context()); err != nil || !slices.Equal(s.began, []string{"a1", "a2"}) {
		t.Errorf("resumed: %v, %v, began %v", results, err, s.began)
	}
}

func TestRolloutFails(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(s *site, r *Rollout)
		want   string // of the error
		began  int
	}{
		"own server": {func(s *site, _ *Rollout) { s.result["s2"] = appliance.Outcome{} }, "stopped at node s2: it went back", 1},
		"no tunnel":  {func(s *site, _ *Rollout) { s.hashes["a1"] = "" }, "stopped at node a1: no tunnel", 2},
		"too old": {func(_ *site, r *Rollout) { // which it is not asked for as long as a node is that is out of reach
			r.patience, r.Dial = time.Hour, func(context.Context, string) (net.Conn, error) {
				return nil, fmt.Errorf("earlier: %w", errors.ErrUnsupported)
			}
		}, "stopped at node s1: earlier", 1},
		"no result":            {func(s *site, _ *Rollout) { s.result["s1"] = appliance.Outcome{} }, "ended without a result", 2},
		"another architecture": {func(_ *site, r *Rollout) { r.Targets[0].Arch = "arm64" }, "for which there is no executable", 0},
		"cannot be drained": {func(_ *site, r *Rollout) {
			r.Before = func(context.Context, string) error { return errors.New("full") }
		}, "stopped at node s2: full", 0},
		"cannot be uncordoned":  {func(_ *site, r *Rollout) { r.After = func(context.Context, string) error { return errors.New("gone") } }, "stopped at node s2: gone", 1},
		"result of before":      {func(s *site, _ *Rollout) { s.histories["s1"] = []appliance.Outcome{s.result["s1"]} }, "ended without a result", 2},
		"interrupted by a user": {func(_ *site, r *Rollout) { r.UpgradeOwn = func(context.Context) error { return context.Canceled } }, "canceled", 0},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSite("s1", "s2", "a1")
			r := s.rollout(t)
			tc.change(s, &r)
			results, err := r.Run(t.Context())
			if err == nil || !strings.Contains(err.Error(), tc.want) || len(s.began) != tc.began {
				t.Errorf("%v, %v; began %v", results, err, s.began)
			}
			if fmt.Sprint(results) == "[]" {
				t.Error("no results")
			}
		})
	}
}
