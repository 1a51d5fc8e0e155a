package external

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.uber.org/zap"

	"kedge/datastore"
	"kedge/internal/errorkind"
	"kedge/internal/lifecycle"
	"kedge/internal/logging"
)

// Server is the server of the cluster that uses the etcd.
type Server struct {
	Name    string
	Cluster string // the hash of the cluster's authority
	Port    uint16 // of the API
	// Known means that the server has taken part in the etcd before, or was admitted by a server that does: what the etcd says of
	// the cluster must not be missing.
	Known bool
}

// Store is an external etcd, as one server of the cluster uses it. It runs once.
type Store struct {
	cfg   Config
	self  Server
	log   *slog.Logger
	zap   *zap.Logger
	times times

	leaders   *datastore.Leaders
	wake      lifecycle.Wakeup // something may have changed
	onEntered func() error     // see OnEntered; may be nil
	onRemoved func() error     // see OnRemoved; may be nil

	client  *clientv3.Client // set by Run before serving
	serving atomic.Bool

	mu        sync.Mutex // guards the fields below
	waiting   string     // what a start waits for; empty if nothing
	addresses []netip.Addr
	lease     clientv3.LeaseID // zero: none
	deadline  time.Time        // until when this server may trust its lease
	expiry    *time.Timer      // calls expire then; nil before the first lease
	seen      map[string]time.Time
}

// times are variable for tests.
type times struct {
	ttl    time.Duration // of the lease, in whole seconds
	margin time.Duration // by which this server gives up its lease before the etcd can end it
	renew  time.Duration // interval of renewals
	answer time.Duration // bounds a request
	retry  time.Duration // after a failure
}

// defaultTimes are those of Kubernetes' own elections: a busy machine must not lose its leadership, and another leads soon enough.
var defaultTimes = times{ttl: 15 * time.Second, margin: 3 * time.Second, renew: 2 * time.Second, answer: 3 * time.Second, retry: 500 * time.Millisecond}

// checkWithin bounds a check; lifecycle.CheckLimit is hardly longer.
const checkWithin = lifecycle.CheckLimit - 200*time.Millisecond

// New returns a store that is not connected yet. It only stores its arguments; cfg must be valid.
func New(cfg Config, self Server, addresses []netip.Addr, log *slog.Logger) *Store {
	return &Store{
		cfg: cfg, self: self, log: log, times: defaultTimes,
		// The client warns of each try; the store says once that the etcd does not answer.
		zap:     logging.Zap(log).WithOptions(zap.IncreaseLevel(zap.ErrorLevel)),
		leaders: datastore.NewLeaders(), wake: lifecycle.NewWakeup(), addresses: addresses, seen: map[string]time.Time{},
	}
}

// Name implements lifecycle.Component. The name is that of kedge's own datastore, in whose place it is.
func (s *Store) Name() string { return "datastore" }

// OnEntered makes Run call note when the server has become one of the cluster in the etcd, and OnRemoved when it was removed. Call
// them before Run.
func (s *Store) OnEntered(note func() error) { s.onEntered = note }

// OnRemoved: see OnEntered.
func (s *Store) OnRemoved(note func() error) { s.onRemoved = note }

// SetAddresses sets the addresses of this machine, for the list of servers. It may be called at any time.
func (s *Store) SetAddresses(addresses []netip.Addr) {
	s.mu.Lock()
	s.addresses = addresses
	s.mu.Unlock()
	s.wake.Wake()
}

// Leadership returns the leader of the cluster, and a channel that is closed when it has changed. It may be called at any time.
func (s *Store) Leadership() (datastore.Leadership, <-chan struct{}) {
	now, changed := s.leaders.Get()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !time.Now().Before(s.deadline) { // a process that was paused learns of the end of its lease here
		now = datastore.Leadership{}
	}
	return now, changed
}

