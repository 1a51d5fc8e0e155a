package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/raft/v3"
	"go.uber.org/zap"

	"kedge/datastore/integrity"
	"kedge/datastore/peers"
	"kedge/internal/errorkind"
	"kedge/internal/logging"
)

// Store is the datastore of one server of the cluster: one raft member with its log and its database.
//
//	new ──Run──► opening ──► serving ──► stopped
//	                │           ├──────► removed
//	                └──► failed ◄┘
//
// It runs once. After a failure the process has to end, because goroutines of etcd stay parked (see failStop), with their
// locks held and their files open.
type Store struct {
	cfg      Config
	log      *slog.Logger
	zap      *zap.Logger
	failStop *failStop
	net      peers.Network

	leadership *Leaders
	disk       *diskSpace

	onCreated func() error // see OnCreated; may be nil
	guard     *putGuard    // see GuardPuts; may be nil

	addressMu sync.Mutex // guards addresses, and orders their updates of the address book
	addresses []netip.Addr

	ran          atomic.Bool
	book         *peers.AddressBook        // set by Run before any other goroutine can see it
	mesh         *peers.Mesh               // likewise
	transport    atomic.Pointer[transport] // nil unless serving
	membershipMu sync.Mutex                // held during a change of the members
	fileMu       sync.Mutex                // held while the database file is copied or rewritten
}

const (
	// slowApply is the time for one raft entry from which etcd logs it as slow.
	slowApply = 500 * time.Millisecond
	// checkKey is the key that Check reads. It does not exist.
	checkKey = "/kedge/health"
	// checkTimeout bounds the read of Check: a member without a majority gets no answer.
	checkTimeout = 2 * time.Second
	// waitingLogDelay is the time after which a start logs that it waits for other members.
	waitingLogDelay = 5 * time.Second
	// handOverTimeout bounds the transfer of leadership before a stop.
	handOverTimeout = 2 * time.Second
	// joinRetryInterval is the interval at which a member that cannot join the others retries.
	joinRetryInterval = time.Second
	// logWatchInterval is the interval at which the store looks for a new file of its log.
	logWatchInterval = time.Second
)

// New returns a store that is not yet open. It only stores its arguments; cfg must be valid.
func New(cfg Config, log *slog.Logger) *Store {
	s := &Store{
		cfg: cfg, log: log, failStop: newFailStop(cfg.Dir), net: peers.KernelNetwork{}, leadership: NewLeaders(),
		addresses: cfg.Peer.Addresses, disk: newDiskSpace(cfg.Dir, log),
	}
	s.zap = logging.Zap(log).WithOptions(zap.WrapCore(newFilterCore), zap.WithFatalHook(s.failStop), zap.WithPanicHook(s.failStop))
	return s
}

// Name implements the component contract.
func (s *Store) Name() string { return "datastore" }

// OnCreated makes Run call note when the store has been created for good, before it serves. Call OnCreated before Run.
func (s *Store) OnCreated(note func() error) { s.onCreated = note }

