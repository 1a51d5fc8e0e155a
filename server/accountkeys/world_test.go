package accountkeys

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"kedge/internal/lifecycle"
	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/peerrequests"
)

// errKilled is what a process gets that was killed at this call: whatever it does after it fails too.
var errKilled = errors.New("killed")

// world is a cluster: a datastore in memory, and servers with files and API servers. At each call of a server on the datastore or
// its API server all rules are checked, and the server may be killed.
type world struct {
	t       *testing.T
	servers []*node
	leader  *node
	kill    int           // at which call a server is killed; 0: at none
	link    chan struct{} // a server calls one other at a time, so that calls have an order
	secrets []string      // with tokens of an old key

	mu       sync.Mutex // guards the fields below
	calls    int
	value    []byte // of the record
	revision int64
	signed   map[string]bool // keys that have signed tokens, which must be accepted
	broken   error
	lax      bool // keys were lost, so that the rules do not hold
}

// node is a server of the world. It is its API server too.
type node struct {
	w      *world
	name   string
	dir    string
	keeper *Keeper
	loaded []string // of the API server; none: it has not started
	used   map[string]time.Time
	dead   bool
	end    func() // of its start
	away   bool   // cannot be reached
}

func newWorld(t *testing.T, servers int) *world {
	t.Helper()
	w := &world{t: t, link: make(chan struct{}, 1), signed: map[string]bool{}}
	key, err := pki.NewSigningKey()
	if err != nil {
		t.Fatal(err)
	}
	for i := range servers {
		n := &node{w: w, name: fmt.Sprint("s", i+1), dir: t.TempDir(), used: map[string]time.Time{}}
		n.put(key)
		w.servers = append(w.servers, n)
	}
	w.leader = w.servers[0]
	for _, n := range w.servers {
		n.start()
	}
	return w
}

// put writes a server's file.
func (n *node) put(keys ...pki.SigningKey) {
	n.w.t.Helper()
	text, err := pki.EncodeSigningKeys(keys)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(identity.AccountKeysFile(n.dir)), 0o700)
	}
	if err == nil {
		err = os.WriteFile(identity.AccountKeysFile(n.dir), text, 0o600)
	}
	if err != nil {
		n.w.t.Fatal(err)
	}
}

// start starts a server, also after it was killed.
func (n *node) start() {
	ctx, end := context.WithCancel(n.w.t.Context())
	defer end()
	n.w.mu.Lock()
	n.dead, n.end, n.loaded = false, end, nil
	n.w.mu.Unlock()
	n.keeper = NewKeeper(n.name, n.dir, func() (Store, error) { return &view{n.w, n}, nil }, n, NewClient(nil), n.w.members, slog.New(slog.DiscardHandler))
	n.keeper.fetch = func(_ context.Context, from peerrequests.Address) ([]byte, error) {
		other, err := links{n.w}.reach(from)
		if err != nil {
			return nil, err
		}
		return other.keeper.file()
	}
	n.keeper.Settle(ctx)
}

// Use implements API.
func (n *node) Use(keys []pki.SigningKey) error {
	if err := n.w.call(n); err != nil {
		return err
	}
	n.w.mu.Lock()
	n.loaded = ids(keys)
	n.w.mu.Unlock()
	return n.w.call(n)
}

// LastUse implements API.
func (n *node) LastUse(id string) time.Time { return n.used[id] }

// call is what happens at a call of a server.
func (w *world) call(n *node) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n.dead {
		return errKilled
	}
	w.calls++
	if w.calls == w.kill {
		n.dead = true
		n.end()
	}
	w.check()
	if n.dead {
		return errKilled
	}
	return nil
}

// check checks that a token that any server signs is accepted by all, and that those of before are accepted until the old key is
// dropped. The caller holds mu.
func (w *world) check() {
	r, err := decodeRecord(w.value)
	if err != nil {
		w.broken = err
		return
	}
	if r != nil && r.Stage == Drop {
		w.signed = map[string]bool{r.To: true}
	}
	for _, n := range w.servers {
		if n.dead || n.loaded == nil {
			continue
		}
		w.signed[n.loaded[0]] = true
	}
	for _, n := range w.servers {
		for id := range w.signed {
			if !n.dead && n.loaded != nil && !slices.Contains(n.loaded, id) && !w.lax && w.broken == nil {
				w.broken = fmt.Errorf("at call %d, %s accepts %v, and not %s; the record is %s", w.calls, n.name, n.loaded, id, w.value)
			}
		}
	}
}

