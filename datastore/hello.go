package datastore

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
)

// A hello is what members tell each other all the time: I am this one, I am here now, and this is where I
// believe the others to be. It is a request on the peer port, so both sides have proved that they are members.
// The answer says in addition who is at that address, which is how a member is told from another one that has
// got its old address.
const helloPath = "/kedge/hello"

type hello struct {
	Cluster string `json:"cluster"`
	From    Peer   `json:"from"`
	Others  []Peer `json:"others,omitempty"`

	Leader  string `json:"leader,omitempty"` // ID of the member that From follows
	Applied uint64 `json:"applied,omitempty"`

	// Removed tells whoever asked that it was removed from the cluster.
	Removed bool `json:"removed,omitempty"`
}

const (
	// helloEvery is how often a member that answers is asked again, and lookEvery one that does not.
	helloEvery, lookEvery = 2 * time.Second, time.Second
	// helloTime is how long one may take.
	helloTime = 1500 * time.Millisecond
	// missingAfter is for how long a member may be silent before it counts as unreachable.
	missingAfter = 5 * time.Second
	// maxHello bounds a hello in bytes.
	maxHello = 64 << 10
	// maxHints bounds the addresses that strangers can make us try for one member.
	maxHints = 4
)

// reach is what is known of the life of another member.
type reach struct {
	seen    time.Time // zero if never
	leader  string    // whom it follows, by ID
	applied uint64
}

// alive reports whether the member answers.
func (r reach) alive(now time.Time) bool {
	return !r.seen.IsZero() && now.Sub(r.seen) < missingAfter
}

// way is the way to one other member: it finds out at which of its addresses the member is, keeps watching it
// there, and joins raft's connections to it.
type way struct {
	mesh    *mesh
	id      string
	splice  *splice
	kicked  chan struct{}
	started time.Time

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu     sync.Mutex       // guards what follows
	at     netip.AddrPort   // where it answered last; not valid while it is not known
	found  chan struct{}    // closed when at becomes valid
	looked bool             // everywhere, once, so that where it is not found it is not waited for
	hints  []netip.AddrPort // where it may be besides the book's addresses
	last   reach
}

var errNotFound = errors.New("the member does not answer")

func startWay(m *mesh, p Peer) *way {
	w := &way{mesh: m, id: p.ID, kicked: make(chan struct{}, 1), found: make(chan struct{}), started: time.Now()}
	w.ctx, w.cancel = context.WithCancel(m.ctx)
	listen := func(a netip.Addr) (net.Listener, error) { return m.net.listenVirtual(a, m.from) }
	w.splice = startSplice(p.address(), m.log, listen, w.dial)
	w.wg.Go(w.run)
	return w
}

func (w *way) close() {
	w.cancel()
	w.splice.close()
	w.wg.Wait()
}

func (w *way) kick() {
	select {
	case w.kicked <- struct{}{}:
	default:
	}
}

// hint is an address from which somebody claimed to be this member.
func (w *way) hint(a netip.AddrPort) {
	w.mu.Lock()
	if !slices.Contains(w.hints, a) {
		w.hints = append(w.hints, a)
		if len(w.hints) > maxHints {
			w.hints = w.hints[1:]
		}
	}
	w.mu.Unlock()
	w.kick()
}

func (w *way) reach() reach {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last
}

// missing reports whether the member has not been heard of for long enough to look for it elsewhere.
func (w *way) missing(now time.Time) bool {
	seen := w.reach().seen
	if seen.IsZero() {
		seen = w.started
	}
	return now.Sub(seen) > missingAfter
}

// dial connects raft to the member, where it is known to be. In the first moments it waits until that is found out;
// later raft tries often enough by itself.
func (w *way) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	w.mu.Lock()
	at, found, looked := w.at, w.found, w.looked
	w.mu.Unlock()
	if !at.IsValid() {
		if looked {
			return nil, errNotFound
		}
		select {
		case <-found:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		w.mu.Lock()
		at = w.at
		w.mu.Unlock()
	}
	c, err := w.mesh.net.dial(ctx, at)
	if err != nil {
		w.kick()
		return nil, err
	}
	return c, nil
}

func (w *way) run() {
	was := false
	for w.ctx.Err() == nil {
		next := helloEvery
		if !w.look() {
			next = lookEvery
		}
		if is := w.reach().alive(time.Now()); is != was && w.ctx.Err() == nil {
			was = is
			w.tell(is)
		}
		timer := time.NewTimer(next)
		select {
		case <-w.ctx.Done():
		case <-timer.C:
		case <-w.kicked:
			// Whatever was kicked for may take a moment, and nobody shall make us spin.
			sleep(w.ctx, 50*time.Millisecond)
		}
		timer.Stop()
	}
}

// tell logs that the member has come or gone.
func (w *way) tell(alive bool) {
	w.mu.Lock()
	at := w.at
	w.mu.Unlock()
	p, _ := w.mesh.book.other(w.id)
	if alive {
		w.mesh.log.Info("member of the datastore answers", "name", p.Name, "member", w.id, "at", at)
	} else {
		w.mesh.log.Warn("member of the datastore does not answer", "name", p.Name, "member", w.id)
	}
}

