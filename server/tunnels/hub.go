package tunnels

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"kedge/internal/joining"
	"kedge/internal/tunnel"
)

// Why there is no connection to a node.
var (
	ErrNotConnected = errors.New("the node has no tunnel to this server")
	ErrOnlyKubelet  = errors.New("of a node only the kubelet is reached")
)

// Why a session ends that was in order.
var (
	errReplaced = errors.New("the node has connected again and again")
	errRevoked  = errors.New("the node's name belongs to another key, or to none")
	errStopping = errors.New("this server stops")
)

// Door knows who comes. It is [*join.Service].
type Door interface {
	// Identify returns the node that a request comes from and its key's fingerprint.
	Identify(r *http.Request) (node, key string, err error)
	// Refuse answers a request with why it is refused.
	Refuse(w http.ResponseWriter, r *http.Request, err error)
}

// Keys knows which key each node has. It is [*join.Gate].
type Keys interface {
	// Keys returns the fingerprints of all nodes' keys, by name, which are not to be
	// changed, and nil before they are known; and a channel that is closed when they
	// are others.
	Keys() (keys map[string]string, changed <-chan struct{})
}

// Nodes knows the nodes of the cluster.
type Nodes interface {
	// Owner is the name of the node that the range of pods with this address belongs
	// to, and empty when it is nobody's.
	Owner(a netip.Addr) string
	// Names are all nodes' names.
	Names() []string
}

// Config is everything that the hub is told.
type Config struct {
	Door Door
	Keys Keys

	// OwnNode is the name of the node in this process. Its kubelet, and its data path
	// to pods and services, are used directly. Empty where there is none.
	OwnNode string
	// PodRanges and ServiceRanges are the cluster's. What is in neither is reached
	// from this machine directly, as by any program.
	PodRanges, ServiceRanges []netip.Prefix
	// ForeignPods says that another plug-in gives pods their addresses, which then are
	// not of the ranges that the nodes have in the API.
	ForeignPods bool
}

// Hub holds the sessions of the nodes and connects through them. It is the component
// that ends those of nodes that have lost their name.
type Hub struct {
	cfg  Config
	log  *slog.Logger
	opts tunnel.Options

	mu       sync.Mutex                // guards what follows
	sessions map[netip.Addr][]*session // by joining.NodeAddress, the newest last; see add
	changed  chan struct{}             // closed, and made anew, when a session has come
	stopped  bool
	nodes    Nodes          // nil: not known yet
	own      netip.AddrPort // of this process' kubelet; the zero value: not known yet
}

// session is one node's tunnel.
type session struct {
	node, key string
	since     time.Time
	opener    *tunnel.Opener
}

// New makes a hub without sessions.
func New(cfg Config, log *slog.Logger) *Hub {
	return &Hub{cfg: cfg, log: log, opts: tunnel.DefaultOptions(), sessions: map[netip.Addr][]*session{}, changed: make(chan struct{})}
}

// SetNodes tells which nodes there are. It must be called before the API serves.
func (h *Hub) SetNodes(n Nodes) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nodes = n
}

// SetKubelet tells where the kubelet of this process listens.
func (h *Hub) SetKubelet(a netip.AddrPort) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.own = a
}

// Name implements lifecycle.Component.
func (h *Hub) Name() string { return "tunnels" }

// Run implements lifecycle.Component. It is ready at once; nodes may have connected
// before. All sessions have ended when it returns, and no new ones are taken.
func (h *Hub) Run(ctx context.Context, ready func()) error {
	ready()
	for ctx.Err() == nil {
		keys, changed := h.cfg.Keys.Keys()
		h.keep(keys)
		select {
		case <-ctx.Done():
		case <-changed:
		}
	}
	h.mu.Lock()
	h.stopped = true
	all := h.all()
	h.mu.Unlock()
	for _, s := range all {
		s.opener.Close(errStopping)
	}
	return nil
}

// all are the sessions. Caller holds mu.
func (h *Hub) all() []*session {
	out := make([]*session, 0, len(h.sessions))
	for _, of := range h.sessions {
		out = append(out, of...)
	}
	return out
}

// keep ends the sessions of keys that are not their node's any more; nil: nothing is
// known of them.
func (h *Hub) keep(keys map[string]string) {
	if keys == nil {
		return
	}
	h.mu.Lock()
	all := h.all()
	h.mu.Unlock()
	for _, s := range all {
		if keys[s.node] != s.key {
			s.opener.Close(errRevoked)
		}
	}
}

