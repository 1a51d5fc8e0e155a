package peers

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/etcdhttp"
	"go.etcd.io/etcd/server/v3/etcdserver/api/rafthttp"
	"go.uber.org/zap"
)

// Mesh connects this member with all others: one peer link to each, and the peer port for theirs.
//
//	etcd's raft ──► loopback address of B ──loopback proxy──► address of B ──► B's peer port ──► B's raft
//	                                   └────────── TLS from end to end ──────────┘
//
// Raft knows only the loopback addresses, which never change; the address book maps them to the current addresses of the
// machines. So a machine that moves needs no decision of a majority, and all machines may move at once.
//
// The mesh opens once: before etcd if the store has other members, or at the first admission. A store that stays alone
// never opens it, and listens nowhere.
type Mesh struct {
	cfg    Config
	log    *slog.Logger
	book   *AddressBook
	net    Network
	source netip.Addr // see SetSource

	// leaderless reports whether this member knows no leader. Discovery announces itself only then.
	leaderless func() bool

	server      atomic.Pointer[etcdserver.EtcdServer] // nil before Attach
	etcdHandler atomic.Pointer[http.Handler]          // etcd's handler of the peer port; nil before Attach and after Detach
	inFlight    sync.WaitGroup                        // requests that must end before etcd is stopped

	removedOnce sync.Once
	removed     chan struct{} // closed when another member answers that this one was removed

	ctx    context.Context // ends with Close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu         sync.Mutex // guards the fields below
	isOpen     bool
	opened     chan struct{} // closed by Open
	tls        *tls.Config   // for connections to other members
	client     *http.Client  // for heartbeats
	listener   net.Listener
	httpServer *http.Server
	links      map[string]*peerLink // to all other members, by ID
}

// ErrNoPort means that Config has no port, so that the store can have only one member.
var ErrNoPort = errors.New("this datastore has no peer port, so it cannot have other members")

// Network is the network that the members use. Tests replace it with one whose links they can cut.
type Network interface {
	Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// ListenLoopback listens on the loopback address a of another member, for connections of this member's raft, which
	// come from the address from.
	ListenLoopback(a, from netip.Addr) (net.Listener, error)
}

// KernelNetwork is the network of this machine.
type KernelNetwork struct{}

// Dial implements Network.
func (KernelNetwork) Dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Timeout: HeartbeatTimeout, KeepAliveConfig: keepAlive, Control: setUserTimeout}
	return d.DialContext(ctx, "tcp", to.String())
}

// ListenLoopback implements Network.
func (KernelNetwork) ListenLoopback(a, _ netip.Addr) (net.Listener, error) {
	return net.Listen("tcp4", netip.AddrPortFrom(a, loopbackPort).String())
}

// New returns a mesh that is not yet open. leaderless reports whether this member knows no leader; it may be called at
// any time.
func New(cfg Config, b *AddressBook, n Network, log *slog.Logger, leaderless func() bool) *Mesh {
	m := &Mesh{
		cfg: cfg, log: log, book: b, net: n, leaderless: leaderless,
		removed: make(chan struct{}), opened: make(chan struct{}), links: map[string]*peerLink{},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// SetSource sets the loopback address from which raft connects, for Network.ListenLoopback. Call it before Open.
func (m *Mesh) SetSource(a netip.Addr) { m.source = a }

// Opened returns a channel that is closed when the mesh opens.
func (m *Mesh) Opened() <-chan struct{} { return m.opened }

// Removed returns a channel that is closed when another member answers that this one was removed from the cluster.
func (m *Mesh) Removed() <-chan struct{} { return m.removed }

// Open listens on the peer port and starts a link to each member in the address book. A second call does nothing.
func (m *Mesh) Open() error {
	if !m.cfg.Enabled() {
		return ErrNoPort
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.isOpen {
		return nil
	}
	serverTLS, clientTLS, err := tlsConfigs(m.cfg)
	if err != nil {
		return err
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: setUserTimeout}
	l, err := lc.Listen(m.ctx, "tcp", fmt.Sprintf(":%d", m.cfg.Port))
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("the port for other servers, %d, is in use on this machine: %w", m.cfg.Port, err)
	}
	if err != nil {
		return fmt.Errorf("listen for other members: %w", err)
	}
	m.tls = clientTLS
	m.client = m.newClient(clientTLS)
	m.listener = newPeerListener(l, serverTLS)
	m.httpServer = &http.Server{
		Handler:           http.HandlerFunc(m.serveHTTP),
		ReadHeaderTimeout: handshakeTimeout,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
	}
	m.wg.Go(func() { _ = m.httpServer.Serve(m.listener) })
	m.wg.Go(m.discover)
	m.isOpen = true
	close(m.opened)
	m.reconcileLocked()
	m.log.Info("listening for the other members of the datastore", "port", m.cfg.Port)
	return nil
}

// Attach passes requests to etcd. Before Attach, the peer port refuses raft's messages and serves only heartbeats.
func (m *Mesh) Attach(server *etcdserver.EtcdServer, log *zap.Logger) {
	m.server.Store(server)
	h := etcdhttp.NewPeerHandler(log, server)
	m.etcdHandler.Store(&h)
}

// Detach refuses further requests to etcd, and waits for those that read etcd's database, which must end before etcd is
// stopped. Raft's own connections may stay open.
func (m *Mesh) Detach() {
	m.mu.Lock()
	m.etcdHandler.Store(nil)
	m.mu.Unlock()
	m.inFlight.Wait()
}

// Close closes the peer port and all links, and waits for their goroutines.
func (m *Mesh) Close() {
	m.cancel()
	m.mu.Lock()
	httpServer := m.httpServer
	links := m.links
	m.links = map[string]*peerLink{}
	m.mu.Unlock()
	if httpServer != nil {
		_ = httpServer.Close()
	}
	for _, l := range links {
		l.close()
	}
	m.wg.Wait()
	if m.client != nil {
		m.client.CloseIdleConnections()
	}
}

// serveHTTP serves the peer port. The TLS listener below it admits members only.
func (m *Mesh) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == heartbeatPath {
		m.serveHeartbeat(w, r)
		return
	}
	m.mu.Lock() // excludes Detach
	h := m.etcdHandler.Load()
	short := !strings.HasPrefix(r.URL.Path, rafthttp.RaftPrefix)
	if h != nil && short {
		m.inFlight.Add(1)
	}
	m.mu.Unlock()
	if h == nil {
		http.Error(w, "the datastore is not open yet", http.StatusServiceUnavailable)
		return
	}
	if short {
		defer m.inFlight.Done()
	}
	(*h).ServeHTTP(w, r)
}

// reconcile starts links to the members in the address book, and closes links to all others.
func (m *Mesh) reconcile() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reconcileLocked()
}

