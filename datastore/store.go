package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/raft/v3"
	"go.uber.org/zap"

	"kedge/internal/logging"
)

// Store is the datastore of one server of the cluster: one raft member with its log and its database.
//
//	new ──Run──► opening ──► serving ──► stopped
//	                │           │
//	                └──► failed ◄┘
//
// It runs once. After a failure the process has to end, because goroutines of etcd stay parked (see failStop)
// with their locks held and their files open.
type Store struct {
	cfg  Config
	log  *slog.Logger
	zap  *zap.Logger
	stop *failStop

	leadership *leadership

	ran       atomic.Bool
	transport atomic.Pointer[transport] // nil unless serving
}

const (
	// slowApply is how long etcd may take over one entry before it says so.
	slowApply = 500 * time.Millisecond
	// checkKey is read, and not expected to exist, by Check.
	checkKey = "/kedge/health"
)

// New returns a store that is not yet open. It only keeps its arguments; cfg must be valid.
func New(cfg Config, log *slog.Logger) *Store {
	s := &Store{cfg: cfg, log: log, stop: newFailStop(), leadership: newLeadership()}
	s.zap = logging.Zap(log).WithOptions(zap.WrapCore(newQuietCore), zap.WithFatalHook(s.stop), zap.WithPanicHook(s.stop))
	return s
}

// Name implements the component contract.
func (s *Store) Name() string { return "datastore" }

// Run opens the store and serves until ctx ends. It calls ready when clients work. Everything that was
// acknowledged is on disk at any moment; stopping in order only makes the next start shorter.
//
// After an error that is ErrFailed the process must end.
func (s *Store) Run(ctx context.Context, ready func()) (err error) {
	if s.ran.Swap(true) {
		return errors.New("a datastore runs only once")
	}
	began := time.Now()

	release, err := openDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("open %s: %w", s.cfg.Dir, err)
	}
	defer func() {
		// While parts of a failed store may still be at work in the directory, it stays locked.
		if !errors.Is(err, ErrFailed) {
			err = errors.Join(err, release())
		}
	}()

	size, _, err := volume(s.cfg.Dir)
	if err != nil {
		return err
	}
	server, err := s.open(s.cfg.quota(size))
	if err != nil {
		return err
	}
	if err := s.await(ctx, server); err != nil {
		return errors.Join(err, s.close(server, nil))
	}
	if ctx.Err() != nil {
		return s.close(server, nil)
	}
	if err := markCreated(s.cfg.Dir); err != nil {
		return errors.Join(err, s.close(server, nil))
	}

	g := newGate(func() bool { return uint64(server.Leader()) != raft.None })
	t := newTransport(server, g, s.stop.fail)
	s.transport.Store(t)
	defer s.transport.Store(nil)

	s.log.Info("datastore open", "member", server.MemberID().String(), "revision", server.KV().Rev(),
		"bytes", server.Backend().Size(), "took", time.Since(began).Round(time.Millisecond))
	ready()

	err = s.serve(ctx, server, t)
	return errors.Join(err, s.close(server, g))
}

// open is newServer with a way out: a fatal message in it never returns.
func (s *Store) open(quota int64) (*etcdserver.EtcdServer, error) {
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
		server, err := newServer(s.cfg, quota, s.zap)
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
	select {
	case <-server.ReadyNotify():
		return nil
	case <-ctx.Done():
		return nil
	case <-server.StopNotify():
		return errors.New("etcd stopped before it was ready")
	case <-s.stop.failed:
		return s.stop.err
	}
}

// serve returns nil when ctx has ended, and an error if the store ended first.
func (s *Store) serve(ctx context.Context, server *etcdserver.EtcdServer, t *transport) error {
	go t.gate.watchLeader(s.cfg.Election)

	keeperCtx, cancel := context.WithCancel(ctx)
	kept := make(chan struct{})
	go func() {
		defer close(kept)
		newKeeper(s.cfg.Defrag, s.log, &serverSpace{server: server, transport: t, dir: s.cfg.Dir}).run(keeperCtx)
	}()

	var err error
	select {
	case <-ctx.Done():
	case <-server.StopNotify():
		err = fmt.Errorf("%w: etcd stopped by itself", ErrFailed)
	case <-s.stop.failed:
		err = s.stop.err
	}
	cancel()
	select {
	case <-kept:
	case <-s.stop.failed:
	}
	return err
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
		server.Stop() // commits to the database file what is not yet in it
	}()
	select {
	case <-closed:
		return nil
	case <-s.stop.failed:
		return s.stop.err
	}
}

// Check reports whether the store answers reads that see every acknowledged write, and takes writes.
func (s *Store) Check(ctx context.Context) error {
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	if _, err := (kvClient{t}).Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)}); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	alarms, err := maintenanceClient{t}.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET})
	if err != nil {
		return fmt.Errorf("list alarms: %w", err)
	}
	if len(alarms.Alarms) > 0 {
		return fmt.Errorf("%w: alarm %v", ErrNoSpace, alarms.Alarms[0].Alarm)
	}
	return nil
}