// look asks the member where it was last, and if it is not there, everywhere. It reports whether it was found.
func (w *way) look() bool {
	p, ok := w.mesh.book.other(w.id)
	if !ok {
		return false
	}
	w.mu.Lock()
	at, places := w.at, append(slices.Clone(p.Addresses), w.hints...)
	w.mu.Unlock()
	// Where it says it is not any more, nothing but a long silence is to be expected.
	if at.IsValid() && slices.Contains(places, at) && w.ask(at) {
		return true
	}
	// All at once: most lead nowhere, and take their time over it.
	var wg sync.WaitGroup
	for _, a := range places {
		if a.IsValid() && a != at {
			wg.Go(func() { w.ask(a) })
		}
	}
	wg.Wait()

	w.mu.Lock()
	defer w.mu.Unlock()
	w.looked = true
	if w.at.IsValid() && w.at == at && !w.last.alive(time.Now()) {
		// It is not there any more, or this machine is cut off: connections that hang would keep raft waiting.
		w.at, w.found = netip.AddrPort{}, make(chan struct{})
		w.splice.cut()
	}
	return w.at.IsValid() && w.at != at
}

// ask reports whether the member is at the address.
func (w *way) ask(at netip.AddrPort) bool {
	answer, err := w.mesh.hello(w.ctx, at)
	if err != nil || answer.From.ID != w.id {
		return false
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.last = reach{seen: time.Now(), leader: answer.Leader, applied: answer.Applied}
	// Of several that answer the first is kept, as long as it answers.
	if !w.at.IsValid() {
		w.at = at
		close(w.found)
	} else if w.at != at {
		w.at = at
		w.splice.cut()
		w.mesh.log.Info("member of the datastore has moved", "name", answer.From.Name, "member", w.id, "to", at)
	}
	return true
}

// hello says where we are to whoever is at the address, and returns what it says.
func (m *mesh) hello(ctx context.Context, at netip.AddrPort) (hello, error) {
	body, err := json.Marshal(m.ownHello())
	if err != nil {
		return hello{}, err
	}
	data, _, err := m.request(ctx, http.MethodPost, at, helloPath, body)
	if err != nil {
		return hello{}, err
	}
	var answer hello
	if err := json.Unmarshal(data, &answer); err != nil {
		return hello{}, err
	}
	if answer.Cluster != m.book.get().Cluster {
		return hello{}, errors.New("another cluster's")
	}
	if answer.Removed {
		m.noteRemoved()
	}
	m.learn(append(answer.Others, answer.From))
	return answer, nil
}

// request makes one request to the peer port at an address.
func (m *mesh) request(ctx context.Context, method string, at netip.AddrPort, path string, body []byte) ([]byte, http.Header, error) {
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, "https://"+hostOf(at)+path, bytes.NewReader(body))
	if err != nil {
		return nil, nil, err
	}
	resp, err := m.client.Do(r)
	if err != nil {
		return nil, nil, err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxHello))
	if err != nil {
		return nil, nil, err
	}
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("%s at %v: %s", path, at, resp.Status)
	}
	return data, resp.Header, nil
}

func (m *mesh) ownHello() hello {
	c := m.book.get()
	h := hello{Cluster: c.Cluster, From: c.Self, Others: c.Others}
	if server := m.server.Load(); server != nil {
		h.Applied = server.AppliedIndex()
		if leader := server.Leader(); leader != 0 {
			h.Leader = leader.String()
		}
	}
	return h
}

func (m *mesh) answerHello(w http.ResponseWriter, r *http.Request) {
	var asked hello
	if err := json.NewDecoder(io.LimitReader(r.Body, maxHello)).Decode(&asked); err != nil {
		http.Error(w, "not a hello", http.StatusBadRequest)
		return
	}
	answer := m.ownHello()
	if asked.Cluster != answer.Cluster {
		http.Error(w, "this is another cluster", http.StatusConflict)
		return
	}
	if id, err := parseID(asked.From.ID); err == nil {
		if server := m.server.Load(); server != nil && server.IsIDRemoved(uint64(id)) {
			answer.Removed = true
		}
	}
	if !answer.Removed {
		m.learn(append(asked.Others, asked.From))
		// It is alive: if we do not know where, now is the time to look.
		if w := m.way(asked.From.ID); w != nil && !w.reach().alive(time.Now()) {
			w.kick()
		}
	}
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(answer); err != nil {
		m.log.Debug("answer to a hello", "err", err)
	}
}

// newClient returns a client for hellos. It keeps one connection to each address open. Addresses are written
// into the host of a URL by hostOf, because a zone cannot be.
func (m *mesh) newClient(c *tls.Config) *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     c,
			TLSHandshakeTimeout: helloTime,
			IdleConnTimeout:     5 * helloEvery,
			MaxIdleConnsPerHost: 1,
			DialContext: func(ctx context.Context, _, host string) (net.Conn, error) {
				at, err := parseHost(host)
				if err != nil {
					return nil, err
				}
				return m.net.dial(ctx, at)
			},
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func hostOf(at netip.AddrPort) string {
	data, err := at.MarshalBinary()
	if err != nil {
		panic(err) // it has no errors
	}
	return hex.EncodeToString(data)
}

func parseHost(host string) (netip.AddrPort, error) {
	name, _, err := net.SplitHostPort(host)
	if err != nil {
		return netip.AddrPort{}, err
	}
	data, err := hex.DecodeString(name)
	if err != nil {
		return netip.AddrPort{}, err
	}
	var at netip.AddrPort
	return at, at.UnmarshalBinary(data)
}

func parseID(s string) (types.ID, error) { return types.IDFromString(s) }
