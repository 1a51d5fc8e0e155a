package datastore

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

// mesh is this member's ways to and from the others.
//
//	etcd's raft ──► loopback address of B ──splice──► where B is ──► B's peer port ──► B's raft
//	                                   └────── TLS from end to end ──────┘
//
// Raft knows only the addresses on loopback, which never change; where a member is, is in the book. So a
// machine that moves needs no decision of a majority, and all of them may move at once.
//
// It opens once, before the store when there are other members, or with the first admission; a store that
// stays alone never opens it, and listens nowhere.
type mesh struct {
	cfg  PeerConfig
	log  *slog.Logger
	book *book
	net  network
	from netip.Addr // the address on loopback from which raft connects; set before open

	// leaderless says whether this member knows no leader: then it asks around for the others.
	leaderless func() bool

	server atomic.Pointer[etcdserver.EtcdServer] // nil until it is opened
	etcd   atomic.Pointer[http.Handler]          // its side of the peer port; nil when it may not be called
	asking sync.WaitGroup                        // requests that etcd must not be stopped under

	removedOnce sync.Once
	removed     chan struct{} // closed when another member says that this one was removed

	ctx    context.Context // ends with close
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu       sync.Mutex // guards what follows
	isOpen   bool
	opened   chan struct{} // closed when open
	tls      *tls.Config   // as a client
	client   *http.Client  // for hellos
	listener net.Listener
	serving  *http.Server
	ways     map[string]*way // to each other member, by its ID
}

// network is what tests replace to have machines and cables.
type network interface {
	dial(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	// listenVirtual listens on another member's address on loopback, for raft that connects from its own.
	listenVirtual(a, from netip.Addr) (net.Listener, error)
}

type kernelNetwork struct{}

func (kernelNetwork) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	d := net.Dialer{Timeout: helloTime, KeepAliveConfig: keepAlive, Control: giveUp}
	return d.DialContext(ctx, "tcp", to.String())
}

func (kernelNetwork) listenVirtual(a, _ netip.Addr) (net.Listener, error) {
	return net.Listen("tcp4", netip.AddrPortFrom(a, virtualPort).String())
}

func newMesh(cfg PeerConfig, b *book, n network, log *slog.Logger, leaderless func() bool) *mesh {
	m := &mesh{
		cfg: cfg, log: log, book: b, net: n, leaderless: leaderless,
		removed: make(chan struct{}), opened: make(chan struct{}), ways: map[string]*way{},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	return m
}

// open listens for the others and begins to look for them. It does nothing the second time.
func (m *mesh) open() error {
	if !m.cfg.enabled() {
		return ErrNoPeers
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.isOpen {
		return nil
	}
	serverTLS, clientTLS, err := peerTLS(m.cfg)
	if err != nil {
		return err
	}
	lc := net.ListenConfig{KeepAliveConfig: keepAlive, Control: giveUp}
	l, err := lc.Listen(m.ctx, "tcp", fmt.Sprintf(":%d", m.cfg.Port))
	if errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("the port for other servers, %d, is in use on this machine: %w", m.cfg.Port, err)
	}
	if err != nil {
		return fmt.Errorf("listen for other members: %w", err)
	}
	m.tls = clientTLS
	m.client = m.newClient(clientTLS)
	m.listener = newProven(l, serverTLS)
	m.serving = &http.Server{
		Handler:           http.HandlerFunc(m.serveHTTP),
		ReadHeaderTimeout: handshakeTime,
		IdleTimeout:       time.Minute,
		ErrorLog:          slog.NewLogLogger(m.log.Handler(), slog.LevelDebug),
	}
	m.wg.Go(func() { _ = m.serving.Serve(m.listener) })
	m.wg.Go(m.discover)
	m.isOpen = true
	close(m.opened)
	m.reconcileLocked()
	m.log.Info("listening for the other members of the datastore", "port", m.cfg.Port)
	return nil
}

// attach lets raft's messages in. They come only when there is an etcd to take them.
func (m *mesh) attach(server *etcdserver.EtcdServer, log *zap.Logger) {
	m.server.Store(server)
	h := etcdhttp.NewPeerHandler(log, server)
	m.etcd.Store(&h)
}

// detach turns the others away and waits for the requests that etcd must not be stopped under, because they
// read its database. Raft's own connections may go on.
func (m *mesh) detach() {
	m.mu.Lock()
	m.etcd.Store(nil)
	m.mu.Unlock()
	m.asking.Wait()
}

// close ends all of it.
func (m *mesh) close() {
	m.cancel()
	m.mu.Lock()
	serving := m.serving
	ways := m.ways
	m.ways = map[string]*way{}
	m.mu.Unlock()
	if serving != nil {
		_ = serving.Close()
	}
	for _, w := range ways {
		w.close()
	}
	m.wg.Wait()
	if m.client != nil {
		m.client.CloseIdleConnections()
	}
}

// serveHTTP is the peer port behind TLS: only members come this far.
func (m *mesh) serveHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == helloPath {
		m.answerHello(w, r)
		return
	}
	m.mu.Lock() // against detach
	h := m.etcd.Load()
	quick := !strings.HasPrefix(r.URL.Path, rafthttp.RaftPrefix)
	if h != nil && quick {
		m.asking.Add(1)
	}
	m.mu.Unlock()
	if h == nil {
		http.Error(w, "not open yet", http.StatusServiceUnavailable)
		return
	}
	if quick {
		defer m.asking.Done()
	}
	(*h).ServeHTTP(w, r)
}