// Run opens the store and serves until ctx ends. It calls ready when clients work; a store with several members needs a
// majority of them for that. Every acknowledged write is on disk at any moment. An orderly stop only makes the next start
// shorter and saves the other members an election.
//
// After an error that is ErrFailed the process must end. After ErrRemoved the directory is not opened again.
func (s *Store) Run(ctx context.Context, ready func()) (err error) {
	if s.ran.Swap(true) {
		return errors.New("a datastore runs only once")
	}
	began := time.Now()

	book, err := s.openAddressBook()
	if err != nil {
		return err
	}
	release, err := openDir(s.cfg.Dir, s.cfg.Join != nil || book.Get().Joining, book.TookPart())
	if errors.Is(err, ErrDamaged) {
		return err
	} else if err != nil {
		return fmt.Errorf("open %s: %w", s.cfg.Dir, err)
	}
	defer func() {
		if errors.Is(err, ErrRemoved) {
			err = errors.Join(err, markRemoved(s.cfg.Dir))
		}
		// Goroutines of a failed store may still write to the directory, so it stays locked.
		if !errors.Is(err, ErrFailed) {
			err = errors.Join(err, release())
		}
	}()
	if removed, err := Removed(s.cfg.Dir); err != nil || removed {
		return errors.Join(err, ErrRemoved)
	}
	if book, err = s.inspect(book); err != nil {
		return err
	}
	defer func() {
		if err == nil {
			err = s.seal(book)
		}
	}()

	var running atomic.Pointer[etcdserver.EtcdServer]
	leaderless := func() bool {
		server := running.Load()
		return server == nil || uint64(server.Leader()) == raft.None
	}
	s.setPeers(book, peers.New(s.cfg.Peer, book, s.net, s.log, leaderless))
	defer s.mesh.Close()

	server, err := s.prepare(ctx)
	if server == nil || err != nil {
		return err
	}
	running.Store(server)
	if err := s.awaitStart(ctx, server); err != nil {
		return errors.Join(err, s.close(server, nil))
	}
	if ctx.Err() != nil {
		return s.close(server, nil)
	}
	if err := s.recordCreated(); err != nil {
		return errors.Join(err, s.close(server, nil))
	}

	g := newGate(server.Lead)
	t := newTransport(server, g, s.disk, s.guard, s.failStop.fail)
	s.disk.commit = server.Backend().ForceCommit
	if err := s.disk.check(); err != nil {
		s.log.Warn("cannot check the free disk space of the datastore", "err", err)
	}
	s.transport.Store(t)
	defer s.transport.Store(nil)

	s.log.Info("datastore open", "member", server.MemberID().String(), "members", len(server.Cluster().Members()),
		"revision", server.KV().Rev(), "bytes", server.Backend().Size(), "took", time.Since(began).Round(time.Millisecond))
	ready()

	defer s.leadership.interrupted(false)
	err = s.serve(ctx, server, t)
	return errors.Join(err, s.close(server, g))
}

// recordCreated records on disk that the store exists for good and that this member has joined the others.
func (s *Store) recordCreated() error {
	if err := errors.Join(markCreated(s.cfg.Dir), s.book.SetJoined()); err != nil {
		return err
	}
	if s.onCreated != nil {
		if err := s.onCreated(); err != nil {
			s.log.Warn("cannot record that the datastore exists; the next start tries again", "err", err)
		}
	}
	return nil
}

// openAddressBook opens the address book. It replaces a damaged one with a new one if the store exists, which holds a copy,
// or if the member is about to join. Otherwise the content is lost, and the start fails.
func (s *Store) openAddressBook() (*peers.AddressBook, error) {
	b, err := peers.OpenAddressBook(s.cfg.Dir, s.cfg.MemberName)
	if !errors.Is(err, peers.ErrBookDamaged) {
		return b, err
	}
	holds, holdsErr := HoldsStore(s.cfg.Dir)
	if holdsErr != nil {
		return nil, errors.Join(err, holdsErr)
	}
	if !holds && s.cfg.Join == nil {
		return nil, fmt.Errorf("%w; remove the file, and join this server again if the cluster has others", err)
	}
	s.log.Warn("the address book is damaged, replacing it with a new one", "err", err)
	return peers.NewAddressBook(s.cfg.Dir, s.cfg.MemberName), nil
}

// inspect checks the files of an existing store for damage, before anything else uses them. It replaces the address book if
// that belongs to another member.
func (s *Store) inspect(book *peers.AddressBook) (*peers.AddressBook, error) {
	holds, err := HoldsStore(s.cfg.Dir)
	if err != nil || !holds {
		return book, err
	}
	began := time.Now()
	found, err := integrity.Check(s.cfg.Dir, known(s.cfg.Dir, book))
	var bad *integrity.Damage
	if errors.As(err, &bad) {
		return nil, s.damage(bad.Error())
	} else if err != nil {
		return nil, fmt.Errorf("check the datastore's files: %w", err)
	}
	if found.SealInvalid {
		s.log.Warn("the seal of the datastore is not that of its last stop; all its files were checked instead", "file", filepath.Join(s.cfg.Dir, integrity.SealFile))
	}
	if found.Torn != "" {
		s.log.Info("the log ended in a write that was never acknowledged, which was removed", "file", found.Torn)
	}
	s.log.Debug("datastore files checked", "sealed", found.Sealed, "took", time.Since(began).Round(time.Millisecond))
	cluster, member := types.ID(found.Identity.Cluster).String(), types.ID(found.Identity.Member).String()
	c := book.Get()
	if c.Joining {
		return book, nil // the database may not hold this member yet
	}
	if len(found.Members) > 0 && !slices.Contains(found.Members, member) {
		return nil, s.damage(filepath.Join(s.cfg.Dir, memberDir, "snap", "db") + " belongs to another cluster than the log beside it")
	}
	if c.Cluster != "" && c.Cluster != cluster || c.Self.ID != "" && c.Self.ID != member {
		s.log.Warn("the address book belongs to another member, replacing it with a new one", "file", book.Path(), "of", c.Self.ID, "member", member)
		return peers.NewAddressBook(s.cfg.Dir, s.cfg.MemberName), nil
	}
	return book, nil
}

