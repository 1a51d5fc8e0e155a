package datastore

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/raft/v3"

	"kedge/internal/logging"
)

// Leaders publishes the leader of a datastore, [Store] or another. Use [NewLeaders].
type Leaders struct {
	// interrupted is called with true when the leader is lost, and with false when there is one again.
	interrupted func(bool)

	mu      sync.Mutex // guards the fields below
	now     Leadership
	known   bool          // there was a leader before
	changed chan struct{} // closed by the next change
}

// Leadership returns the leader of the store, and a channel that is closed when it has changed. It may be called at any
// time. A store that is not open has no leader.
func (s *Store) Leadership() (Leadership, <-chan struct{}) { return s.leadership.Get() }

// NewLeaders returns a Leaders without a leader, which tells the log of outages.
func NewLeaders() *Leaders {
	return &Leaders{interrupted: logging.Interrupted, changed: make(chan struct{})}
}

// Get returns the leader, and a channel that is closed when it has changed.
func (l *Leaders) Get() (Leadership, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.changed
}

// Set publishes the leader.
func (l *Leaders) Set(now Leadership) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now == now {
		return
	}
	switch {
	case !l.known:
		l.known = now.Leader != "" // the first leader ends no outage
	case now.Leader == "":
		l.interrupted(true)
	case now.Leader != l.now.Leader:
		// Calls that the former leader did not answer fail now, even if there was no time without a leader.
		l.interrupted(false)
	}
	l.now = now
	close(l.changed)
	l.changed = make(chan struct{})
}

const (
	// leaderPollInterval is the interval at which raft's state is polled if there are several members. Raft notifies of a
	// new leader, but not of the loss of one.
	leaderPollInterval = 100 * time.Millisecond
	// confirmTimeout bounds the confirmation of a majority that this member leads.
	confirmTimeout = 500 * time.Millisecond
)

// watchLeadership publishes the leader until ctx ends.
//
// A leader that is cut off believes for up to two more election timeouts that it leads. It is published as leading only
// after a majority has answered it in this term, and cannot commit anything once it is cut off.
func (s *Store) watchLeadership(ctx context.Context, server *etcdserver.EtcdServer, t *transport) {
	ticker := time.NewTicker(leaderPollInterval)
	defer ticker.Stop()
	tick, opened := ticker.C, s.mesh.Opened()
	select {
	case <-opened:
		opened = nil
	default:
		// The leadership of a store with one member does not change.
		ticker.Stop()
	}
	self := server.MemberID()
	var confirmed uint64 // the term in which a majority confirmed that this member leads; zero if none
	for ctx.Err() == nil {
		changed := server.LeaderChangedNotify()
		id := server.Leader()
		switch {
		case id != self:
			confirmed = 0
		case confirmed == 0 || confirmed != server.Term():
			confirmed = 0
			if s.confirm(ctx, t) && server.Leader() == self {
				confirmed = server.Term()
			}
		}
		now := Leadership{Leading: confirmed != 0, Term: server.Term()}
		if uint64(id) != raft.None {
			now.Leader = s.nameOf(server, id)
		}
		s.leadership.Set(now)
		if id == self && confirmed == 0 {
			sleep(ctx, leaderPollInterval)
			continue
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-opened:
			opened = nil
			ticker.Reset(leaderPollInterval)
		case <-tick:
		}
	}
}

// yieldInterval is the interval at which a witness checks whether it leads, and tries again to hand over.
const yieldInterval = 100 * time.Millisecond

// yield hands the leadership of a witness over whenever it leads, until ctx ends. With two servers and a witness, the
// witness may be the only one that has the last entries of a server that died: then it must lead until the other server
// has them.
func (s *Store) yield(ctx context.Context, server *etcdserver.EtcdServer) {
	ticker := time.NewTicker(yieldInterval)
	defer ticker.Stop()
	for {
		changed := server.LeaderChangedNotify()
		tick := ticker.C
		if server.Leader() != server.MemberID() {
			tick = nil // the notification is enough
		} else if err := s.HandOver(ctx); err != nil {
			s.log.Debug("the witness leads, and no server takes the leadership over yet", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		case <-tick:
		}
	}
}

// confirm reports whether a majority confirms that this member leads.
func (s *Store) confirm(ctx context.Context, t *transport) bool {
	ctx, cancel := context.WithTimeout(ctx, confirmTimeout)
	defer cancel()
	_, err := kvClient{t}.Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)})
	return err == nil
}

// Describe names the leader if there are several members.
func (s *Store) Describe() string {
	t := s.transport.Load()
	if t == nil || len(t.server.Cluster().Members()) < 2 {
		return ""
	}
	switch now, _ := s.Leadership(); {
	case now.Leading:
		return "leads"
	case now.Leader != "":
		return "led by " + now.Leader
	default:
		return "no leader"
	}
}
