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
)

const (
	// peersPrefix has the members' addresses in the store, below it their IDs.
	peersPrefix = "/kedge/peers/"
	// listTime is how long a majority may take to confirm the list of members.
	listTime = 3 * time.Second
	// settleTime is how long a change of members waits for connections to be old enough for etcd, which wants to
	// have seen them for five seconds.
	settleTime, settleEvery = 15 * time.Second, 250 * time.Millisecond
	// maxWaiting is how many learners there may be before the one that has been away longest makes way.
	maxWaiting = 4
)

// Members returns the members of the store, as a majority has agreed on them, or as far as this one knows if
// there is none: then with the members and with ErrNoLeader.
func (s *Store) Members(ctx context.Context) ([]Member, error) {
	t := s.transport.Load()
	if t == nil {
		return nil, ErrNotServing
	}
	a, err := t.gate.enter(ctx)
	if err != nil {
		return nil, err
	}
	defer a.leave()
	agreed, err := s.agreed(a.ctx, t.server)
	if err != nil {
		agreed, err = t.server.Cluster().Members(), fmt.Errorf("%w: %w", ErrNoLeader, err)
	}
	members := make([]Member, 0, len(agreed))
	for _, m := range agreed {
		members = append(members, s.describe(t, m))
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	return members, err
}

// agreed is the list of members that a majority confirms. An election meanwhile is no reason to give up.
func (s *Store) agreed(ctx context.Context, server *etcdserver.EtcdServer) ([]*membership.Member, error) {
	ctx, cancel := context.WithTimeout(ctx, listTime)
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
		out.Addresses = s.book.self().Addresses
		if out.Reachable = t.gate.hasLeader(); out.Reachable {
			out.LastSeen = time.Now()
		}
		return out
	}
	if p, ok := s.book.other(id); ok {
		out.Addresses = p.Addresses
	}
	r := s.mesh.reach(id)
	out.LastSeen, out.Reachable = r.seen, r.alive(time.Now())
	return out
}

// nameOf is the name of a member. One that has not started yet has told only the book.
func (s *Store) nameOf(server *etcdserver.EtcdServer, id types.ID) string {
	if m := server.Cluster().Member(id); m != nil && m.Name != "" {
		return m.Name
	}
	for _, p := range s.book.all() {
		if p.ID == id.String() {
			return p.Name
		}
	}
	return id.String()
}

// Admit makes room for a new member of the given name, which is reached at addresses, and returns what it
// needs to start. The addresses have ports, because members on one machine have different ones.
//
// It begins as a learner, which changes nothing for the others until it is there and has caught up; from then
// on it has a vote, without anybody's doing.
//
// Admit may be called on any member, and takes up to half a minute if members have just come or gone. A name of
// a member that has never started, or is dead, is taken over: the dead one is removed first, if a majority stays
// alive (else ErrQuorum). A living one is ErrMemberExists. A member that was admitted and never came does not
// stand in the way of others.
func (s *Store) Admit(ctx context.Context, name string, addresses []netip.AddrPort) (Admission, error) {
	if name == "" || len(addresses) == 0 {
		return Admission{}, errors.New("a member needs a name and an address")
	}
	if !s.cfg.Peer.enabled() {
		return Admission{}, ErrNoPeers
	}
	var out Admission
	err := s.change(ctx, func(ctx context.Context, t *transport) (err error) {
		out, err = s.admit(ctx, t, name, addresses)
		return err
	})
	if err != nil {
		return Admission{}, fmt.Errorf("admit %s: %w", name, err)
	}
	return out, nil
}

// change makes one change of the members.
func (s *Store) change(ctx context.Context, do func(context.Context, *transport) error) error {
	s.admitting.Lock()
	defer s.admitting.Unlock()
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	// Not as one that needs a majority: a change may begin with another leader, and has limits of its own.
	a, err := t.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer a.leave()
	if err := do(a.ctx, t); err != nil {
		return a.reason(err)
	}
	return nil
}

