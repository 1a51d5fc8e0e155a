package datastore

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver"
)

// keeper keeps the database file from growing without end. Compaction, which the API server does, frees pages
// inside the file; only rewriting the file gives them back to the file system.
//
// It also takes back the alarm that etcd raises at the quota, once there is room again. etcd leaves that, and
// with it a cluster that refuses all writes, to a human.
type keeper struct {
	cfg   DefragConfig
	quota int64
	log   *slog.Logger
	space space

	lastApplied uint64
	// wantedSince is when rewriting was first wanted, or zero.
	wantedSince time.Time
}

// space is what the keeper needs of the server.
type space interface {
	// size returns the size of the database file and how much of it is in use.
	size() (total, inUse int64)
	// free returns the free space of the volume.
	free() (int64, error)
	// applied counts raft entries.
	applied() uint64
	defragment(context.Context) error
	// full reports whether writes are refused because the file has reached its quota.
	full() bool
	// clearFull allows writes again.
	clearFull(context.Context) error
	quota() int64
}

const (
	// defragSlack is what must be free on the volume beyond the copy that is made.
	defragSlack = 16 << 20
	// refillLevel is the part of the quota below which a full store takes writes again.
	refillLevel = 0.9
)

func newKeeper(cfg Config, log *slog.Logger, s space) *keeper {
	return &keeper{cfg: cfg.Defrag, quota: s.quota(), log: log, space: s, lastApplied: s.applied()}
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
	applied := k.space.applied()
	busy := float64(applied-k.lastApplied) > k.cfg.QuietRate*k.cfg.Interval.Seconds()
	k.lastApplied = applied

	full := k.space.full()
	total, inUse := k.space.size()
	// At the quota there is nothing to wait for: no write gets through. But only if it can help.
	urgent := full && float64(inUse) < refillLevel*float64(k.quota)
	if !urgent && !k.wanted(total, inUse) {
		k.wantedSince = time.Time{}
		return nil
	}
	if k.wantedSince.IsZero() {
		k.wantedSince = now
	}
	if !urgent && busy && now.Sub(k.wantedSince) < k.cfg.Patience {
		return nil
	}

	if !full || float64(total) >= refillLevel*float64(k.quota) {
		if err := k.rewrite(ctx, inUse); err != nil {
			return err
		}
		total, _ = k.space.size()
	}
	k.wantedSince = time.Time{}
	if full && float64(total) < refillLevel*float64(k.quota) {
		if err := k.space.clearFull(ctx); err != nil {
			return fmt.Errorf("allow writes again: %w", err)
		}
		k.log.Info("datastore below its quota again, taking writes", "bytes", total, "quota", k.quota)
	}
	return nil
}

func (k *keeper) wanted(total, inUse int64) bool {
	return total > k.cfg.MinSize && float64(total-inUse) > k.cfg.MaxFree*float64(total)
}

func (k *keeper) rewrite(ctx context.Context, inUse int64) error {
	free, err := k.space.free()
	if err != nil {
		return err
	}
	if need := inUse + defragSlack; free < need {
		return fmt.Errorf("cannot defragment: needs %d bytes, the volume has %d free", need, free)
	}
	before, _ := k.space.size()
	began := time.Now()
	if err := k.space.defragment(ctx); err != nil {
		return err
	}
	after, _ := k.space.size()
	k.log.Info("datastore defragmented", "before", before, "after", after, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// serverSpace is the space of a running server.
type serverSpace struct {
	server    *etcdserver.EtcdServer
	transport *transport
	dir       string
}

func (s *serverSpace) size() (total, inUse int64) {
	backend := s.server.Backend()
	return backend.Size(), backend.SizeInUse()
}

func (s *serverSpace) free() (int64, error) {
	_, free, err := volume(s.dir)
	return free, err
}

func (s *serverSpace) applied() uint64 { return s.server.AppliedIndex() }

func (s *serverSpace) quota() int64 { return s.server.Cfg.QuotaBackendBytes }

func (s *serverSpace) defragment(ctx context.Context) error {
	_, err := maintenanceClient{s.transport}.Defragment(ctx, &pb.DefragmentRequest{})
	return err
}

func (s *serverSpace) full() bool {
	for _, alarm := range s.server.Alarms() {
		if alarm.Alarm == pb.AlarmType_NOSPACE {
			return true
		}
	}
	return false
}

func (s *serverSpace) clearFull(ctx context.Context) error {
	var errs []error
	for _, alarm := range s.server.Alarms() {
		if alarm.Alarm != pb.AlarmType_NOSPACE {
			continue
		}
		_, err := maintenanceClient{s.transport}.Alarm(ctx, &pb.AlarmRequest{
			Action: pb.AlarmRequest_DEACTIVATE, MemberID: alarm.MemberID, Alarm: alarm.Alarm,
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
