package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/raft/v3"
	"go.uber.org/zap"

	"kedge/internal/logging"
)

// Store is the datastore of one server of the cluster: one raft member with its log and its database.
//
//	new ──Run──► opening ──► serving ──► stopped
//	                │           ├──────► removed
//	                └──► failed ◄┘
//
// It runs once. After a failure the process has to end, because goroutines of etcd stay parked (see failStop)
// with their locks held and their files open.
type Store struct {
	cfg  Config
	log  *slog.Logger
	zap  *zap.Logger
	stop *failStop
	net  network

	leadership *leadership

	placeMu   sync.Mutex // guards what follows, and that the book gets it in order
	addresses []netip.Addr

	ran       atomic.Bool
	book      *book                     // set by Run before anything else can see it
	mesh      *mesh                     // likewise
	transport atomic.Pointer[transport] // nil unless serving
	admitting sync.Mutex                // one change of the members at a time
}

const (
	// slowApply is how long etcd may take over one entry before it says so.
	slowApply = 500 * time.Millisecond
	// checkKey is read, and not expected to exist, by Check.
	checkKey = "/kedge/health"
	// checkTime is how long Check waits for an answer: a member that has lost the majority gets none.
	checkTime = 2 * time.Second
	// waitingTime is after how long it is said that the start waits for others.
	waitingTime = 5 * time.Second
	// handOverTime is how long a stop may be held up by the search for another leader.
	handOverTime = 2 * time.Second
)

// New returns a store that is not yet open. It only keeps its arguments; cfg must be valid.
func New(cfg Config, log *slog.Logger) *Store {
	s := &Store{
		cfg: cfg, log: log, stop: newFailStop(), net: kernelNetwork{}, leadership: newLeadership(),
		addresses: cfg.Peer.Addresses,
	}
	s.zap = logging.Zap(log).WithOptions(zap.WrapCore(newQuietCore), zap.WithFatalHook(s.stop), zap.WithPanicHook(s.stop))
	return s
}

// Name implements the component contract.
func (s *Store) Name() string { return "datastore" }

// Run opens the store and serves until ctx ends. It calls ready when clients work, which with several members
// takes a majority of them. Everything that was acknowledged is on disk at any moment; stopping in order only
// makes the next start shorter, and the others' election unnecessary.
//
// After an error that is ErrFailed the process must end. After ErrRemoved the directory is not opened again.
func (s *Store) Run(ctx context.Context, ready func()) (err error) {
	if s.ran.Swap(true) {
		return errors.New("a datastore runs only once")
	}
	began := time.Now()

	known, err := s.openBook()
	if err != nil {
		return err
	}
	release, err := openDir(s.cfg.Dir, s.cfg.Join != nil || known.get().Joining)
	if err != nil {
		return fmt.Errorf("open %s: %w", s.cfg.Dir, err)
	}
	defer func() {
		if errors.Is(err, ErrRemoved) {
			err = errors.Join(err, markRemoved(s.cfg.Dir))
		}
		// While parts of a failed store may still be at work in the directory, it stays locked.
		if !errors.Is(err, ErrFailed) {
			err = errors.Join(err, release())
		}
	}()
	if removed, err := Removed(s.cfg.Dir); err != nil || removed {
		return errors.Join(err, ErrRemoved)
	}

	var running atomic.Pointer[etcdserver.EtcdServer]
	leaderless := func() bool {
		server := running.Load()
		return server == nil || uint64(server.Leader()) == raft.None
	}
	s.place(known, newMesh(s.cfg.Peer, known, s.net, s.log, leaderless))
	defer s.mesh.close()

	server, err := s.prepare(ctx)
	if server == nil || err != nil {
		return err
	}
	running.Store(server)
	if err := s.await(ctx, server); err != nil {
		return errors.Join(err, s.close(server, nil))
	}
	if ctx.Err() != nil {
		return s.close(server, nil)
	}
	if err := errors.Join(markCreated(s.cfg.Dir), s.book.joined()); err != nil {
		return errors.Join(err, s.close(server, nil))
	}

	g := newGate(server.Lead)
	t := newTransport(server, g, s.stop.fail)
	s.transport.Store(t)
	defer s.transport.Store(nil)

	s.log.Info("datastore open", "member", server.MemberID().String(), "members", len(server.Cluster().Members()),
		"revision", server.KV().Rev(), "bytes", server.Backend().Size(), "took", time.Since(began).Round(time.Millisecond))
	ready()

	err = s.serve(ctx, server, t)
	return errors.Join(err, s.close(server, g))
}

// openBook opens the book of addresses. A damaged one is given up if the store is there, which has a copy; before
// that a member that joins has nothing else.
func (s *Store) openBook() (*book, error) {
	b, err := openBook(s.cfg.Dir, s.cfg.MemberName)
	if !errors.Is(err, errBookDamaged) {
		return b, err
	}
	holds, holdsErr := HoldsStore(s.cfg.Dir)
	if holdsErr != nil {
		return nil, errors.Join(err, holdsErr)
	}
	if !holds && s.cfg.Join == nil {
		return nil, fmt.Errorf("%w; remove the file, and let this server join anew if there are others", err)
	}
	s.log.Warn("begin another book of the members' addresses", "err", err)
	return newBook(s.cfg.Dir, s.cfg.MemberName), nil
}