func (s *Store) admit(ctx context.Context, t *transport, name string, addresses []netip.AddrPort) (Admission, error) {
	server := t.server
	if len(s.book.self().Addresses) == 0 {
		return Admission{}, errors.New("this machine has no address by which another could reach it")
	}
	members, err := s.agreed(ctx, server)
	if err != nil {
		return Admission{}, err
	}
	if err := s.settleAddress(ctx, server, members); err != nil {
		return Admission{}, err
	}
	if err := s.mesh.open(); err != nil {
		return Admission{}, err
	}
	var waiting []*membership.Member
	for _, m := range members {
		switch {
		case s.nameOf(server, m.ID) == name:
			if err := s.replace(ctx, server, members, m); err != nil {
				return Admission{}, err
			}
		case m.IsLearner:
			waiting = append(waiting, m)
		}
	}
	if len(waiting) >= maxWaiting {
		if err := s.dropWaiting(ctx, server, waiting); err != nil {
			return Admission{}, err
		}
	}

	peer := Peer{Name: name, URL: s.freeURL(members), Addresses: addresses}
	urls, err := types.NewURLs([]string{peer.URL})
	if err != nil {
		return Admission{}, err
	}
	now := time.Now()
	learner := membership.NewMemberAsLearner("", urls, "", &now)
	peer.ID = learner.ID.String()
	// The others must know where it is before raft on them does anything with it.
	if err := s.publish(ctx, t, peer); err != nil {
		return Admission{}, err
	}
	if err := s.settled(ctx, func(ctx context.Context) error { _, err := server.AddMember(ctx, *learner); return err }); err != nil {
		return Admission{}, errors.Join(err, s.forget(context.WithoutCancel(ctx), t, peer.ID))
	}
	out := Admission{Cluster: server.Cluster().ID().String(), Name: name, ID: peer.ID, URL: peer.URL}
	for _, p := range s.book.all() {
		if p.ID != peer.ID {
			out.Members = append(out.Members, p)
		}
	}
	s.mesh.learn([]Peer{peer})
	s.mesh.kick() // so that the others hear of it at once
	s.log.Info("member of the datastore admitted", "name", name, "member", peer.ID)
	return out, nil
}

// settleAddress gives the only member of a store its address on loopback, if it was created without one.
func (s *Store) settleAddress(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member) error {
	self := s.book.self()
	if len(members) != 1 || len(members[0].PeerURLs) == 1 && members[0].PeerURLs[0] == self.URL {
		return nil
	}
	m := *members[0]
	m.PeerURLs = []string{self.URL}
	_, err := server.UpdateMember(ctx, m)
	return err
}

// replace removes a member whose name is wanted by another, unless it lives.
func (s *Store) replace(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member, m *membership.Member) error {
	if m.ID == server.MemberID() || m.Name != "" && s.mesh.reach(m.ID.String()).alive(time.Now()) {
		return ErrMemberExists
	}
	return s.removeMember(ctx, server, members, m)
}

// dropWaiting removes the learner that is least likely to come.
func (s *Store) dropWaiting(ctx context.Context, server *etcdserver.EtcdServer, waiting []*membership.Member) error {
	oldest := slices.MinFunc(waiting, func(a, b *membership.Member) int {
		if (a.Name == "") != (b.Name == "") { // never started
			if a.Name == "" {
				return -1
			}
			return 1
		}
		return s.mesh.reach(a.ID.String()).seen.Compare(s.mesh.reach(b.ID.String()).seen)
	})
	if s.mesh.reach(oldest.ID.String()).alive(time.Now()) {
		return fmt.Errorf("%d members are catching up already, wait for one of them", len(waiting))
	}
	return s.removeMember(ctx, server, nil, oldest)
}

// freeURL is an address on loopback that no member has.
func (s *Store) freeURL(members []*membership.Member) string {
	for {
		u := newVirtualURL()
		if !slices.ContainsFunc(members, func(m *membership.Member) bool { return slices.Contains(m.PeerURLs, u) }) {
			return u
		}
	}
}

// settled does a change that etcd refuses while connections are new, until it does not any more.
func (s *Store) settled(ctx context.Context, change func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	for {
		err := change(ctx)
		if !errors.Is(err, etcderrors.ErrUnhealthy) {
			return err
		}
		sleep(ctx, settleEvery)
		if ctx.Err() != nil {
			return fmt.Errorf("%w: not all members are connected with each other", ErrQuorum)
		}
	}
}

