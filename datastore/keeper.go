package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/server/v3/etcdserver"
)

// keeper keeps the database file from growing without end. Compaction, which the API server does, frees pages
// inside the file; only rewriting the file gives them back to the file system.
//
// It also brings a store back that has reached its quota and refuses writes. etcd leaves that to a human, and
// the API server cannot help: its compactions begin with a write.
type keeper struct {
	cfg   DefragConfig
	log   *slog.Logger
	space space

	lastApplied uint64
	// wantedSince is when rewriting was first wanted, or zero.
	wantedSince time.Time
	// emptied is the revision up to which a full store has been compacted and rewritten.
	emptied int64
}

// space is what the keeper needs of the server.
type space interface {
	usage() (usage, error)
	// compact drops all history before revision.
	compact(ctx context.Context, revision int64) error
	// defragment rewrites the file.
	defragment(context.Context) error
	// clearFull allows writes again.
	clearFull(context.Context) error
}

// usage is the state of the space at one moment, sizes in bytes.
type usage struct {
	total    int64 // of the file
	inUse    int64 // of that, as of the last commit but one
	free     int64 // on the volume
	quota    int64
	full     bool   // writes are refused because the file has reached its quota
	applied  uint64 // raft entries so far
	revision int64
}

const (
	// defragSlack is what must be free on the volume beyond the copy that is made.
	defragSlack = 16 << 20
	// refillLevel is the part of the quota below which a full store takes writes again.
	refillLevel = 0.9
)

func newKeeper(cfg DefragConfig, log *slog.Logger, s space) *keeper {
	return &keeper{cfg: cfg, log: log, space: s}
}

func (k *keeper) run(ctx context.Context) {
	ticker := time.NewTicker(k.cfg.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			if err := k.tick(ctx, now); err != nil && ctx.Err() == nil {
				k.log.Warn("datastore space", "err", err)
			}
		}
	}
}

// tick is one look at the space.
func (k *keeper) tick(ctx context.Context, now time.Time) error {
	u, err := k.space.usage()
	if err != nil {
		return err
	}
	busy := float64(u.applied-k.lastApplied) > k.cfg.QuietRate*k.cfg.Interval.Seconds()
	k.lastApplied = u.applied
	if u.full {
		return k.empty(ctx, u)
	}

	if u.total <= k.cfg.MinSize || float64(u.total-u.inUse) <= k.cfg.MaxFree*float64(u.total) {
		k.wantedSince = time.Time{}
		return nil
	}
	if k.wantedSince.IsZero() {
		k.wantedSince = now
	}
	if busy && now.Sub(k.wantedSince) < k.cfg.Patience {
		return nil
	}
	k.wantedSince = time.Time{}
	_, err = k.rewrite(ctx, u)
	return err
}

// empty makes room in a store that is full. There is no quiet moment to wait for, since no write gets through,
// but deletions do; so it is worth trying whenever the revision has moved. The history that is dropped makes
// some clients list again.
func (k *keeper) empty(ctx context.Context, u usage) error {
	room := refillLevel * float64(u.quota)
	if float64(u.total) >= room {
		if u.revision == k.emptied {
			return nil
		}
		// What is deleted from here on is for the next time.
		upTo := u.revision
		if err := k.space.compact(ctx, upTo); err != nil {
			return fmt.Errorf("compact: %w", err)
		}
		var err error
		if u, err = k.rewrite(ctx, u); err != nil {
			return err
		}
		k.emptied = upTo
		if float64(u.total) >= room {
			k.log.Warn("datastore full, delete something", "bytes", u.total, "quota", u.quota)
			return nil
		}
	}
	if err := k.space.clearFull(ctx); err != nil {
		return fmt.Errorf("allow writes again: %w", err)
	}
	k.log.Info("datastore below its quota again, taking writes", "bytes", u.total, "quota", u.quota)
	return nil
}

// rewrite rewrites the file and returns the usage after that.
func (k *keeper) rewrite(ctx context.Context, before usage) (usage, error) {
	if need := before.inUse + defragSlack; before.free < need {
		return before, fmt.Errorf("cannot defragment: needs %d bytes, the volume has %d free", need, before.free)
	}
	began := time.Now()
	if err := k.space.defragment(ctx); err != nil {
		return before, err
	}
	after, err := k.space.usage()
	if err != nil {
		return before, err
	}
	k.log.Info("datastore defragmented", "before", before.total, "after", after.total, "took", time.Since(began).Round(time.Millisecond))
	return after, nil
}

// serverSpace is the space of a running server.
type serverSpace struct {
	store     *Store
	server    *etcdserver.EtcdServer
	transport *transport
	dir       string
}

func (s *serverSpace) usage() (usage, error) {
	_, free, err := volume(s.dir)
	if err != nil {
		return usage{}, err
	}
	backend := s.server.Backend()
	return usage{
		total:    backend.Size(),
		inUse:    backend.SizeInUse(),
		free:     free,
		quota:    s.server.Cfg.QuotaBackendBytes,
		full:     len(s.alarms()) > 0,
		applied:  s.server.AppliedIndex(),
		revision: s.server.KV().Rev(),
	}, nil
}

// alarms are this member's own, and those of members that are gone. A member sees to its own space only: one
// alarm stops the writes of all, and the one whose file is full knows when that is over.
func (s *serverSpace) alarms() (noSpace []*pb.AlarmMember) {
	for _, alarm := range s.server.Alarms() {
		if alarm.Alarm != pb.AlarmType_NOSPACE {
			continue
		}
		if alarm.MemberID == uint64(s.server.MemberID()) || s.server.IsIDRemoved(alarm.MemberID) {
			noSpace = append(noSpace, alarm)
		}
	}
	return noSpace
}

func (s *serverSpace) compact(ctx context.Context, revision int64) error {
	_, err := kvClient{s.transport}.Compact(ctx, &pb.CompactionRequest{Revision: revision, Physical: true})
	if errors.Is(err, rpctypes.ErrGRPCCompacted) {
		return nil
	}
	return err
}

// defragment stops this member for a moment, so with several it takes turns.
func (s *serverSpace) defragment(ctx context.Context) error {
	return s.store.inTurn(ctx, s.server, func() error {
		_, err := maintenanceClient{s.transport}.Defragment(ctx, &pb.DefragmentRequest{})
		return err
	})
}

func (s *serverSpace) clearFull(ctx context.Context) error {
	var errs []error
	for _, alarm := range s.alarms() {
		_, err := maintenanceClient{s.transport}.Alarm(ctx, &pb.AlarmRequest{
			Action: pb.AlarmRequest_DEACTIVATE, MemberID: alarm.MemberID, Alarm: alarm.Alarm,
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
