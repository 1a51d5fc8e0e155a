package datastore

import (
	"bytes"
	"context"
	"encoding/json"
	"slices"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/types"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
)

const (
	// reconcileInterval is the interval of reconciliations.
	reconcileInterval = 500 * time.Millisecond
	// reconcileTimeout bounds each change that a reconciliation makes.
	reconcileTimeout = 3 * time.Second
	// unstartedTimeout is the time after which a member that was admitted and has not started is removed.
	unstartedTimeout = 30 * time.Minute
	// unknownPeerTimeout is the time after which a published address without a member is deleted. An admission publishes
	// the address first.
	unknownPeerTimeout = time.Minute
)

// reconcileMembers keeps the address book, the published addresses and the list of members consistent until ctx ends. On
// the leader it also promotes learners that have caught up.
func (s *Store) reconcileMembers(ctx context.Context, server *etcdserver.EtcdServer) {
	// A store that stays alone has nothing to reconcile.
	select {
	case <-ctx.Done():
		return
	case <-s.mesh.Opened():
	}
	ticker := time.NewTicker(reconcileInterval)
	defer ticker.Stop()
	unstarted := map[string]time.Time{}    // learners that have not started, and when this leader first saw them
	unknownPeers := map[string]time.Time{} // published addresses without a member, and when this leader first saw them
	for {
		if err := s.syncAddressBook(server); err != nil {
			s.log.Warn("cannot update the address book of the datastore's members", "err", err)
		}
		t := s.transport.Load()
		if t != nil && t.gate.hasLeader() {
			s.publishSelf(ctx, server, t)
			if server.Leader() == server.MemberID() {
				s.promote(ctx, server)
				s.removeUnstartedLearners(ctx, server, unstarted)
				s.deleteUnknownPeers(ctx, server, t, unknownPeers)
			} else {
				clear(unstarted)
				clear(unknownPeers)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// syncAddressBook updates the address book from the store: the members and their published addresses.
func (s *Store) syncAddressBook(server *etcdserver.EtcdServer) error {
	published, err := publishedPeers(server)
	if err != nil {
		return err
	}
	for _, m := range server.Cluster().Members() {
		id := m.ID.String()
		if len(m.PeerURLs) == 1 && indexPeer(published, id) < 0 {
			published = append(published, Peer{ID: id, Name: m.Name, URL: m.PeerURLs[0]})
		}
		if m.ID == server.MemberID() && len(m.PeerURLs) == 1 {
			if err := s.book.SetSelfURL(m.PeerURLs[0]); err != nil {
				return err
			}
		}
	}
	return s.mesh.Sync(published)
}

// publishedPeers returns the published addresses in this member's copy of the store.
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

// publishSelf publishes the addresses of this member if the store has others.
func (s *Store) publishSelf(ctx context.Context, server *etcdserver.EtcdServer, t *transport) {
	peers, err := publishedPeers(server)
	if err != nil {
		return
	}
	self := s.book.Self()
	if i := indexPeer(peers, self.ID); i >= 0 && peers[i].Seq == self.Seq && peers[i].Witness == self.Witness && slices.Equal(peers[i].Addresses, self.Addresses) {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	if err := s.publishPeer(ctx, t, self); err != nil {
		s.log.Debug("cannot publish the addresses of this member", "err", err)
	}
}

// promote makes voters of the learners that have caught up.
func (s *Store) promote(ctx context.Context, server *etcdserver.EtcdServer) {
	for _, m := range learners(server) {
		if m.Name == "" || !s.mesh.Status(m.ID.String()).Alive(time.Now()) {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
		_, err := server.PromoteMember(ctx, uint64(m.ID))
		cancel()
		if err != nil {
			s.log.Debug("learner is not promoted yet", "name", m.Name, "err", err)
			continue
		}
		s.log.Info("member of the datastore has caught up and votes", "name", m.Name, "member", m.ID.String())
	}
}

// removeUnstartedLearners removes learners that have not started within unstartedTimeout of their admission.
func (s *Store) removeUnstartedLearners(ctx context.Context, server *etcdserver.EtcdServer, unstarted map[string]time.Time) {
	now := time.Now()
	for _, m := range learners(server) {
		id := m.ID.String()
		switch since, known := unstarted[id]; {
		case m.Name != "" || s.mesh.Status(id).Alive(now):
			delete(unstarted, id)
		case !known:
			unstarted[id] = now
		case now.Sub(since) > unstartedTimeout:
			delete(unstarted, id)
			ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
			err := s.removeMember(ctx, server, nil, m)
			cancel()
			if err != nil {
				s.log.Warn("cannot remove a member that never started", "member", id, "err", err)
			}
		}
	}
}

// deleteUnknownPeers deletes published addresses without a member: those of removed members at once, others after
// unknownPeerTimeout, because their admission may be in progress.
func (s *Store) deleteUnknownPeers(ctx context.Context, server *etcdserver.EtcdServer, t *transport, unknownPeers map[string]time.Time) {
	peers, err := publishedPeers(server)
	if err != nil {
		return
	}
	now := time.Now()
	for _, p := range peers {
		id, err := types.IDFromString(p.ID)
		if err == nil && server.Cluster().Member(id) != nil {
			delete(unknownPeers, p.ID)
			continue
		}
		if err == nil && !server.IsIDRemoved(uint64(id)) {
			since, known := unknownPeers[p.ID]
			if !known {
				unknownPeers[p.ID] = now
			}
			if !known || now.Sub(since) < unknownPeerTimeout {
				continue
			}
		}
		delete(unknownPeers, p.ID)
		if err := s.deletePeer(ctx, t, p.ID); err != nil {
			s.log.Debug("cannot delete the addresses of an unknown peer", "err", err)
		}
	}
}

func learners(server *etcdserver.EtcdServer) []*membership.Member {
	return slices.DeleteFunc(server.Cluster().Members(), func(m *membership.Member) bool { return !m.IsLearner })
}

func indexPeer(peers []Peer, id string) int {
	return slices.IndexFunc(peers, func(p Peer) bool { return p.ID == id })
}