func (m *Mesh) reconcileLocked() {
	if !m.isOpen || m.ctx.Err() != nil {
		return
	}
	want := map[string]Peer{}
	for _, p := range m.book.Get().Others {
		want[p.ID] = p
	}
	for id, l := range m.links {
		if _, ok := want[id]; !ok {
			delete(m.links, id)
			m.wg.Go(l.close) // close waits for the goroutines of the link, one of which may be the caller
		}
	}
	for id, p := range want {
		if m.links[id] == nil {
			m.links[id] = startPeerLink(m, p)
		}
	}
}

// Sync drops removed members from the address book, merges the addresses that the store holds into it, and starts and
// closes links accordingly.
func (m *Mesh) Sync(published []Peer) error {
	if _, err := m.book.retain(m.isMember); err != nil {
		return err
	}
	m.Learn(published)
	m.reconcile()
	return nil
}

// Learn merges what another member says about the members into the address book.
func (m *Mesh) Learn(peers []Peer) {
	changed, err := m.book.Merge(slices.DeleteFunc(slices.Clone(peers), func(p Peer) bool { return !m.isMember(p) }))
	if err != nil {
		m.log.Warn("cannot write the address book of the datastore's members", "err", err)
	}
	if changed {
		m.reconcile()
		m.ProbeNow()
	}
}

// isMember reports whether a peer is or may be a member. The list of members is in the store, and a member with a leader
// has a current copy. A member without one must accept peers that are not in its copy: one of them may be the leader, or
// lead to it.
func (m *Mesh) isMember(p Peer) bool {
	id, err := parseID(p.ID)
	if err != nil {
		return false
	}
	server := m.server.Load()
	switch {
	case server == nil:
		return true
	case server.IsIDRemoved(uint64(id)):
		return false
	}
	return m.leaderless() || server.Leader() == id || server.Cluster().Member(id) != nil
}

// ProbeNow sends a heartbeat to every member at once.
func (m *Mesh) ProbeNow() {
	for _, l := range m.allLinks() {
		l.wakeup.Wake()
	}
}

// SetAddresses records the current addresses of this machine, and tells the other members. It does nothing after Close.
func (m *Mesh) SetAddresses(addresses []netip.Addr) {
	if !m.cfg.Enabled() || m.ctx.Err() != nil {
		return
	}
	before, now := m.book.Self().Addresses, m.cfg.addrPorts(addresses)
	changed, err := m.book.setAddresses(now)
	if err != nil {
		m.log.Warn("cannot write the address book of the datastore's members", "err", err)
	}
	switch {
	case !changed:
	case slices.ContainsFunc(before, func(a netip.AddrPort) bool { return !slices.Contains(now, a) }):
		m.reconnect()
	default:
		m.ProbeNow()
	}
}

// reconnect closes all connections after this machine has lost an address. Connections from that address are dead, and
// the kernel would take seconds to notice.
func (m *Mesh) reconnect() {
	m.mu.Lock()
	client := m.client
	m.mu.Unlock()
	if client != nil {
		client.CloseIdleConnections()
	}
	for _, l := range m.allLinks() {
		l.proxy.closeConns()
		l.wakeup.Wake()
	}
}

func (m *Mesh) allLinks() []*peerLink {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*peerLink, 0, len(m.links))
	for _, l := range m.links {
		all = append(all, l)
	}
	return all
}

func (m *Mesh) link(id string) *peerLink {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.links[id]
}

// Location returns the address at which another member answered last. It is not valid while that is unknown.
func (m *Mesh) Location(id string) netip.AddrPort {
	if l := m.link(id); l != nil {
		return l.currentLocation()
	}
	return netip.AddrPort{}
}

// Status returns the last heartbeat of another member.
func (m *Mesh) Status(id string) Status {
	if l := m.link(id); l != nil {
		return l.currentStatus()
	}
	return Status{}
}

// Get sends a GET request for path to the peer port at the address.
func (m *Mesh) Get(ctx context.Context, from netip.AddrPort, path string) ([]byte, http.Header, error) {
	return m.request(ctx, http.MethodGet, from, path, nil)
}

func (m *Mesh) setRemoved() { m.removedOnce.Do(func() { close(m.removed) }) }