// Remove removes the member of the given name, alive or dead. It refuses with ErrQuorum if the members that
// remain could not decide anything any more. The removed member finds out, and its Run returns ErrRemoved; that
// may be this one.
func (s *Store) Remove(ctx context.Context, name string) error {
	err := s.change(ctx, func(ctx context.Context, t *transport) error {
		members, err := s.agreed(ctx, t.server)
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
		// A leader that removes itself leaves the others to find out by waiting.
		if err := s.HandOver(ctx); err != nil {
			return err
		}
		remove = func(ctx context.Context) error { return s.removeSelf(ctx, server) }
	}
	name := s.nameOf(server, m.ID)
	if err := s.settled(ctx, remove); err != nil {
		return err
	}
	s.log.Info("member of the datastore removed", "name", name, "member", m.ID.String())
	if m.ID == server.MemberID() {
		return nil // and soon there is nothing left to look after
	}
	return s.adopt(server)
}

// removeSelf returns when this member is removed. The others may decide it and then have nothing to do with this
// member any more, so that its raft never hears of it; they say so when they are asked.
func (s *Store) removeSelf(ctx context.Context, server *etcdserver.EtcdServer) error {
	done := make(chan error, 1)
	go func() {
		_, err := server.RemoveMember(ctx, uint64(server.MemberID()))
		done <- err
	}()
	ticker := time.NewTicker(settleEvery)
	defer ticker.Stop()
	for {
		select {
		case err := <-done:
			select {
			case <-server.StoppingNotify(): // nobody stops it as long as we are inside the gate, but it itself
				return nil
			default:
			}
			if s.mesh.isRemoved() {
				return nil
			}
			return err
		case <-s.mesh.removed:
			return nil
		case <-ticker.C:
			s.mesh.kick()
		}
	}
}

// guardQuorum refuses the removal of a voter after which the voters that live would be no majority. One that has
// just come back gets the time to answer.
func (s *Store) guardQuorum(ctx context.Context, server *etcdserver.EtcdServer, members []*membership.Member, leaves *membership.Member) error {
	ctx, cancel := context.WithTimeout(ctx, helloTime)
	defer cancel()
	for {
		voters, living := s.votersWithout(server, members, leaves)
		switch {
		case voters == 0:
			return fmt.Errorf("%w: it is the only member that has a vote", ErrQuorum)
		case living >= voters/2+1:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("%w: of the %d that would remain %d would be alive", ErrQuorum, voters, living)
		}
		s.mesh.kick()
		sleep(ctx, settleEvery)
	}
}

// votersWithout counts the voters, and those of them that live, without one.
func (s *Store) votersWithout(server *etcdserver.EtcdServer, members []*membership.Member, leaves *membership.Member) (voters, living int) {
	for _, m := range members {
		if m.IsLearner || m.ID == leaves.ID {
			continue
		}
		voters++
		if m.ID == server.MemberID() || s.mesh.reach(m.ID.String()).alive(time.Now()) {
			living++
		}
	}
	return voters, living
}

// HandOver makes another member the leader, if this one is and there is one that can be. It does nothing, and
// succeeds, if this one does not lead or is alone. Run does it by itself before it stops.
func (s *Store) HandOver(ctx context.Context) error {
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	a, err := t.gate.enter(ctx)
	if err != nil {
		return err
	}
	defer a.leave()
	server := t.server
	if server.Leader() != server.MemberID() {
		return nil
	}
	candidates := otherVoters(server)
	if len(candidates) == 0 {
		return nil
	}
	now := time.Now()
	candidates = slices.DeleteFunc(candidates, func(m *membership.Member) bool { return !s.mesh.reach(m.ID.String()).alive(now) })
	slices.SortStableFunc(candidates, func(a, b *membership.Member) int {
		return cmp.Compare(s.mesh.reach(b.ID.String()).applied, s.mesh.reach(a.ID.String()).applied)
	})
	err = errors.New("no other member that could lead answers")
	for _, m := range candidates {
		// Raft gives a transfer up after an election timeout.
		ctx, cancel := context.WithTimeout(a.ctx, s.cfg.Election)
		err = server.MoveLeader(ctx, uint64(server.MemberID()), uint64(m.ID))
		cancel()
		if err == nil || server.Leader() != server.MemberID() {
			return nil
		}
	}
	return fmt.Errorf("hand leadership over: %w", err)
}

// otherVoters are the members with a vote besides this one.
func otherVoters(server *etcdserver.EtcdServer) []*membership.Member {
	return slices.DeleteFunc(server.Cluster().Members(), func(m *membership.Member) bool {
		return m.IsLearner || m.ID == server.MemberID()
	})
}

// publish writes where a member is into the store.
func (s *Store) publish(ctx context.Context, t *transport, p Peer) error {
	data, err := json.Marshal(p)
	if err != nil {
		return err
	}
	_, err = kvClient{t}.Put(ctx, &pb.PutRequest{Key: []byte(peersPrefix + p.ID), Value: data})
	return err
}

// forget takes a member's addresses out of the store.
func (s *Store) forget(ctx context.Context, t *transport, id string) error {
	ctx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	_, err := kvClient{t}.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(peersPrefix + id)})
	return err
}
