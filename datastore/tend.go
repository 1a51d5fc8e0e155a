package datastore

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

const (
	// tendEvery is how often the members are looked after.
	tendEvery = 500 * time.Millisecond
	// tendTime is how long one change for them may take.
	tendTime = 3 * time.Second
	// orphanAfter is how long a member that was admitted may take to come, before it is taken out again.
	orphanAfter = 30 * time.Minute
	// strangerTime is how long an address may be in the store before the member that it belongs to.
	strangerTime = time.Minute
)

// tend keeps the book, the store and the members in step until ctx ends, and on the leader it gives a vote to
// members that have caught up.
func (s *Store) tend(ctx context.Context, server *etcdserver.EtcdServer) {
	// A store that stays alone has nothing to look after.
	select {
	case <-ctx.Done():
		return
	case <-s.mesh.opened:
	}
	ticker := time.NewTicker(tendEvery)
	defer ticker.Stop()
	waiting := map[string]time.Time{}   // learners that have not started, and since when this leader knows them
	strangers := map[string]time.Time{} // who has an address in the store, but is no member
	for {
		if err := s.adopt(server); err != nil {
			s.log.Warn("keep the members' addresses", "err", err)
		}
		t := s.transport.Load()
		if t != nil && t.gate.hasLeader() {
			s.publishSelf(ctx, server, t)
			if server.Leader() == server.MemberID() {
				s.promote(ctx, server)
				s.dropOrphans(ctx, server, waiting)
				s.forgetStrangers(ctx, server, t, strangers)
			} else {
				clear(waiting)
				clear(strangers)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// adopt brings the book up to what the store holds: its members, and where they are.
func (s *Store) adopt(server *etcdserver.EtcdServer) error {
	if _, err := s.book.retain(s.mesh.isMember); err != nil {
		return err
	}
	peers, err := publishedPeers(server)
	if err != nil {
		return err
	}
	for _, m := range server.Cluster().Members() {
		id := m.ID.String()
		if len(m.PeerURLs) == 1 && indexPeer(peers, id) < 0 {
			peers = append(peers, Peer{ID: id, Name: m.Name, URL: m.PeerURLs[0]})
		}
		if m.ID == server.MemberID() && len(m.PeerURLs) == 1 {
			if err := s.book.settle(m.PeerURLs[0]); err != nil {
				return err
			}
		}
	}
	s.mesh.learn(peers)
	s.mesh.reconcile()
	return nil
}

// publishedPeers is where the members are by this member's copy of the store.
func publishedPeers(server *etcdserver.EtcdServer) ([]Peer, error) {
	prefix := []byte(peersPrefix)
	found, err := server.KV().Range(context.Background(), prefix, []byte(clientv3.GetPrefixRangeEnd(peersPrefix)), mvcc.RangeOptions{})
	if err != nil {
		return nil, err
	}
	var peers []Peer
	for _, kv := range found.KVs {
		var p Peer
		if json.Unmarshal(kv.Value, &p) == nil && bytes.Equal(kv.Key, []byte(peersPrefix+p.ID)) {
			peers = append(peers, p)
		}
	}
	return peers, nil
}

// publishSelf writes where this member is into the store, if it says otherwise.
func (s *Store) publishSelf(ctx context.Context, server *etcdserver.EtcdServer, t *transport) {
	peers, err := publishedPeers(server)
	if err != nil {
		return
	}
	self := s.book.self()
	if i := indexPeer(peers, self.ID); i >= 0 && peers[i].Seq == self.Seq && slices.Equal(peers[i].Addresses, self.Addresses) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tendTime)
	defer cancel()
	if err := s.publish(ctx, t, self); err != nil {
		s.log.Debug("publish this member's addresses", "err", err)
	}
}

// promote gives a vote to the learners that have caught up.
func (s *Store) promote(ctx context.Context, server *etcdserver.EtcdServer) {
	for _, m := range learners(server) {
		if m.Name == "" || !s.mesh.reach(m.ID.String()).alive(time.Now()) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, tendTime)
		_, err := server.PromoteMember(ctx, uint64(m.ID))
		cancel()
		if err != nil {
			s.log.Debug("member does not get a vote yet", "name", m.Name, "err", err)
			continue
		}
		s.log.Info("member of the datastore has caught up and votes", "name", m.Name, "member", m.ID.String())
	}
}

// dropOrphans takes learners out that were admitted and have not come for a long time.
func (s *Store) dropOrphans(ctx context.Context, server *etcdserver.EtcdServer, waiting map[string]time.Time) {
	now := time.Now()
	for _, m := range learners(server) {
		id := m.ID.String()
		switch since, known := waiting[id]; {
		case m.Name != "" || s.mesh.reach(id).alive(now):
			delete(waiting, id)
		case !known:
			waiting[id] = now
		case now.Sub(since) > orphanAfter:
			delete(waiting, id)
			ctx, cancel := context.WithTimeout(ctx, tendTime)
			err := s.removeMember(ctx, server, nil, m)
			cancel()
			if err != nil {
				s.log.Warn("take out a member that never came", "member", id, "err", err)
			}
		}
	}
}

// forgetStrangers takes the addresses of those who are no members out of the store: removed ones at once, others
// when their admission has had the time to succeed.
func (s *Store) forgetStrangers(ctx context.Context, server *etcdserver.EtcdServer, t *transport, strangers map[string]time.Time) {
	peers, err := publishedPeers(server)
	if err != nil {
		return
	}
	now := time.Now()
	for _, p := range peers {
		id, err := parseID(p.ID)
		if err == nil && server.Cluster().Member(id) != nil {
			delete(strangers, p.ID)
			continue
		}
		if err == nil && !server.IsIDRemoved(uint64(id)) {
			since, known := strangers[p.ID]
			if !known {
				strangers[p.ID] = now
			}
			if !known || now.Sub(since) < strangerTime {
				continue
			}
		}
		delete(strangers, p.ID)
		if err := s.forget(ctx, t, p.ID); err != nil {
			s.log.Debug("forget the addresses of who is no member", "err", err)
		}
	}
}

func learners(server *etcdserver.EtcdServer) []*membership.Member {
	return slices.DeleteFunc(server.Cluster().Members(), func(m *membership.Member) bool { return !m.IsLearner })
}
