package datastore

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
	etcderrors "go.etcd.io/etcd/server/v3/etcdserver/errors"

	"kedge/datastore/peers"
)

const (
	// peersPrefix is the prefix of the keys with the members' published addresses; the ID of the member follows.
	peersPrefix = "/kedge/peers/"
	// memberListTimeout bounds the confirmation of the list of members by a majority.
	memberListTimeout = 3 * time.Second
	// changeTimeout bounds a change of members. etcd refuses changes until the connections between members are five
	// seconds old; changeRetryInterval is the interval of retries.
	changeTimeout, changeRetryInterval = 15 * time.Second, 250 * time.Millisecond
	// maxPendingLearners is the number of learners at which an admission removes the one that was seen least recently.
	maxPendingLearners = 4
)

// Members returns the members of the store, confirmed by a majority. Without a majority it returns the members that this
// one knows, together with ErrNoLeader.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	t := s.transport.Load()
	if t == nil {
		return nil, ErrNotServing
	}
	c, err := t.gate.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer c.leave()
	list, err := s.agreedMembers(c.ctx, t.server)
	if err != nil {
		list, err = t.server.Cluster().Members(), fmt.Errorf("%w: %w", ErrNoLeader, err)
	}
	members := make([]Member, 0, len(list))
	for _, m := range list {
		members = append(members, s.describe(t, m))
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return members, err
}

// agreedMembers returns the list of members that a majority confirms. It retries if the leader changes meanwhile.
func (s *Store) agreedMembers(ctx context.Context, server *etcdserver.EtcdServer) ([]*membership.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, memberListTimeout)
	defer cancel()
	for {
		members, err := server.MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		if !errors.Is(err, etcderrors.ErrLeaderChanged) || ctx.Err() != nil {
			return members, err
		}
	}
}

func (s *Store) describe(t *transport, m *membership.Member) Member {
	id := m.ID.String()
	out := Member{
		Name: s.nameOf(t.server, m.ID), ID: id,
		Self: m.ID == t.server.MemberID(), Leader: m.ID == t.server.Leader(),
		Learner: m.IsLearner, Started: m.Name != "",
	}
	if out.Self {
		out.Addresses, out.Witness = s.book.Self().Addresses, s.cfg.Witness
		if out.Reachable = t.gate.hasLeader(); out.Reachable {
			out.LastSeen = time.Now()
		}
		return out
	}
	if p, ok := s.book.Other(id); ok {
		out.Addresses, out.Witness = p.Addresses, p.Witness
	}
	r := s.mesh.Status(id)
	out.LastSeen, out.Reachable = r.LastSeen, r.Alive(time.Now())
	return out
}

// nameOf returns the name of a member. The name of a member that has not started yet is in the address book only.
func (s *Store) nameOf(server *etcdserver.EtcdServer, id types.ID) string {
	if m := server.Cluster().Member(id); m != nil && m.Name != "" {
		return m.Name
	}
	for _, p := range s.book.All() {
		if p.ID == id.String() {
			return p.Name
		}
	}
	return id.String()
}

// Admit adds a new member with the given name and addresses, and returns the data with which the member can start. The
// addresses have ports, because members on one machine use different ones.
//
// The new member is a learner at first, which does not count for the majority. The leader promotes it to a voter when it
// has caught up.
//
// Admit may be called on any member, and takes up to half a minute if members have just been added or removed. It replaces
// a member of the same name that has never started or is dead: it removes the old one first, if that leaves a majority of
// members alive (else ErrQuorum). If the member of that name is alive, the error is ErrMemberExists. Members that were
// admitted and never started do not block further admissions.
func (s *Store) Admit(ctx context.Context, name string, addresses []netip.AddrPort) (Admission, error) {
	return s.admitPeer(ctx, Peer{Name: name, Addresses: addresses})
}

// AdmitWitness is [Store.Admit] for a member whose Config.Witness is set.
func (s *Store) AdmitWitness(ctx context.Context, name string, addresses []netip.AddrPort) (Admission, error) {
	return s.admitPeer(ctx, Peer{Name: name, Addresses: addresses, Witness: true})
}