// known returns what is known of the files of the store in dir. A new address book, in the place of a damaged one, knows nothing.
func known(dir string, book *peers.AddressBook) integrity.Known {
	c := book.Get()
	return integrity.Known{Seal: c.Seal, Newest: c.Log, Opened: wasOpened(dir), Segment: walSegment}
}

// watchLog records the newest file of the log, until ctx ends. Nothing else would show that it is missing.
func (s *Store) watchLog(ctx context.Context) {
	for ctx.Err() == nil {
		name, err := integrity.NewestLogFile(s.cfg.Dir)
		if err == nil {
			err = s.book.SetLog(name)
		}
		if err != nil {
			s.log.Warn("cannot record the newest file of the datastore's log", "err", err)
		}
		sleep(ctx, logWatchInterval)
	}
}

// seal records that the store was closed in order, with the checksums of its files. An error only makes the next start
// take longer.
func (s *Store) seal(book *peers.AddressBook) error {
	holds, err := HoldsStore(s.cfg.Dir)
	if err != nil || !holds {
		return err
	}
	sum, err := integrity.Seal(s.cfg.Dir)
	if err == nil {
		err = book.SetSeal(sum)
	}
	if err != nil {
		s.log.Warn("cannot seal the datastore files; the next start checks all of them", "err", err)
	}
	return nil
}

// setPeers sets the address book and the mesh, for SetAddresses.
func (s *Store) setPeers(b *peers.AddressBook, m *peers.Mesh) {
	s.addressMu.Lock()
	defer s.addressMu.Unlock()
	s.book, s.mesh = b, m
}

// SetAddresses sets the addresses of this machine and tells the other members. It may be called at any time, and does not
// wait for them.
func (s *Store) SetAddresses(addresses []netip.Addr) {
	s.addressMu.Lock()
	defer s.addressMu.Unlock()
	s.addresses = addresses
	if s.mesh != nil {
		s.mesh.SetAddresses(addresses)
	}
}

// prepare opens the server in the directory, or creates one: alone, or as a member that joins others. It does not start
// raft. The server is nil if ctx ended before.
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
		if err := s.book.Begin(join.Cluster, Peer{ID: join.ID, Name: join.Name, URL: join.URL, Witness: s.cfg.Witness}, join.Members); err != nil {
			return nil, err
		}
	case s.book.Get().Cluster != join.Cluster:
		s.log.Warn("the directory holds the store of another cluster: not joining", "dir", s.cfg.Dir)
	}
	s.addressMu.Lock()
	s.mesh.SetAddresses(s.addresses)
	s.addressMu.Unlock()

	s.book.SetWitness(s.cfg.Witness)
	c := s.book.Get()
	o := openOptions{join: !holds && c.Joining, several: c.Joining || len(c.Others) > 0, quota: s.cfg.quota(size)}
	if o.self, err = types.NewURLs([]string{c.Self.URL}); err != nil {
		return nil, err
	}
	o.members = types.URLsMap{s.cfg.MemberName: o.self}
	s.mesh.SetSource(peers.LoopbackAddr(c.Self.URL))
	if o.several {
		if err := s.mesh.Open(); err != nil {
			return nil, err
		}
	}
	if holds {
		if err := markOpening(s.cfg.Dir); err != nil {
			return nil, err
		}
	}
	server, err := s.openOrJoin(ctx, o)
	if server == nil || err != nil {
		return nil, err
	}
	if err := markOpened(s.cfg.Dir); err != nil { // as on a full disk
		s.log.Warn("cannot record that the datastore was opened; the next start checks the end of its log less closely", "err", err)
	}
	err = s.attachPeers(server)
	if err == nil && holds && o.several {
		err = s.compareData(server)
	}
	if err != nil {
		s.mesh.Detach()
		if !errors.Is(err, ErrFailed) {
			server.Cleanup()
		}
		return nil, err
	}
	return server, nil
}