// ServeHTTP takes the connection of a node for its tunnel.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := tunnel.CheckRequest(r); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h.mu.Lock()
	stopped := h.stopped
	h.mu.Unlock()
	if stopped {
		// Who has just lost its session comes back at once. To ask who it is can take
		// seconds without a majority of servers, for which the API would not stop.
		http.Error(w, errStopping.Error(), http.StatusServiceUnavailable)
		return
	}
	_, changed := h.cfg.Keys.Keys()
	node, key, err := h.cfg.Door.Identify(r)
	if err != nil {
		h.cfg.Door.Refuse(w, r, err)
		return
	}
	conn, err := tunnel.Accept(w)
	if err != nil {
		h.log.Warn("a node's tunnel was not begun", "node", node, "err", err)
		return
	}
	opener, err := tunnel.NewOpener(conn, h.opts, h.log)
	if err != nil {
		h.log.Warn("a node's tunnel was not begun", "node", node, "err", err)
		return
	}
	h.add(&session{node: node, key: key, since: time.Now(), opener: opener}, r.RemoteAddr)
	select {
	case <-changed:
		// Run may have looked for sessions of lost names before this one was there. Keys
		// that have not changed are not asked: they may not have a new node's yet.
		keys, _ := h.cfg.Keys.Keys()
		h.keep(keys)
	default:
	}
}

// maxSessions is how many sessions a node has at a time.
const maxSessions = 4

// add makes s the node's session: the newest is the one whose other end is alive for
// certain. Older ones stay until they end. A server that has several addresses, or is
// behind a balancer too, is connected to more than once, and if one of these ended
// the other they would take turns for ever.
func (h *Hub) add(s *session, from string) {
	at := joining.NodeAddress(s.node)
	h.mu.Lock()
	if h.stopped {
		h.mu.Unlock()
		s.opener.Close(errStopping)
		return
	}
	of := append(slices.Clone(h.sessions[at]), s)
	var surplus *session
	if len(of) > maxSessions {
		surplus, of = of[0], of[1:]
	}
	h.sessions[at] = of
	close(h.changed)
	h.changed = make(chan struct{})
	h.mu.Unlock()
	if surplus != nil {
		surplus.opener.Close(errReplaced)
	}
	h.log.Info("a node's tunnel is up", "node", s.node, "source", from)
	go func() {
		<-s.opener.Done()
		h.forget(at, s)
		h.log.Info("a node's tunnel has ended", "node", s.node, "after", time.Since(s.since).Round(time.Second), "cause", s.opener.Err())
	}()
}

// newest is the session to use for the node at an address; nil: it has none. The
// channel is closed when one has come.
func (h *Hub) newest(at netip.Addr) (*session, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if of := h.sessions[at]; len(of) > 0 {
		return of[len(of)-1], h.changed
	}
	return nil, h.changed
}

// Connected are the names of the nodes that have a session, sorted.
func (h *Hub) Connected() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []string
	for _, of := range h.sessions {
		out = append(out, of[0].node)
	}
	slices.Sort(out)
	return out
}

// Missing reports whether the cluster has nodes without a session, this process' own
// aside.
func (h *Hub) Missing() bool {
	h.mu.Lock()
	nodes := h.nodes
	h.mu.Unlock()
	if nodes == nil {
		return false
	}
	return slices.ContainsFunc(nodes.Names(), func(name string) bool { return name != h.cfg.OwnNode && !h.connected(name) })
}

// Describe implements lifecycle.Describer.
func (h *Hub) Describe() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.sessions) == 0 {
		return ""
	}
	return fmt.Sprintf("%d connected", len(h.sessions))
}

// patience is how long a node without a session is waited for: as long as one that
// has lost its connection takes to come back.
const patience = 3 * time.Second

// through opens a connection through the session of the node at an address, and waits
// for one if there is none.
func (h *Hub) through(ctx context.Context, at netip.Addr, d tunnel.Destination) (net.Conn, error) {
	giveUp := time.NewTimer(patience)
	defer giveUp.Stop()
	for {
		s, changed := h.newest(at)
		if s != nil {
			conn, err := s.opener.Dial(ctx, d)
			if err == nil {
				return conn, nil
			}
			select {
			case <-s.opener.Done(): // nothing was sent yet: another session will do
				h.forget(at, s)
				continue
			default:
				return nil, fmt.Errorf("%s of node %s: %w", d, s.node, err)
			}
		}
		select {
		case <-changed:
		case <-giveUp.C:
			return nil, fmt.Errorf("%w: %s; see whether kedge runs there, and what \"kedge status\" says of its tunnel", ErrNotConnected, h.nameOf(at))
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// forget drops a session that has ended.
func (h *Hub) forget(at netip.Addr, s *session) {
	h.mu.Lock()
	defer h.mu.Unlock()
	of := slices.DeleteFunc(slices.Clone(h.sessions[at]), func(other *session) bool { return other == s })
	if len(of) == 0 {
		delete(h.sessions, at)
		return
	}
	h.sessions[at] = of
}

// nameOf is for messages.
func (h *Hub) nameOf(at netip.Addr) string {
	h.mu.Lock()
	nodes := h.nodes
	h.mu.Unlock()
	if nodes != nil {
		for _, name := range nodes.Names() {
			if joining.NodeAddress(name) == at {
				return name
			}
		}
	}
	return "a node that the cluster does not know"
}