// place makes the book and the mesh known, and writes into the book where this machine is.
func (s *Store) place(b *book, m *mesh) {
	s.placeMu.Lock()
	defer s.placeMu.Unlock()
	s.book, s.mesh = b, m
}

// SetAddresses tells the other members that this machine has moved. It may be called at any time, and returns
// at once.
func (s *Store) SetAddresses(addresses []netip.Addr) {
	s.placeMu.Lock()
	defer s.placeMu.Unlock()
	s.addresses = addresses
	if s.mesh != nil && s.mesh.ctx.Err() == nil {
		s.here()
	}
}

// here writes this machine's addresses into the book. It must be called with placeMu held.
func (s *Store) here() {
	if !s.cfg.Peer.enabled() {
		return
	}
	before, now := s.book.self().Addresses, s.cfg.Peer.addrPorts(s.addresses)
	news, err := s.book.moved(now)
	if err != nil {
		s.log.Warn("write the members' addresses", "err", err)
	}
	switch {
	case !news:
	case slices.ContainsFunc(before, func(a netip.AddrPort) bool { return !slices.Contains(now, a) }):
		s.mesh.moved()
	default:
		s.mesh.kick()
	}
}

// prepare opens the server in the directory, or begins one: alone, or as a member of what others have. It does
// not start raft. The server is nil if ctx ended before.
func (s *Store) prepare(ctx context.Context) (*etcdserver.EtcdServer, error) {
	size, _, err := volume(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	holds, err := HoldsStore(s.cfg.Dir)
	if err != nil {
		return nil, err
	}
	switch join := s.cfg.Join; {
	case join == nil:
	case !holds:
		if err := s.book.admit(*join); err != nil {
			return nil, err
		}
	case s.book.get().Cluster != join.Cluster:
		s.log.Warn("there is a store of another cluster in the directory already, not joining", "dir", s.cfg.Dir)
	}
	s.placeMu.Lock()
	s.here()
	s.placeMu.Unlock()

	c := s.book.get()
	o := opening{join: !holds && c.Joining, several: c.Joining || len(c.Others) > 0, quota: s.cfg.quota(size)}
	if o.self, err = types.NewURLs([]string{c.Self.URL}); err != nil {
		return nil, err
	}
	o.members = types.URLsMap{s.cfg.MemberName: o.self}
	s.mesh.from = c.Self.address()
	if o.several {
		if err := s.mesh.open(); err != nil {
			return nil, err
		}
	}
	server, err := s.begin(ctx, o)
	if server == nil || err != nil {
		return nil, err
	}
	err = s.introduce(server)
	if err == nil && holds && o.several {
		err = s.compare(server)
	}
	if err != nil {
		s.mesh.detach()
		if !errors.Is(err, ErrFailed) {
			server.Cleanup()
		}
		return nil, err
	}
	return server, nil
}

// begin is open, and for a member that joins the search for the others. It is repeated if the members change
// meanwhile.
func (s *Store) begin(ctx context.Context, o opening) (*etcdserver.EtcdServer, error) {
	if !o.join {
		return s.open(o)
	}
	const attempts = 10
	for attempt := 1; ; attempt++ {
		var err error
		if o.members, err = s.membership(ctx); ctx.Err() != nil {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		server, err := s.open(o)
		if err == nil || attempt == attempts || errors.Is(err, ErrFailed) {
			return server, err
		}
		s.log.Info("join the other members again", "err", err)
		sleep(ctx, lookEvery)
	}
}

// introduce tells book and mesh about the opened server, and the other way round.
func (s *Store) introduce(server *etcdserver.EtcdServer) error {
	if err := s.book.identify(server.Cluster().ID().String(), server.MemberID().String()); err != nil {
		return err
	}
	s.mesh.attach(server, s.zap)
	if err := s.adopt(server); err != nil {
		return err
	}
	if len(s.book.get().Others) == 0 {
		return nil
	}
	return s.mesh.open()
}

// compare compares this member's data with the others', as far as they answer, before it takes part.
func (s *Store) compare(server *etcdserver.EtcdServer) error {
	compared := make(chan error, 1)
	go func() { compared <- server.CorruptionChecker().InitialCheck() }()
	select {
	case err := <-compared:
		if err != nil {
			return fmt.Errorf("%w: %w; remove this server and let it join anew", ErrCorrupt, err)
		}
		return nil
	case <-s.stop.failed:
		return s.stop.err
	}
}

// open is newServer with a way out: a fatal message in it never returns.
func (s *Store) open(o opening) (*etcdserver.EtcdServer, error) {
	type result struct {
		server *etcdserver.EtcdServer
		err    error
	}
	opened := make(chan result, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				s.stop.fail(fmt.Errorf("panic: %v", p))
			}
		}()
		server, err := newServer(s.cfg, o, s.zap)
		opened <- result{server, err}
	}()
	select {
	case r := <-opened:
		return r.server, r.err
	case <-s.stop.failed:
		return nil, s.stop.err
	}
}