// view is the datastore as a server sees it.
type view struct {
	w *world
	n *node
}

func (v *view) Close() {}

func (v *view) Get(context.Context, string) ([]byte, int64, int64, error) {
	if err := v.w.call(v.n); err != nil {
		return nil, 0, 0, err
	}
	v.w.mu.Lock()
	defer v.w.mu.Unlock()
	return v.w.value, v.w.revision, v.w.revision, nil
}

func (v *view) Put(_ context.Context, _ string, value []byte, revision int64) (bool, int64, error) {
	if err := v.w.call(v.n); err != nil {
		return false, 0, err
	}
	v.w.mu.Lock()
	if v.w.revision != revision {
		v.w.mu.Unlock()
		return false, 0, nil
	}
	v.w.revision++
	v.w.value, revision = value, v.w.revision
	v.w.mu.Unlock()
	// Killed after the write and before its answer.
	return true, revision, v.w.call(v.n)
}

func (v *view) Changed(context.Context, string, int64) (lifecycle.Wakeup, <-chan struct{}) {
	panic("not used here")
}

// links are how a server reaches the others.
type links struct{ w *world }

func (l links) reach(a peerrequests.Address) (*node, error) {
	for _, n := range l.w.servers {
		if n.name == a.Name && !n.dead && !n.away {
			return n, nil
		}
	}
	return nil, errors.New("it does not answer")
}

func (l links) state(_ context.Context, of peerrequests.Address) (state, error) {
	n, err := l.reach(of)
	if err != nil {
		return state{}, err
	}
	return n.keeper.state(), nil
}

func (l links) apply(ctx context.Context, to peerrequests.Address, file []byte) (state, error) {
	l.w.link <- struct{}{}
	defer func() { <-l.w.link }()
	n, err := l.reach(to)
	if err != nil {
		return state{}, err
	}
	return n.keeper.apply(ctx, file)
}

func (w *world) members(context.Context) (names []string, err error) {
	for _, n := range w.servers {
		names = append(names, n.name)
	}
	return names, nil
}

func (w *world) cluster() Cluster {
	return Cluster{Members: w.members, APIs: func() map[string]string {
		apis := map[string]string{}
		for _, n := range w.servers {
			apis[n.name] = n.name
		}
		return apis
	}}
}

func (w *world) controller(n *node) *Controller {
	return &Controller{own: n.keeper, peers: links{w}, cluster: w.cluster(), log: slog.New(slog.DiscardHandler), now: time.Now, retry: retryDelay}
}

func (w *world) administration() *Administration {
	return &Administration{own: w.servers[len(w.servers)-1].keeper, peers: links{w}, cluster: w.cluster(), now: time.Now,
		secrets: func(context.Context, []string) ([]string, error) { return w.secrets, nil }}
}

// carryOut has the leading server carry out the change until there is nothing to do. A server that was killed starts again after
// down steps; if it led, next leads.
func (w *world) carryOut(down int, next *node) {
	w.t.Helper()
	since := 0
	for steps := 0; ; steps++ {
		if steps > 60 {
			w.t.Fatalf("the change does not go on: %+v", w.record())
		}
		for _, n := range w.servers {
			if !n.dead {
				continue
			}
			if n == w.leader && next != nil && !next.dead {
				w.leader = next
			}
			if since++; since > down {
				n.start()
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
		if idle && !slices.ContainsFunc(w.servers, func(n *node) bool { return n.dead }) {
			return
		}
	}
}

func (w *world) record() *record {
	w.mu.Lock()
	defer w.mu.Unlock()
	r, err := decodeRecord(w.value)
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// reached checks that a stage was reached and every server has what it wants.
func (w *world) reached(stage Stage) {
	w.t.Helper()
	w.kill = 0
	w.mu.Lock()
	w.check()
	w.mu.Unlock()
	r := w.record()
	if w.broken != nil || r == nil || r.Stage != stage {
		w.t.Fatalf("%v; the record is %+v", w.broken, r)
	}
	for _, n := range w.servers {
		file, err := n.keeper.keys()
		if err != nil || !slices.Equal(ids(file), r.wanted()) || !slices.Equal(n.loaded, r.wanted()) {
			w.t.Fatalf("%s has %v and uses %v, want %v (%v)", n.name, ids(file), n.loaded, r.wanted(), err)
		}
		err = filepath.WalkDir(n.dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && !d.IsDir() && path != identity.AccountKeysFile(n.dir) {
				err = fmt.Errorf("%s is left over", path)
			}
			return err
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
}