// admitPeer admits a new member, of which ID and URL are chosen here.
func (s *Store) admitPeer(ctx context.Context, added Peer) (Admission, error) {
	if added.Name == "" || len(added.Addresses) == 0 {
		return Admission{}, errors.New("a member needs a name and an address")
	}
	if !s.cfg.Peer.Enabled() {
		return Admission{}, ErrNoPeers
	}
	var out Admission
	err := s.change(ctx, func(ctx context.Context, t *transport) (err error) {
		out, err = s.admit(ctx, t, added)
		return err
	})
	if err != nil {
		return Admission{}, fmt.Errorf("admit %s: %w", added.Name, err)
	}
	return out, nil
}

// change runs do, which changes the members, while no other change is in progress.
func (s *Store) change(ctx context.Context, do func(context.Context, *transport) error) error {
	s.membershipMu.Lock()
	defer s.membershipMu.Unlock()
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	// The change does not enter as a call that requires a majority: it survives an election, and has its own timeouts.
	c, err := t.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer c.leave()
	if err := do(c.ctx, t); err != nil {
		return c.reason(err)
	}
	return nil
}

func (s *Store) admit(ctx context.Context, t *transport, peer Peer) (Admission, error) {
	server := t.server
	if len(s.book.Self().Addresses) == 0 {
		return Admission{}, errors.New("this machine has no address at which other members can reach it")
	}
	members, err := s.agreedMembers(ctx, server)
	if err != nil {
		return Admission{}, err
	}
	if err := s.setLoopbackURL(ctx, server, members); err != nil {
		return Admission{}, err
	}
	if err := s.mesh.Open(); err != nil {
		return Admission{}, err
	}
	var pending []*membership.Member
	for _, m := range members {
		switch {
		case s.nameOf(server, m.ID) == peer.Name:
			if err := s.replace(ctx, server, members, m); err != nil {
				return Admission{}, err
			}
		case m.IsLearner:
			pending = append(pending, m)
		}
	}
	if len(pending) >= maxPendingLearners {
		if err := s.removePendingLearner(ctx, server, pending); err != nil {
			return Admission{}, err
		}
	}

	peer.URL = s.freeURL(members)
	urls, err := types.NewURLs([]string{peer.URL})
	if err != nil {
		return Admission{}, err
	}
	now := time.Now()
	learner := membership.NewMemberAsLearner("", urls, "", &now)
	peer.ID = learner.ID.String()
	// The other members need the address before their raft connects to the new member.
	if err := s.publishPeer(ctx, t, peer); err != nil {
		return Admission{}, err
	}
	if err := s.retryUnhealthy(ctx, func(ctx context.Context) error { _, err := server.AddMember(ctx, *learner); return err }); err != nil {
		return Admission{}, errors.Join(err, s.deletePeer(context.WithoutCancel(ctx), t, peer.ID))
	}
	out := Admission{Cluster: server.Cluster().ID().String(), Name: peer.Name, ID: peer.ID, URL: peer.URL}
	for _, p := range s.book.All() {
		if p.ID != peer.ID {
			out.Members = append(out.Members, p)
		}
	}
	s.mesh.Learn([]Peer{peer})
	s.mesh.ProbeNow() // tells the other members at once
	s.log.Info("member of the datastore admitted", "name", peer.Name, "member", peer.ID)
	return out, nil
}

// setLoopbackURL gives the only member of a store its loopback address, if an older kedge created the store without one.
func (s *Store) setLoopbackURL(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member) error {
	self := s.book.Self()
	if len(members) != 1 || len(members[0].PeerURLs) == 1 && members[0].PeerURLs[0] == self.URL {
		return nil
	}
	m := *members[0]
	m.PeerURLs = []string{self.URL}
	_, err := server.UpdateMember(ctx, m)
	return err
}

// replace removes a member whose name a new one takes over, unless the member is alive.
func (s *Store) replace(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member, m *membership.Member) error {
	if m.ID == server.MemberID() || m.Name != "" && s.mesh.Status(m.ID.String()).Alive(time.Now()) {
		return ErrMemberExists
	}
	return s.removeMember(ctx, server, members, m)
}