// await starts raft and waits until the member has a leader and has announced itself through the log, or ctx
// has ended.
func (s *Store) await(ctx context.Context, server *etcdserver.EtcdServer) error {
	server.Start()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go campaign(ctx, server)
	takesPart := make(chan struct{})
	go awaitPart(ctx, server, takesPart)
	waiting := time.NewTimer(waitingTime)
	defer waiting.Stop()
	for {
		select {
		case <-server.ReadyNotify():
			return nil
		case <-takesPart:
			return nil
		case <-ctx.Done():
			return nil
		case <-server.StoppingNotify():
			return ErrRemoved // for nothing else does it stop by itself
		case <-s.mesh.removed:
			return ErrRemoved
		case <-s.stop.failed:
			return s.stop.err
		case <-waiting.C:
			s.log.Info("waiting for a majority of the datastore's members", "members", len(s.book.all()))
		}
	}
}

// awaitPart closes takesPart when the member has a vote and has read what a majority has agreed on, or never.
// etcd calls a member ready when it has announced its name through the log; a first announcement that is lost,
// as that of a new member is whose leader's snapshot comes at the same moment, is repeated only after seven
// seconds, and nobody waits for it.
func awaitPart(ctx context.Context, server *etcdserver.EtcdServer, takesPart chan<- struct{}) {
	tick := time.NewTicker(partInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// Before it has applied what it was sent, a new member takes itself for a voter. A question that it asks
		// then is repeated and answered more than once, and for each answer that nobody waits for etcd's raft
		// stands still for a second, when the others may have begun to need this member's vote.
		applied := server.AppliedIndex()
		if applied == 0 || applied < server.CommittedIndex() {
			continue
		}
		if len(server.Cluster().Members()) < 2 || server.Leader() == types.ID(raft.None) || server.IsLearner() {
			continue
		}
		try, cancel := context.WithTimeout(ctx, partWithin)
		err := server.LinearizableReadNotify(try)
		cancel()
		if err == nil {
			close(takesPart)
			return
		}
	}
}

// partInterval is how often a member looks whether it takes part, and partWithin how long it waits for an answer.
const (
	partInterval = 50 * time.Millisecond
	partWithin   = time.Second
)

// serve returns nil when ctx has ended, and an error if the store ended first.
func (s *Store) serve(ctx context.Context, server *etcdserver.EtcdServer, t *transport) error {
	go t.gate.watchLeader(s.cfg.Election)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		newKeeper(s.cfg.Defrag, s.log, &serverSpace{store: s, server: server, transport: t, dir: s.cfg.Dir}).run(ctx)
	})
	wg.Go(func() { s.tend(ctx, server) })
	leadCtx, stopLeading := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLeading()
	wg.Go(func() { s.watchLeadership(leadCtx, server, t) })

	var err error
	select {
	case <-ctx.Done():
		s.retire(ctx)
	case <-server.StoppingNotify():
		err = ErrRemoved // for nothing else does it stop by itself
	case <-s.mesh.removed:
		err = ErrRemoved
	case <-s.stop.failed:
		err = s.stop.err
	}
	cancel()
	stopLeading()
	if err != nil {
		t.gate.shut() // whoever is inside must not hold up those who wait below
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wg.Wait()
	}()
	select {
	case <-ended:
	case <-s.stop.failed:
	}
	s.leadership.set(Leadership{})
	return err
}

// retire hands leadership over before a stop, if somebody is there to take it, so that the others need not find
// out by waiting.
func (s *Store) retire(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), handOverTime)
	defer cancel()
	if err := s.HandOver(ctx); err != nil {
		s.log.Warn("stop without a successor", "err", err)
	}
}

// close stops the server, with everything in the database file and the log closed. g is nil if there were no
// clients yet. If the store has failed, or fails meanwhile, it does not wait for anything.
func (s *Store) close(server *etcdserver.EtcdServer, g *gate) error {
	if g != nil {
		g.shut()
	}
	select {
	case <-s.stop.failed:
		return nil // reported by whoever saw it first
	default:
	}

	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if g != nil {
			g.close()
		}
		s.mesh.detach()
		// It commits to the database file what is not yet in it. Leadership has been seen to.
		server.HardStop()
	}()
	select {
	case <-closed:
		return nil
	case <-s.stop.failed:
		return s.stop.err
	}
}

// Check reports whether the store answers reads that see every acknowledged write, and takes writes. It takes no
// longer than two seconds.
func (s *Store) Check(ctx context.Context) error {
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	if !t.gate.hasLeader() {
		return ErrNoLeader
	}
	ctx, cancel := context.WithTimeout(ctx, checkTime)
	defer cancel()
	if _, err := (kvClient{t}).Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)}); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	for _, alarm := range t.server.Alarms() {
		if alarm.Alarm == pb.AlarmType_CORRUPT {
			return ErrCorrupt
		}
		return fmt.Errorf("%w: alarm %v", ErrNoSpace, alarm.Alarm)
	}
	return nil
}
