package secretsencryption

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kedge/internal/lifecycle"
	"kedge/server/identity"
)

// clusterSecrets is how many Secrets a world has at first: several pages.
const clusterSecrets = 70

const prefix = "/registry/secrets/"

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

// errKilled is what a process gets that was killed at this call: whatever it does after it fails too.
var errKilled = errors.New("killed")

// world is a cluster: a datastore in memory, and servers with files and API servers. At each call of a server on the datastore
// or its API server, clients write Secrets, all rules are checked, and the server may be killed.
type world struct {
	t       *testing.T
	random  *rand.Rand
	servers []*server
	leader  *server
	kill    int           // at which call a server is killed; 0: at none
	link    chan struct{} // a server calls one other at a time, so that calls have an order

	checking sync.Mutex               // held during a check; guards seen and files
	files    map[string]configuration // by their content

	mu          sync.Mutex // guards the fields below
	calls       int
	data        map[string]Item
	revision    int64
	contents    map[string]string // that Secrets must have
	pending     []write
	broken      error
	quiet       bool             // no clients
	copied      bool             // a server has a copy of an old file, so that the rules do not hold
	seen        map[reading]bool // what was read before
	writes      int
	refused     int
	compactions int
}

// reading is a value that a configuration has read.
type reading struct {
	key      string
	revision int64
	config   string
}

// write is a request that has encrypted its object and has not written it yet.
type write struct {
	by           *server
	key, content string
	value        []byte
	revision     int64
}

// server is a server of the world. It is its API server too.
type server struct {
	w      *world
	name   string
	dir    string
	keeper *Keeper
	loaded configuration // of the API server
	dead   bool          // was killed
	end    func()        // of its start
	away   bool          // cannot be reached
}

func newWorld(t *testing.T, servers int, first configuration, seed uint64) *world {
	t.Helper()
	w := &world{t: t, random: rand.New(rand.NewPCG(seed, 0)), link: make(chan struct{}, 1), data: map[string]Item{}, contents: map[string]string{}, seen: map[reading]bool{}, files: map[string]configuration{}}
	text, err := first.file()
	if err != nil {
		t.Fatal(err)
	}
	for i := range servers {
		s := &server{w: w, name: fmt.Sprint("s", i+1), dir: t.TempDir()}
		if err := os.WriteFile(identity.EncryptionConfigFile(s.dir), text, 0o600); err != nil {
			t.Fatal(err)
		}
		w.servers = append(w.servers, s)
	}
	w.leader = w.servers[0]
	for _, s := range w.servers {
		s.start()
	}
	for i := range clusterSecrets {
		w.clientWrites(write{by: w.servers[i%servers], key: fmt.Sprintf("%sns/s%d", prefix, i), content: fmt.Sprint("content ", i)})
	}
	return w
}

// start starts a server, also after it was killed.
func (s *server) start() {
	ctx, end := context.WithCancel(s.w.t.Context())
	defer end()
	s.dead, s.end = false, end
	s.keeper = NewKeeper(s.name, s.dir, func() (Store, error) { return &view{s.w, s}, nil }, func(ctx context.Context, name, _ string) ([]byte, error) {
		from := s.w.find(name)
		if from == nil || from.dead || from.away {
			return nil, errors.New("it does not answer")
		}
		return from.keeper.file()
	}, slog.New(slog.DiscardHandler))
	if err := s.keeper.Settle(ctx); err != nil {
		s.w.t.Fatal(err)
	}
	if s.dead { // killed while it started
		return
	}
	if err := s.load(); err != nil {
		s.w.t.Fatal(err)
	}
	s.keeper.SetAPI(s)
}

func (s *server) load() (err error) {
	s.w.mu.Lock()
	defer s.w.mu.Unlock()
	s.loaded, err = s.keeper.config()
	return err
}

// Reload implements API.
func (s *server) Reload(context.Context) error {
	if err := s.w.call(s); err != nil {
		return err
	}
	return s.load()
}