// removePendingLearner removes the learner that is least likely to start: one that never has, or was seen least recently.
func (s *Store) removePendingLearner(ctx context.Context, server *etcdserver.EtcdServer, pending []*membership.Member) error {
	oldest := slices.MinFunc(pending, func(a, b *membership.Member) int {
		if (a.Name == "") != (b.Name == "") { // never started
			if a.Name == "" {
				return -1
			}
			return 1
		}
		return s.mesh.Status(a.ID.String()).LastSeen.Compare(s.mesh.Status(b.ID.String()).LastSeen)
	})
	if s.mesh.Status(oldest.ID.String()).Alive(time.Now()) {
		return fmt.Errorf("%d members are still catching up: wait until one of them has a vote", len(pending))
	}
	return s.removeMember(ctx, server, nil, oldest)
}

// freeURL returns a peer URL with a loopback address that no member has.
func (s *Store) freeURL(members []*membership.Member) string {
	for {
		u := peers.NewLoopbackURL()
		if !slices.ContainsFunc(members, func(m *membership.Member) bool { return slices.Contains(m.PeerURLs, u) }) {
			return u
		}
	}
}

// retryUnhealthy retries a change for as long as etcd refuses it because connections between members are too new.
func (s *Store) retryUnhealthy(ctx context.Context, change func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, changeTimeout)
	defer cancel()
	for {
		err := change(ctx)
		if !errors.Is(err, etcderrors.ErrUnhealthy) {
			return err
		}
		sleep(ctx, changeRetryInterval)
		if ctx.Err() != nil {
			return fmt.Errorf("%w: not all members are connected with each other", ErrQuorum)
		}
	}
}

// Remove removes the member of the given name, alive or dead. It fails with ErrQuorum if the remaining members would have
// no majority alive. The removed member, which may be this one, learns of it, and its Run returns ErrRemoved.
func (s *Store) Remove(ctx context.Context, name string) error {
	err := s.change(ctx, func(ctx context.Context, t *transport) error {
		members, err := s.agreedMembers(ctx, t.server)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(members, func(m *membership.Member) bool { return s.nameOf(t.server, m.ID) == name })
		if i < 0 {
			return ErrNoMember
		}
		return s.removeMember(ctx, t.server, members, members[i])
	})
	if err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

func (s *Store) removeMember(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member, m *membership.Member) error {
	if !m.IsLearner {
		if err := s.guardQuorum(ctx, server, members, m); err != nil {
			return err
		}
	}
	remove := func(ctx context.Context) error { _, err := server.RemoveMember(ctx, uint64(m.ID)); return err }
	if m.ID == server.MemberID() {
		// If a leader removed itself, the others would wait for an election timeout.
		if err := s.HandOver(ctx); err != nil {
			return err
		}
		remove = func(ctx context.Context) error { return s.removeSelf(ctx, server) }
	}
	name := s.nameOf(server, m.ID)
	if err := s.retryUnhealthy(ctx, remove); err != nil {
		return err
	}
	s.log.Info("member of the datastore removed", "name", name, "member", m.ID.String())
	if m.ID == server.MemberID() {
		return nil // this member stops, and needs no address book any more
	}
	return s.syncAddressBook(server)
}

// removeSelf removes this member, and returns when that is done. The others may commit the removal and close their
// connections before this member's raft learns of it; then they report it in their answers to heartbeats.
func (s *Store) removeSelf(ctx context.Context, server *etcdserver.EtcdServer) error {
	done := make(chan error, 1)
	go func() {
		_, err := server.RemoveMember(ctx, uint64(server.MemberID()))
		done <- err
	}()
	ticker := time.NewTicker(changeRetryInterval)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			select {
			case <-server.StoppingNotify(): // while this call is inside the gate, only a removal stops etcd
				return nil
			default:
			}
			select {
			case <-s.mesh.Removed():
				return nil
			default:
			}
			return err
		case <-s.mesh.Removed():
			return nil
		case <-ticker.C:
			s.mesh.ProbeNow()
		}
	}
}