// reconcile makes ways to the members that are in the book, and only to those.
func (m *mesh) reconcile() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.reconcileLocked()
}

func (m *mesh) reconcileLocked() {
	if !m.isOpen || m.ctx.Err() != nil {
		return
	}
	want := map[string]Peer{}
	for _, p := range m.book.get().Others {
		want[p.ID] = p
	}
	for id, w := range m.ways {
		if _, ok := want[id]; !ok {
			delete(m.ways, id)
			m.wg.Go(w.close) // it waits for the way's own goroutines, and we may be in one
		}
	}
	for id, p := range want {
		if m.ways[id] == nil {
			m.ways[id] = startWay(m, p)
		}
	}
}

// learn takes over what others say of where members are.
func (m *mesh) learn(peers []Peer) {
	changed, err := m.book.merge(slices.DeleteFunc(slices.Clone(peers), func(p Peer) bool { return !m.isMember(p) }))
	if err != nil {
		m.log.Warn("write the members' addresses", "err", err)
	}
	if changed {
		m.reconcile()
		m.kick()
	}
}

// isMember reports whether a peer is, or may be, a member. Who is one is in the store, which a member that is in
// touch with a leader has; others may have to find that leader first, by way of members that they have not heard of.
func (m *mesh) isMember(p Peer) bool {
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

// kick makes all ways look at once.
func (m *mesh) kick() {
	for _, w := range m.all() {
		w.kick()
	}
}

// moved is called when this machine has lost an address. The connections from there are dead, and it would take
// the kernel some time to say so.
func (m *mesh) moved() {
	m.mu.Lock()
	client := m.client
	m.mu.Unlock()
	if client != nil {
		client.CloseIdleConnections()
	}
	for _, w := range m.all() {
		w.splice.cut()
		w.kick()
	}
}

func (m *mesh) all() []*way {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]*way, 0, len(m.ways))
	for _, w := range m.ways {
		all = append(all, w)
	}
	return all
}

func (m *mesh) way(id string) *way {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.ways[id]
}

// reach is what is known of the life of another member.
func (m *mesh) reach(id string) reach {
	if w := m.way(id); w != nil {
		return w.reach()
	}
	return reach{}
}

func (m *mesh) isRemoved() bool {
	select {
	case <-m.removed:
		return true
	default:
		return false
	}
}

func (m *mesh) noteRemoved() { m.removedOnce.Do(func() { close(m.removed) }) }