// openOrJoin opens the server. A member that joins first gets the list of members from the others, and retries if that
// changes meanwhile.
func (s *Store) openOrJoin(ctx context.Context, o openOptions) (*etcdserver.EtcdServer, error) {
	if !o.join {
		return s.open(o)
	}
	const attempts = 10
	for attempt := 1; ; attempt++ {
		var err error
		if o.members, err = s.awaitMemberList(ctx); ctx.Err() != nil {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		server, err := s.open(o)
		if err == nil || attempt == attempts || errors.Is(err, ErrFailed) {
			return server, err
		}
		s.log.Info("cannot join the other members yet, trying again", "err", err)
		sleep(ctx, joinRetryInterval)
	}
}

// attachPeers connects the address book and the mesh with the opened server.
func (s *Store) attachPeers(server *etcdserver.EtcdServer) error {
	if err := s.book.Identify(server.Cluster().ID().String(), server.MemberID().String()); err != nil {
		return err
	}
	s.mesh.Attach(server, s.zap)
	if err := s.syncAddressBook(server); err != nil {
		return err
	}
	if len(s.book.Get().Others) == 0 {
		return nil
	}
	return s.mesh.Open()
}

// compareData compares this member's data with that of the other members that answer, before it takes part.
func (s *Store) compareData(server *etcdserver.EtcdServer) error {
	compared := make(chan error, 1)
	go func() { compared <- server.CorruptionChecker().InitialCheck() }()
	select {
	case err := <-compared:
		if err != nil {
			return errorkind.Permanent(fmt.Errorf("%w: %w; %s", ErrCorrupt, err, joinAnew(s.cfg.Dir)))
		}
		return nil
	case <-s.failStop.failed:
		return s.failStop.err
	}
}

// open calls newServer, and returns if newServer fails with a fatal message, after which it never returns itself.
func (s *Store) open(o openOptions) (*etcdserver.EtcdServer, error) {
	type result struct {
		server *etcdserver.EtcdServer
		err    error
	}
	opened := make(chan result, 1)
	go func() {
		defer func() {
			if p := recover(); p != nil {
				s.failStop.fail(fmt.Errorf("panic: %v", p))
			}
		}()
		server, err := newServer(s.cfg, o, s.zap)
		opened <- result{server, err}
	}()
	select {
	case r := <-opened:
		return r.server, r.err
	case <-s.failStop.failed:
		return nil, s.failStop.err
	}
}

// awaitStart starts raft and waits until the member takes part in the cluster, or ctx ends.
func (s *Store) awaitStart(ctx context.Context, server *etcdserver.EtcdServer) error {
	server.Start()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go campaign(ctx, server)
	participates := make(chan struct{})
	go awaitParticipation(ctx, server, participates)
	waiting := time.NewTimer(waitingLogDelay)
	defer waiting.Stop()
	for {
		select {
		case <-server.ReadyNotify():
			return nil
		case <-participates:
			return nil
		case <-ctx.Done():
			return nil
		case <-server.StoppingNotify():
			return ErrRemoved // etcd stops by itself for no other reason
		case <-s.mesh.Removed():
			return ErrRemoved
		case <-s.failStop.failed:
			return s.failStop.err
		case <-waiting.C:
			s.log.Info("waiting for a majority of the datastore's members", "members", len(s.book.All()))
		}
	}
}

// awaitParticipation closes participates when the member has a vote and has completed a linearizable read. It may never do
// so. etcd itself calls a member ready when its name has been committed to the log. If the first proposal of the name is
// lost, as when a new member receives the leader's snapshot at that moment, etcd repeats it only after seven seconds, and
// nothing depends on it.
func awaitParticipation(ctx context.Context, server *etcdserver.EtcdServer, participates chan<- struct{}) {
	tick := time.NewTicker(participationInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A new member believes that it is a voter until it has applied the entries that it was sent. A read index request
		// that it sends before is repeated and answered more than once, and each unexpected answer blocks etcd's raft loop
		// for a second, when the others may already need the vote of this member.
		applied := server.AppliedIndex()
		if applied == 0 || applied < server.CommittedIndex() {
			continue
		}
		if len(server.Cluster().Members()) < 2 || server.Leader() == types.ID(raft.None) || server.IsLearner() {
			continue
		}
		try, cancel := context.WithTimeout(ctx, participationTimeout)
		err := server.LinearizableReadNotify(try)
		cancel()
		if err == nil {
			close(participates)
			return
		}
	}
}

// participationInterval is the interval at which awaitParticipation checks, and participationTimeout bounds its read.
const (
	participationInterval = 50 * time.Millisecond
	participationTimeout  = time.Second
)

// serve returns nil when ctx has ended, and an error if the store ended first.
func (s *Store) serve(ctx context.Context, server *etcdserver.EtcdServer, t *transport) error {
	go t.gate.watchLeader(s.cfg.Election)

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		if len(otherVoters(server)) > 0 {
			s.releaseOwnDefragLock(ctx, t)
		}
		newSpaceManager(s.cfg.Defrag, s.log, &serverDatabase{store: s, server: server, transport: t, dir: s.cfg.Dir}).run(ctx)
	})
	wg.Go(func() { s.reconcileMembers(ctx, server) })
	wg.Go(func() { t.disk.watch(ctx) })
	if s.cfg.Witness {
		wg.Go(func() { s.yield(ctx, server) })
	}
	wg.Go(func() { s.watchLog(ctx) })
	leadCtx, stopLeading := context.WithCancel(context.WithoutCancel(ctx))
	defer stopLeading()
	wg.Go(func() { s.watchLeadership(leadCtx, server, t) })

	var err error
	select {
	case <-ctx.Done():
		s.handOverBeforeStop(ctx)
	case <-server.StoppingNotify():
		err = ErrRemoved // etcd stops by itself for no other reason
	case <-s.mesh.Removed():
		err = ErrRemoved
	case <-s.failStop.failed:
		err = s.failStop.err
	}
	cancel()
	stopLeading()
	if err != nil {
		t.gate.shut() // calls in flight must not delay the goroutines that are waited for below
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		wg.Wait()
	}()
	select {
	case <-ended:
	case <-s.failStop.failed:
	}
	s.leadership.Set(Leadership{})
	return err
}

