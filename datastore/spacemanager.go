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

// spaceManager keeps the database file from growing without end. The API server compacts, which frees pages inside the
// file; only a defragmentation, which rewrites the file, returns them to the file system.
//
// It also recovers a store that has reached its quota and refuses writes. etcd leaves that to an administrator, and the
// API server cannot help, because its compaction begins with a write.
type spaceManager struct {
	cfg DefragConfig
	log *slog.Logger
	db  database

	lastApplied uint64
	// defragPendingSince is the time at which a defragmentation was first due; zero if none is.
	defragPendingSince time.Time
	// compactedTo is the revision to which a full store was compacted and defragmented.
	compactedTo int64
}

// database is the part of the server that the space manager uses.
type database interface {
	usage() (usage, error)
	// compact deletes all history before revision.
	compact(ctx context.Context, revision int64) error
	// defragment rewrites the file.
	defragment(context.Context) error
	// disarmAlarms allows writes again.
	disarmAlarms(context.Context) error
}

// usage is the disk usage of the database at one moment. Sizes are in bytes.
type usage struct {
	total    int64 // of the file
	inUse    int64 // of the pages in use, as of the commit before the last
	free     int64 // on the volume
	quota    int64
	full     bool   // writes are refused because the file has reached its quota
	applied  uint64 // index of the last applied raft entry
	revision int64
}

const (
	// defragHeadroom is the free space on the volume that a defragmentation needs besides the copy of the file.
	defragHeadroom = 16 << 20
	// resumeLevel is the fraction of the quota below which a full store accepts writes again.
	resumeLevel = 0.9
)

func newSpaceManager(cfg DefragConfig, log *slog.Logger, db database) *spaceManager {
	return &spaceManager{cfg: cfg, log: log, db: db}
}

func (m *spaceManager) run(ctx context.Context) {
	ticker := time.NewTicker(m.cfg.Interval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-ticker.C:
			if err := m.reconcile(ctx, now); err != nil && ctx.Err() == nil {
				m.log.Warn("cannot reclaim disk space of the datastore", "err", err)
			}
		}
	}
}

// reconcile checks the disk usage once, and defragments or reclaims space if needed.
func (m *spaceManager) reconcile(ctx context.Context, now time.Time) error {
	u, err := m.db.usage()
	if err != nil {
		return err
	}
	busy := float64(u.applied-m.lastApplied) > m.cfg.QuietRate*m.cfg.Interval.Seconds()
	m.lastApplied = u.applied
	if u.full {
		return m.reclaim(ctx, u)
	}

	if u.total <= m.cfg.MinSize || float64(u.total-u.inUse) <= m.cfg.MaxFree*float64(u.total) {
		m.defragPendingSince = time.Time{}
		return nil
	}
	if m.defragPendingSince.IsZero() {
		m.defragPendingSince = now
	}
	if busy && now.Sub(m.defragPendingSince) < m.cfg.Patience {
		return nil
	}
	m.defragPendingSince = time.Time{}
	_, err = m.defragment(ctx, u)
	return err
}

// reclaim compacts and defragments a store that is full, until it accepts writes again. It does not wait for a quiet
// moment, since the store refuses writes anyway. Deletions still pass and increase the revision, so each new revision is
// worth another attempt. Clients whose history is compacted have to list again.
func (m *spaceManager) reclaim(ctx context.Context, u usage) error {
	limit := resumeLevel * float64(u.quota)
	if float64(u.total) >= limit {
		if u.revision == m.compactedTo {
			return nil
		}
		// Deletions after this revision are reclaimed in the next round.
		upTo := u.revision
		if err := m.db.compact(ctx, upTo); err != nil {
			return fmt.Errorf("compact: %w", err)
		}
		var err error
		if u, err = m.defragment(ctx, u); err != nil {
			return err
		}
		m.compactedTo = upTo
		if float64(u.total) >= limit {
			m.log.Warn("the datastore has reached its quota: delete objects to make room", "bytes", u.total, "quota", u.quota)
			return nil
		}
	}
	if err := m.db.disarmAlarms(ctx); err != nil {
		return fmt.Errorf("allow writes again: %w", err)
	}
	m.log.Info("the datastore is below its quota again and accepts writes", "bytes", u.total, "quota", u.quota)
	return nil
}

// defragment rewrites the file and returns the usage afterwards.
func (m *spaceManager) defragment(ctx context.Context, before usage) (usage, error) {
	if need := before.inUse + defragHeadroom; before.free < need {
		return before, fmt.Errorf("cannot defragment: %d bytes needed, %d free on the volume", need, before.free)
	}
	began := time.Now()
	if err := m.db.defragment(ctx); err != nil {
		return before, err
	}
	after, err := m.db.usage()
	if err != nil {
		return before, err
	}
	m.log.Info("datastore defragmented", "before", before.total, "after", after.total, "took", time.Since(began).Round(time.Millisecond))
	return after, nil
}

// serverDatabase is the database of a running server.
type serverDatabase struct {
	store     *Store
	server    *etcdserver.EtcdServer
	transport *transport
	dir       string
}

func (s *serverDatabase) usage() (usage, error) {
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

// alarms returns the NOSPACE alarms of this member and of removed members. The alarm of any member stops the writes of
// all, and only the member whose file is full can tell when it has space again.
func (s *serverDatabase) alarms() (noSpace []*pb.AlarmMember) {
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

func (s *serverDatabase) compact(ctx context.Context, revision int64) error {
	_, err := kvClient{s.transport}.Compact(ctx, &pb.CompactionRequest{Revision: revision, Physical: true})
	if errors.Is(err, rpctypes.ErrGRPCCompacted) {
		return nil
	}
	return err
}

// defragment holds the defrag lock, because the member does not answer meanwhile. During a snapshot etcd would wait for its
// end with its locks held, and take no writes.
func (s *serverDatabase) defragment(ctx context.Context) error {
	if !s.store.fileMu.TryLock() {
		return fmt.Errorf("%w: a snapshot is being saved", errNotNow)
	}
	defer s.store.fileMu.Unlock()
	return s.store.withDefragLock(ctx, s.server, func() error {
		_, err := maintenanceClient{s.transport}.Defragment(ctx, &pb.DefragmentRequest{})
		return err
	})
}

func (s *serverDatabase) disarmAlarms(ctx context.Context) error {
	var errs []error
	for _, alarm := range s.alarms() {
		_, err := maintenanceClient{s.transport}.Alarm(ctx, &pb.AlarmRequest{
			Action: pb.AlarmRequest_DEACTIVATE, MemberID: alarm.MemberID, Alarm: alarm.Alarm,
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