// CaughtUp implements API.
func (s *server) CaughtUp(context.Context) error { return s.w.call(s) }

func (w *world) find(name string) *server {
	i := slices.IndexFunc(w.servers, func(s *server) bool { return s.name == name })
	if i < 0 {
		return nil
	}
	return w.servers[i]
}

// call is what happens at a call of a server.
func (w *world) call(s *server) error {
	w.mu.Lock()
	if s.dead {
		w.mu.Unlock()
		return errKilled
	}
	w.calls++
	killed := w.calls == w.kill
	if killed {
		s.dead = true
		s.end()
		w.pending = slices.DeleteFunc(w.pending, func(p write) bool { return p.by == s })
	}
	w.mu.Unlock()
	if !killed && !w.quiet && w.leader != nil && s.loaded != nil {
		w.traffic()
	}
	w.check()
	if killed {
		return errKilled
	}
	return nil
}

// traffic is what clients do meanwhile.
func (w *world) traffic() {
	w.mu.Lock()
	alive := slices.DeleteFunc(slices.Clone(w.servers), func(s *server) bool { return s.dead || s.loaded == nil })
	late := w.pending
	w.pending = nil
	w.writes++
	key := fmt.Sprintf("%sns/s%d", prefix, w.random.IntN(clusterSecrets+10)) // some are new
	again := write{by: alive[w.random.IntN(len(alive))], key: key, content: fmt.Sprint("changed ", w.writes)}
	slow := write{by: alive[w.random.IntN(len(alive))], key: fmt.Sprintf("%sns/new%d", prefix, w.writes), content: fmt.Sprint("new ", w.writes)}
	w.mu.Unlock()
	w.clientWrites(again)
	slow, err := w.encrypt(slow)
	if err != nil {
		w.fail(err)
	}
	w.mu.Lock()
	w.pending = append(w.pending, slow)
	w.mu.Unlock()
	for _, p := range late {
		if !p.by.dead {
			w.commit(p)
		}
	}
}

// clientWrites is a request that is carried out at once. It tries again if it is refused.
func (w *world) clientWrites(p write) {
	p, err := w.encrypt(p)
	if err != nil {
		w.fail(err)
		return
	}
	w.commit(p)
}

// encrypt is the first part of a write.
func (w *world) encrypt(p write) (write, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	p.revision = w.data[p.key].Revision
	value, err := p.by.loaded[0].write(context.Background(), []byte(p.content))
	p.value = value
	return p, err
}

// commit is the second part of a write, as datastore.Store carries it out.
func (w *world) commit(p write) {
	end, err := p.by.keeper.Guard([][]byte{p.value})
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil { // a client would get an error
		w.refused++
		return
	}
	defer end()
	if w.data[p.key].Revision != p.revision {
		return // somebody else has changed it
	}
	w.revision++
	w.data[p.key] = Item{Key: p.key, Value: p.value, Revision: w.revision}
	w.contents[p.key] = p.content
}

func (w *world) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.broken == nil {
		w.broken = fmt.Errorf("at call %d: %w", w.calls, err)
	}
}

// fileOf returns the configuration in a server's file. The caller holds checking.
func (w *world) fileOf(s *server) (configuration, error) {
	text, err := os.ReadFile(identity.EncryptionConfigFile(s.dir))
	if err != nil {
		return nil, err
	}
	c, known := w.files[string(text)]
	if !known {
		if c, err = parse(text); err != nil {
			return nil, err
		}
		w.files[string(text)] = c
	}
	return c, nil
}