// handOverBeforeStop transfers the leadership before a stop, so that the other members need not wait for an election
// timeout.
func (s *Store) handOverBeforeStop(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), handOverTimeout)
	defer cancel()
	if err := s.HandOver(ctx); err != nil {
		s.log.Warn("cannot transfer the leadership before the stop", "err", err)
	}
}

// close stops the server after committing everything to the database file, and closes the log. g is nil if there were no
// clients yet. If the store has failed, or fails meanwhile, close does not wait.
func (s *Store) close(server *etcdserver.EtcdServer, g *gate) error {
	if g != nil {
		g.shut()
	}
	select {
	case <-s.failStop.failed:
		return nil // the caller has the error already
	default:
	}

	closed := make(chan struct{})
	go func() {
		defer close(closed)
		if g != nil {
			g.close()
		}
		s.mesh.Detach()
		// HardStop commits pending changes to the database file. It transfers no leadership; that was done before.
		server.HardStop()
	}()
	select {
	case <-closed:
		return nil
	case <-s.failStop.failed:
		return s.failStop.err
	}
}

// Check reports whether the store answers linearizable reads and accepts writes. It takes at most two seconds.
func (s *Store) Check(ctx context.Context) error {
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	if !t.gate.hasLeader() {
		return ErrNoLeader
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if _, err := (kvClient{t}).Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)}); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if t.disk.writesRefused.Load() {
		return fmt.Errorf("%w: make room in %s; changes are refused, deletions are not", ErrDiskFull, s.cfg.Dir)
	}
	for _, alarm := range t.server.Alarms() {
		if alarm.Alarm == pb.AlarmType_CORRUPT {
			return ErrCorrupt
		}
		return fmt.Errorf("%w: alarm %v", ErrNoSpace, alarm.Alarm)
	}
	return nil
}

// sleep waits for d, or until ctx ends.
func sleep(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}
