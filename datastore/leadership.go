package datastore

import (
	"context"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/raft/v3"
)

// leadership publishes who leads.
type leadership struct {
	mu      sync.Mutex // guards what follows
	now     Leadership
	changed chan struct{} // closed at the next change
}

// Leadership returns who leads the store, and a channel that is closed when that has changed. It can be called
// at any time: nobody leads a store that is not open.
func (s *Store) Leadership() (Leadership, <-chan struct{}) { return s.leadership.get() }

func newLeadership() *leadership { return &leadership{changed: make(chan struct{})} }

func (l *leadership) get() (Leadership, <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.now, l.changed
}

func (l *leadership) set(now Leadership) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.now == now {
		return
	}
	l.now = now
	close(l.changed)
	l.changed = make(chan struct{})
}

const (
	// regardLeader is how often raft's state is looked at when there are several members. It tells of a new leader,
	// but not that one is lost.
	regardLeader = 100 * time.Millisecond
	// confirmTime is how long a majority may take to confirm that this member leads.
	confirmTime = 500 * time.Millisecond
)

// watchLeadership publishes who leads until ctx ends.
//
// A member that is cut off believes that it leads for up to two election timeouts more. Until a majority has
// answered it in this term, it is not published as leading; and what it writes afterwards cannot be committed.
func (s *Store) watchLeadership(ctx context.Context, server *etcdserver.EtcdServer, t *transport) {
	ticker := time.NewTicker(regardLeader)
	defer ticker.Stop()
	tick, opened := ticker.C, s.mesh.opened
	select {
	case <-opened:
		opened = nil
	default:
		// Alone, nothing changes by itself.
		ticker.Stop()
	}
	self := server.MemberID()
	var confirmed uint64 // the term in which this member is known to lead; zero if none
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
		s.leadership.set(now)
		if id == self && confirmed == 0 {
			sleep(ctx, regardLeader)
			continue
		}
		select {
		case <-ctx.Done():
		case <-changed:
		case <-opened:
			opened = nil
			ticker.Reset(regardLeader)
		case <-tick:
		}
	}
}

// confirm asks a majority whether this member still leads.
func (s *Store) confirm(ctx context.Context, t *transport) bool {
	ctx, cancel := context.WithTimeout(ctx, confirmTime)
	defer cancel()
	_, err := kvClient{t}.Range(ctx, &pb.RangeRequest{Key: []byte(checkKey)})
	return err == nil
}

// Describe says who leads, where there are several members.
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
		return "nobody leads"
	}
}