// check checks that every server can read everything: with its file, and with what its API server has loaded.
func (w *world) check() {
	if w.copied {
		return
	}
	w.checking.Lock()
	defer w.checking.Unlock()
	w.mu.Lock()
	items, contents := maps.Clone(w.data), maps.Clone(w.contents)
	loaded := map[string]configuration{}
	for _, s := range w.servers {
		if !s.dead {
			loaded[s.name] = s.loaded
		}
	}
	w.mu.Unlock()
	for _, s := range w.servers {
		if s.keeper == nil {
			continue // not yet started
		}
		file, err := w.fileOf(s)
		if err != nil {
			w.fail(err)
			return
		}
		for what, c := range map[string]configuration{"file": file, "API server": loaded[s.name]} {
			if c == nil {
				continue
			}
			config := fmt.Sprint(c.ids())
			for key, item := range items {
				test := reading{key, item.Revision, config}
				if w.seen[test] || !strings.HasPrefix(key, prefix) {
					continue
				}
				w.seen[test] = true
				if got, err := c.read(context.Background(), item.Value); err != nil || string(got) != contents[key] {
					w.fail(fmt.Errorf("the %s of %s, with %s, reads %s as %q: %w", what, s.name, names(c.ids()), key, got, err))
					return
				}
			}
		}
	}
}

// view is the datastore as a server sees it.
type view struct {
	w *world
	s *server
}

func (v *view) Close() {}

func (v *view) Get(_ context.Context, key string) ([]byte, int64, int64, error) {
	if err := v.w.call(v.s); err != nil {
		return nil, 0, 0, err
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	i := v.w.data[key]
	return i.Value, i.Revision, v.w.revision, nil
}

func (v *view) Put(_ context.Context, key string, value []byte, revision int64) (bool, int64, error) {
	if bytes.Contains(value, []byte("secretbox")) || v.w.hasKey(value) {
		v.w.fail(fmt.Errorf("a key is in the datastore: %s", value))
	}
	if err := v.w.call(v.s); err != nil {
		return false, 0, err
	}
	written := v.w.put(Item{Key: key, Value: value, Revision: revision})
	// Killed after the write and before its answer.
	if err := v.w.call(v.s); err != nil {
		return false, 0, err
	}
	return written > 0, written, nil
}

// hasKey reports whether a value has a key of a server in it.
func (w *world) hasKey(value []byte) bool {
	w.checking.Lock()
	defer w.checking.Unlock()
	return slices.ContainsFunc(w.servers, func(s *server) bool {
		c, err := w.fileOf(s)
		return err == nil && slices.ContainsFunc(c, func(p provider) bool { return p.secret != "" && bytes.Contains(value, []byte(p.secret)) })
	})
}

func (w *world) put(i Item) int64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.data[i.Key].Revision != i.Revision {
		return 0
	}
	w.revision++
	i.Revision = w.revision
	w.data[i.Key] = i
	return w.revision
}

func (v *view) Count(_ context.Context, prefix string) (n int, err error) {
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	for key := range v.w.data {
		if strings.HasPrefix(key, prefix) {
			n++
		}
	}
	return n, nil
}