// guardQuorum refuses the removal of a voter if the remaining voters would have no majority alive, or would all be
// witnesses. It waits for one heartbeat, so that voters that have just come back count.
func (s *Store) guardQuorum(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member, leaves *membership.Member) error {
	ctx, cancel := context.WithTimeout(ctx, peers.HeartbeatTimeout)
	defer cancel()
	for {
		voters, alive := s.votersWithout(server, members, leaves)
		switch {
		case voters == 0:
			return fmt.Errorf("%w: it is the only voting member", ErrQuorum)
		case !s.isWitness(leaves.ID) && !slices.ContainsFunc(members, func(m *membership.Member) bool {
			return !m.IsLearner && m.ID != leaves.ID && !s.isWitness(m.ID)
		}):
			return fmt.Errorf("%w: only witnesses would remain", ErrQuorum)
		case alive >= voters/2+1:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%w: only %d of the %d remaining voting members are alive", ErrQuorum, alive, voters)
		}
		s.mesh.ProbeNow()
		sleep(ctx, changeRetryInterval)
	}
}

// votersWithout counts the voters besides the one that leaves, and those of them that are alive.
func (s *Store) votersWithout(server *etcdserver.EtcdServer, members []*membership.Member, leaves *membership.Member) (voters, alive int) {
	for _, m := range members {
		if m.IsLearner || m.ID == leaves.ID {
			continue
		}
		voters++
		if m.ID == server.MemberID() || s.mesh.Status(m.ID.String()).Alive(time.Now()) {
			alive++
		}
	}
	return voters, alive
}

// HandOver transfers the leadership to another member that is no witness. If this member does not lead or has no other such
// voter, HandOver does nothing and succeeds. Run hands over by itself before it stops.
func (s *Store) HandOver(ctx context.Context) error {
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	c, err := t.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer c.leave()
	server := t.server
	if server.Leader() != server.MemberID() {
		return nil
	}
	candidates := slices.DeleteFunc(otherVoters(server), func(m *membership.Member) bool { return s.isWitness(m.ID) })
	if len(candidates) == 0 {
		return nil
	}
	now := time.Now()
	candidates = slices.DeleteFunc(candidates, func(m *membership.Member) bool { return !s.mesh.Status(m.ID.String()).Alive(now) })
	slices.SortStableFunc(candidates, func(a, b *membership.Member) int {
		return cmp.Compare(s.mesh.Status(b.ID.String()).Applied, s.mesh.Status(a.ID.String()).Applied)
	})
	err = errors.New("no other voting member answers")
	for _, m := range candidates {
		// Raft aborts a transfer after an election timeout.
		ctx, cancel := context.WithTimeout(c.ctx, s.cfg.Election)
		err = server.MoveLeader(ctx, uint64(server.MemberID()), uint64(m.ID))
		cancel()
		if err == nil || server.Leader() != server.MemberID() {
			return nil
		}
	}
	return fmt.Errorf("transfer leadership: %w", err)
}

// isWitness reports whether a member is a witness.
func (s *Store) isWitness(id types.ID) bool {
	p, _ := s.book.Other(id.String())
	return p.Witness || s.book.Self().ID == id.String() && s.cfg.Witness
}

// otherVoters returns the voters besides this member.
func otherVoters(server *etcdserver.EtcdServer) []*membership.Member {
	return slices.DeleteFunc(server.Cluster().Members(), func(m *membership.Member) bool {
		return m.IsLearner || m.ID == server.MemberID()
	})
}

// publishPeer writes the addresses of a member to the store.
func (s *Store) publishPeer(ctx context.Context, t *transport, p Peer) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = kvClient{t}.Put(ctx, &pb.PutRequest{Key: []byte(peersPrefix + p.ID), Value: data})
	return err
}

// deletePeer deletes the addresses of a member from the store.
func (s *Store) deletePeer(ctx context.Context, t *transport, id string) error {
	ctx, cancel := context.WithTimeout(ctx, memberListTimeout)
	defer cancel()
	_, err := kvClient{t}.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(peersPrefix + id)})
	return err
}
