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

// Reasons why there is no connection to a node.
var (
	ErrNotConnected = errors.New("the node has no tunnel to this server")
	ErrOnlyKubelet  = errors.New("only the kubelet port of a node is reachable")
)

// Reasons for closing a working session.
var (
	errReplaced = errors.New("replaced by a newer connection of the node")
	errRevoked  = errors.New("the node's key was replaced or removed")
	errStopping = errors.New("this server is stopping")
)

// Authenticator authenticates the connections of nodes. It is implemented by [*join.Service].
type Authenticator interface {
	// Identify returns the node of a request and the fingerprint of its key.
	Identify(r *http.Request) (node, key string, err error)
	// Refuse answers a request with the reason of the refusal.
	Refuse(w http.ResponseWriter, r *http.Request, err error)
}

// Keys provides the keys of the nodes. It is implemented by [*join.Gate].
type Keys interface {
	// Keys returns the fingerprints of the nodes' keys by name, or nil before they are known, and a channel
	// that is closed when they change. Callers must not change the map.
	Keys() (keys map[string]string, changed <-chan struct{})
}

// Nodes provides the nodes of the cluster.
type Nodes interface {
	// Owner returns the name of the node whose pod range contains the address, or "" if there is none.
	Owner(a netip.Addr) string
	// Names returns the names of all nodes.
	Names() []string
}

// Config has the dependencies and settings of the hub.
type Config struct {
	Authenticator Authenticator
	Keys          Keys

	// OwnNode is the name of the node in this process, whose kubelet and data path are used directly. It is
	// empty if there is none.
	OwnNode string
	// OwnKubelet is the address on which the kubelet of that node listens.
	OwnKubelet netip.AddrPort
	// PodRanges and ServiceRanges are the cluster's ranges. Other addresses are reached directly from this
	// machine.
	PodRanges, ServiceRanges []netip.Prefix
	// ForeignPods means that a foreign CNI plugin assigns pod addresses, which are then not in the nodes' pod
	// ranges.
	ForeignPods bool
}

// Hub has the sessions of the nodes and opens connections through them. As a component it closes the sessions
// of nodes whose keys were replaced or removed.
type Hub struct {
	cfg  Config
	log  *slog.Logger
	opts tunnel.Options

	mu       sync.Mutex                // guards the fields below
	sessions map[netip.Addr][]*session // by joining.NodeAddress, the newest last; see add
	changed  chan struct{}             // closed and replaced when a session was added
	stopped  bool
	nodes    Nodes // nil: not known yet
}

// session is one node's tunnel.
type session struct {
	node, key string
	since     time.Time
	opener    *tunnel.Opener
}

// New returns a hub without sessions.
func New(cfg Config, log *slog.Logger) *Hub {
	return &Hub{cfg: cfg, log: log, opts: tunnel.DefaultOptions(), sessions: map[netip.Addr][]*session{}, changed: make(chan struct{})}
}

// SetNodes sets the source of the cluster's nodes. It must be called before the API serves.
func (h *Hub) SetNodes(n Nodes) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nodes = n
}

// Name implements lifecycle.Component.
func (h *Hub) Name() string { return "tunnels" }

// Run implements lifecycle.Component. It calls ready at once; nodes may have connected before. When it returns,
// all sessions are closed, and new sessions are refused.
func (h *Hub) Run(ctx context.Context, ready func()) error {
	ready()
	for ctx.Err() == nil {
		keys, changed := h.cfg.Keys.Keys()
		h.closeRevoked(keys)
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

// all returns all sessions. The caller holds mu.
func (h *Hub) all() []*session {
	out := make([]*session, 0, len(h.sessions))
	for _, of := range h.sessions {
		out = append(out, of...)
	}
	return out
}

// closeRevoked closes the sessions of keys that are not their node's any more. If keys is nil, the keys are unknown and
// it does nothing.
func (h *Hub) closeRevoked(keys map[string]string) {
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

// ServeHTTP accepts a node's connection for its tunnel.
func (h *Hub) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if err := tunnel.CheckRequest(r); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	h.mu.Lock()
	stopped := h.stopped
	h.mu.Unlock()
	if stopped {
		// A node that has just lost its session connects again at once. Without a majority of servers its
		// authentication can take seconds, which would delay the stop of the API.
		http.Error(w, errStopping.Error(), http.StatusServiceUnavailable)
		return
	}
	_, changed := h.cfg.Keys.Keys()
	node, key, err := h.cfg.Authenticator.Identify(r)
	if err != nil {
		h.cfg.Authenticator.Refuse(w, r, err)
		return
	}
	conn, err := tunnel.Accept(w)
	if err != nil {
		h.log.Warn("a node's tunnel could not be established", "node", node, "err", err)
		return
	}
	opener, err := tunnel.NewOpener(conn, h.opts, h.log)
	if err != nil {
		h.log.Warn("a node's tunnel could not be established", "node", node, "err", err)
		return
	}
	h.add(&session{node: node, key: key, since: time.Now(), opener: opener}, r.RemoteAddr)
	select {
	case <-changed:
		// Run may have closed the sessions of removed keys before this session was added. If the keys have not
		// changed, they are not checked again: they may not include a new node's key yet.
		keys, _ := h.cfg.Keys.Keys()
		h.closeRevoked(keys)
	default:
	}
}

// maxSessions is the maximum number of sessions of a node.
const maxSessions = 4

// add adds a session. The newest session is used, because its other end is certainly alive. Older sessions stay
// until they end: a node connects several times to a server with several addresses, or behind a load balancer,
// and if one of these connections replaced the other, they would alternate for ever.
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
	h.log.Info("connected the tunnel of a node", "node", s.node, "source", from)
	go func() {
		<-s.opener.Done()
		h.forget(at, s)
		h.log.Info("a node's tunnel has ended", "node", s.node, "after", time.Since(s.since).Round(time.Second), "err", s.opener.Err())
	}()
}

// newest returns the session to use for the node at an address, or nil if it has none. The channel is closed
// when a session was added.
func (h *Hub) newest(at netip.Addr) (*session, <-chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if of := h.sessions[at]; len(of) > 0 {
		return of[len(of)-1], h.changed
	}
	return nil, h.changed
}

// Connected returns the sorted names of the nodes that have a session.
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

// Missing reports whether the cluster has nodes without a session, except this process's own node.
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

// patience is how long a connection waits for a node without a session: the time in which a node reconnects.
const patience = 3 * time.Second

// through opens a connection through the session of the node at an address, and waits for a session if there is
// none.
func (h *Hub) through(ctx context.Context, at netip.Addr, d tunnel.Destination) (net.Conn, error) {
	timeout := time.NewTimer(patience)
	defer timeout.Stop()
	for {
		s, changed := h.newest(at)
		if s != nil {
			conn, err := s.opener.Dial(ctx, d)
			if err == nil {
				return conn, nil
			}
			select {
			case <-s.opener.Done(): // nothing was sent yet, so another session can be used
				h.forget(at, s)
				continue
			default:
				return nil, fmt.Errorf("%s of node %s: %w", d, s.node, err)
			}
		}
		select {
		case <-changed:
		case <-timeout.C:
			return nil, fmt.Errorf("%w: %s; check that kedge runs there, and the tunnel's state in \"kedge status\"", ErrNotConnected, h.nameOf(at))
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// forget removes a session that has ended.
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

// nameOf returns the name of a node for messages.
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
	return "a node that is not in the cluster"
}