func (v *view) Page(_ context.Context, prefix, from string, limit int) (items []Item, next string, err error) {
	if err := v.w.call(v.s); err != nil {
		return nil, "", err
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	for _, key := range slices.Sorted(maps.Keys(v.w.data)) {
		if !strings.HasPrefix(key, prefix) || key < from {
			continue
		}
		if len(items) == limit {
			return items, key, nil
		}
		items = append(items, v.w.data[key])
	}
	return items, "", nil
}

func (v *view) Rewrite(_ context.Context, guard string, revision int64, items []Item) (bool, error) {
	if err := v.w.call(v.s); err != nil {
		return false, err
	}
	for _, i := range items {
		end, err := v.s.keeper.Guard([][]byte{i.Value})
		if err != nil {
			return false, err
		}
		end()
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	if v.w.data[guard].Revision != revision {
		return false, nil
	}
	for _, i := range items {
		if v.w.data[i.Key].Revision != i.Revision {
			return false, nil
		}
	}
	v.w.revision++
	for _, i := range items {
		i.Revision = v.w.revision
		v.w.data[i.Key] = i
	}
	return true, nil
}

func (v *view) Compact(context.Context) error {
	if err := v.w.call(v.s); err != nil {
		return err
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	v.w.compactions++
	return nil
}

func (v *view) Changed(context.Context, string, int64) (lifecycle.Wakeup, <-chan struct{}) {
	panic("not used here")
}

// links are how a server reaches the others.
type links struct{ w *world }

func (l links) reach(a address) (*server, error) {
	s := l.w.find(a.Name)
	if s.dead || s.away {
		return nil, errors.New("it does not answer")
	}
	return s, nil
}

func (l links) state(_ context.Context, of address) (state, error) {
	s, err := l.reach(of)
	if err != nil {
		return state{}, err
	}
	return s.keeper.state(), nil
}

func (l links) apply(ctx context.Context, to address, file []byte) (state, error) {
	l.w.link <- struct{}{}
	defer func() { <-l.w.link }()
	s, err := l.reach(to)
	if err != nil {
		return state{}, err
	}
	return s.keeper.apply(ctx, file)
}

func (w *world) cluster() Cluster {
	return Cluster{
		Members: func(context.Context) (names []string, err error) {
			for _, s := range w.servers {
				names = append(names, s.name)
			}
			return names, nil
		},
		APIs: func() map[string]string {
			apis := map[string]string{}
			for _, s := range w.servers {
				apis[s.name] = s.name
			}
			return apis
		},
	}
}

func (w *world) controller(s *server) *Controller {
	return &Controller{own: s.keeper, peers: links{w}, cluster: w.cluster(), prefix: prefix, log: slog.New(slog.DiscardHandler), now: time.Now, retry: retryDelay}
}

func (w *world) begin(op Operation) {
	w.t.Helper()
	a := &Administration{own: w.servers[len(w.servers)-1].keeper, peers: links{w}, cluster: w.cluster()}
	if err := a.Begin(w.t.Context(), op); err != nil && !errors.Is(err, errKilled) {
		w.t.Fatal(err)
	}
}

// finish has the leading server carry out the change until there is nothing to do. A server that was killed starts again after
// down steps; if it led, next leads.
func (w *world) finish(down int, next *server) {
	w.t.Helper()
	since := 0
	for steps := 0; ; steps++ {
		if steps > 60 {
			w.t.Fatalf("the change does not end: %+v", w.record())
		}
		for _, s := range w.servers {
			if !s.dead {
				continue
			}
			if s == w.leader && next != nil && !next.dead {
				w.leader = next
			}
			if since++; since > down {
				s.start()
				since = 0
			}
		}
		if w.leader.dead {
			continue
		}
		c := w.controller(w.leader)
		idle, err := c.step(w.t.Context(), &view{w, w.leader})
		if err != nil {
			c.wait(w.t.Context(), &view{w, w.leader}, err)
		}
		if idle && !slices.ContainsFunc(w.servers, func(s *server) bool { return s.dead }) {
			return
		}
	}
}

func (w *world) record() *record {
	w.mu.Lock()
	defer w.mu.Unlock()
	r, err := decodeRecord(w.data[recordKey].Value)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// ended checks that nothing is left of a change.
func (w *world) ended(op Operation) {
	w.t.Helper()
	w.kill = 0
	w.check()
	r := w.record()
	if w.broken != nil || r == nil || r.Stage != None || r.Operation != op {
		w.t.Fatalf("%v; the record is %+v", w.broken, r)
	}
	for _, s := range w.servers {
		file, err := s.keeper.config()
		if err != nil || !slices.Equal(file.ids(), r.Providers) || !slices.Equal(s.loaded.ids(), r.Providers) {
			w.t.Fatalf("%s has %v and uses %v, want %v (%v)", s.name, file.ids(), s.loaded.ids(), r.Providers, err)
		}
		for key, i := range w.data {
			if strings.HasPrefix(key, prefix) && !file[0].wrote(i.Value) {
				w.t.Fatalf("%s was not rewritten: %.40q", key, i.Value)
			}
		}
	}
	for _, dir := range w.servers {
		if left, err := filepath.Glob(filepath.Join(dir.dir, "*tmp*")); err != nil || len(left) > 0 {
			w.t.Fatalf("left over: %v, %v", left, err)
		}
	}
}
