package datastore

import (
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
)

const (
	// turnKey is there while a member rewrites its database file, bound to a lease.
	turnKey = "/kedge/rewriting"
	// turnTime is how long that may take, and how long a member that died over it holds the others up.
	turnTime = 10 * time.Minute
	// turnEnd is how long giving the turn back may take.
	turnEnd = 5 * time.Second
)

// errNotNow means that a member may not stop for a moment now; there will be another time.
var errNotNow = errors.New("not now")

// inTurn does what stops this member for a moment when the others can do without it: all of them answer, this one
// does not lead, and nobody else does the same. The key in the store is for politeness: if two had it, only
// speed would be lost.
func (s *Store) inTurn(ctx context.Context, server *etcdserver.EtcdServer, do func() error) error {
	voters := otherVoters(server)
	if len(voters) == 0 {
		return do()
	}
	for _, m := range voters {
		if !s.mesh.reach(m.ID.String()).alive(time.Now()) {
			return fmt.Errorf("%w: member %s does not answer", errNotNow, s.nameOf(server, m.ID))
		}
	}
	if server.Leader() == server.MemberID() {
		if err := s.HandOver(ctx); err != nil {
			return fmt.Errorf("%w: %w", errNotNow, err)
		}
	}
	t := s.transport.Load()
	if t == nil {
		return ErrNotServing
	}
	lease, err := leaseClient{t}.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: int64(turnTime.Seconds())})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), turnEnd)
		defer cancel()
		if _, err := (leaseClient{t}).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: lease.ID}); err != nil {
			s.log.Debug("give the turn back", "err", err)
		}
	}()
	key := []byte(turnKey)
	taken, err := kvClient{t}.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{
			Key: key, Target: pb.Compare_CREATE, Result: pb.Compare_EQUAL,
			TargetUnion: &pb.Compare_CreateRevision{CreateRevision: 0},
		}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{
			RequestPut: &pb.PutRequest{Key: key, Value: []byte(s.cfg.MemberName), Lease: lease.ID},
		}}},
	})
	if err != nil {
		return err
	}
	if !taken.Succeeded {
		return fmt.Errorf("%w: another member does", errNotNow)
	}
	return do()
}
