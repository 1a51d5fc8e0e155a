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
	// defragLockKey exists while a member defragments, bound to a lease.
	defragLockKey = "/kedge/rewriting"
	// defragLockTTL bounds a defragmentation, and the time for which a member that dies during one and stays away blocks the
	// others.
	defragLockTTL = 10 * time.Minute
	// defragUnlockTimeout bounds the release of the lock.
	defragUnlockTimeout = 5 * time.Second
)

// errNotNow means that the member cannot defragment now, and will try again later.
var errNotNow = errors.New("not now")

// releaseOwnDefragLock releases the lock that this member took before it was killed during a defragmentation, if it did. It
// retries until a majority has answered, or ctx ends.
func (s *Store) releaseOwnDefragLock(ctx context.Context, t *transport) {
	for ctx.Err() == nil {
		err := s.tryReleaseOwnDefragLock(ctx, t)
		if err == nil {
			return
		}
		s.log.Debug("cannot look for a defrag lock from before this start; trying again", "err", err)
		sleep(ctx, joinRetryInterval)
	}
}

func (s *Store) tryReleaseOwnDefragLock(ctx context.Context, t *transport) error {
	ctx, cancel := context.WithTimeout(ctx, defragUnlockTimeout)
	defer cancel()
	held, err := kvClient{t}.Range(ctx, &pb.RangeRequest{Key: []byte(defragLockKey)})
	if err != nil || len(held.Kvs) == 0 || string(held.Kvs[0].Value) != s.cfg.MemberName {
		return err
	}
	_, err = leaseClient{t}.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: held.Kvs[0].Lease})
	return err
}

// withDefragLock runs do, which makes this member unresponsive for a moment, while the others can do without it: all voters
// answer, this member does not lead, and no other member holds the lock. The lock need not be strict: two members that
// defragment at once only cost speed.
func (s *Store) withDefragLock(ctx context.Context, server *etcdserver.EtcdServer, do func() error) error {
	voters := otherVoters(server)
	if len(voters) == 0 {
		return do()
	}
	for _, m := range voters {
		if !s.mesh.Status(m.ID.String()).Alive(time.Now()) {
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
	lease, err := leaseClient{t}.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: int64(defragLockTTL.Seconds())})
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), defragUnlockTimeout)
		defer cancel()
		if _, err := (leaseClient{t}).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: lease.ID}); err != nil {
			s.log.Debug("cannot release the defrag lock", "err", err)
		}
	}()
	key := []byte(defragLockKey)
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
		return fmt.Errorf("%w: another member is defragmenting", errNotNow)
	}
	return do()
}