// Run waits for the etcd and takes part in it until ctx ends. It calls ready when clients work. After ErrRemoved the server has no
// place in the cluster any more.
func (s *Store) Run(ctx context.Context, ready func()) (err error) {
	if s.client, err = s.dial(30*time.Second, 10*time.Second); err != nil {
		return err
	}
	defer s.client.Close()
	if err := s.await(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	s.wait("")
	s.log.Info("external etcd connected", "endpoints", s.cfg.String())
	s.serving.Store(true)
	defer s.serving.Store(false)
	defer logging.Interrupted(false)
	ready()
	return s.take(ctx)
}

// dial returns a client of the etcd. It does not connect yet.
func (s *Store) dial(pingAfter, pingWithin time.Duration) (*clientv3.Client, error) {
	var secure *tls.Config
	if s.cfg.secure() {
		c, err := s.cfg.tls()
		if err != nil {
			return nil, errorkind.Permanent(err)
		}
		secure = c
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: s.cfg.Endpoints, TLS: secure, Logger: s.zap,
		DialTimeout: 20 * time.Second, DialKeepAliveTime: pingAfter, DialKeepAliveTimeout: pingWithin, // as kube-apiserver has them
	})
	if err != nil {
		return nil, fmt.Errorf("make a client of the external etcd: %w", err)
	}
	return c, nil
}

// NewClient returns a client of the etcd for the API server, which closes it.
func (s *Store) NewClient() (*kubernetes.Client, error) {
	if !s.serving.Load() {
		return nil, datastore.ErrNotServing
	}
	c, err := s.dial(30*time.Second, 10*time.Second)
	if err != nil {
		return nil, err
	}
	k := &kubernetes.Client{Client: c}
	k.Kubernetes = k
	return k, nil
}

// wait sets what a start waits for, and logs it once.
func (s *Store) wait(what string) {
	s.mu.Lock()
	first := s.waiting == ""
	s.waiting = what
	s.mu.Unlock()
	if first && what != "" {
		s.log.Warn("waiting for the external etcd, without which this server does not start", "err", what)
	}
}

// await returns when the etcd answers and this server is one of its cluster, or when ctx ends. Its errors do not pass by themselves.
func (s *Store) await(ctx context.Context) error {
	for {
		err := s.probeAll(ctx)
		if err == nil {
			err = s.enter(ctx)
		}
		if err == nil || ctx.Err() != nil {
			return nil
		}
		if errorkind.ExitCode(err) == errorkind.ExitConfig || errors.Is(err, datastore.ErrRemoved) {
			return err
		}
		s.wait(err.Error())
		sleep(ctx, s.times.retry)
	}
}

// probeAll returns nil if an etcd answers at one endpoint. Of several errors it returns one that does not pass by itself, if there
// is one.
func (s *Store) probeAll(ctx context.Context) error {
	errs := make([]error, len(s.cfg.Endpoints))
	var wg sync.WaitGroup
	for i, e := range s.cfg.Endpoints {
		wg.Go(func() { errs[i] = s.probe(ctx, e) })
	}
	wg.Wait()
	var permanent error
	works := false
	for _, err := range errs {
		works = works || err == nil
		if errorkind.ExitCode(err) == errorkind.ExitConfig {
			permanent = err
		}
	}
	switch {
	case works && permanent != nil:
		s.log.Warn("an endpoint of the external etcd cannot be used, and others work", "err", permanent)
		return nil
	case works:
		return nil
	case permanent != nil:
		return permanent
	}
	return errors.Join(errs...)
}

// Check implements lifecycle.Checker: whether the etcd answers linearizable reads and accepts writes.
func (s *Store) Check(ctx context.Context) error {
	if !s.serving.Load() {
		return datastore.ErrNotServing
	}
	ctx, cancel := context.WithTimeout(ctx, checkWithin)
	defer cancel()
	if _, err := s.client.Get(ctx, clusterKey, clientv3.WithCountOnly()); err != nil {
		return fmt.Errorf("the external etcd does not answer at %s: %w", s.cfg, err)
	}
	alarms, err := s.client.AlarmList(ctx)
	if err != nil {
		return fmt.Errorf("the external etcd does not answer at %s: %w", s.cfg, err)
	}
	for _, a := range alarms.Alarms {
		if a.Alarm == pb.AlarmType_NOSPACE {
			return fmt.Errorf("%w: the external etcd refuses changes; compact and defragment it there, and end its alarm", datastore.ErrNoSpace)
		}
		return fmt.Errorf("the external etcd has raised the alarm %v", a.Alarm)
	}
	return nil
}

// Describe implements lifecycle.Describer.
func (s *Store) Describe() string {
	s.mu.Lock()
	waiting := s.waiting
	s.mu.Unlock()
	switch now, _ := s.Leadership(); {
	case waiting != "":
		return "waiting for the external etcd: " + waiting
	case now.Leading:
		return "external etcd, leads"
	case now.Leader != "":
		return "external etcd, led by " + now.Leader
	}
	return "external etcd, no leader"
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
