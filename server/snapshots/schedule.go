package snapshots

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/robfig/cron/v3"

	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/snapshots/archive"
)

const (
	// DefaultSchedule is twice a day. H is a minute that depends on the server's name, so that the servers of a cluster do not
	// take snapshots at the same time.
	DefaultSchedule = "H */12 * * *"
	// NoSchedule is the schedule on which nothing is done.
	NoSchedule = "off"

	// missedDelay is the time after the start at which a snapshot is taken that was due while kedge did not run.
	missedDelay = 5 * time.Minute
	// retryInterval is the time between attempts after a failure.
	retryInterval = 10 * time.Minute
	// longestSleep bounds the time after which the clock is read again, since it may be set meanwhile.
	longestSleep = time.Hour
)

// Schedule says when snapshots are taken. The zero Schedule is never.
type Schedule struct{ cron cron.Schedule }

// ParseSchedule reads a schedule in the form of cron: minute, hour, day of the month, month, day of the week. H instead of the
// minute is one that depends on the server's name.
func ParseSchedule(text, node string) (Schedule, error) {
	given := text
	if text == NoSchedule {
		return Schedule{}, nil
	}
	if rest, ok := strings.CutPrefix(text, "H "); ok {
		sum := fnv.New32a()
		sum.Write([]byte(node)) // never fails
		text = strconv.Itoa(int(sum.Sum32()%60)) + " " + rest
	}
	parsed, err := cron.ParseStandard(text)
	if err != nil {
		return Schedule{}, fmt.Errorf("%q is not a schedule; want five fields as cron has them, such as %q, or %q", given, DefaultSchedule, NoSchedule)
	}
	if parsed.Next(time.Unix(0, 0)).IsZero() {
		return Schedule{}, fmt.Errorf("%q is never", given)
	}
	return Schedule{parsed}, nil
}

// next returns the time of the next snapshot, when the latest was taken at last.
func (s Schedule) next(last, now time.Time) time.Time {
	due := s.cron.Next(last)
	if last.After(now) { // the clock was wrong then
		due = s.cron.Next(now)
	}
	if due.Before(now) { // kedge did not run then
		return now.Add(missedDelay)
	}
	return due
}

// Name implements lifecycle.Component.
func (s *Saver) Name() string { return "snapshots" }

// Run implements lifecycle.Component. It makes the cluster's recovery key, and takes snapshots by the schedule. It calls ready
// after the first attempt to read the key, whatever its result: a server works without a snapshot.
func (s *Saver) Run(ctx context.Context, ready func()) error {
	s.prepare()
	for {
		_, err := s.keys.Current(ctx)
		ready()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		s.log.Warn("the cluster has no recovery key yet; trying again", "err", err, "again", keyRetry)
		if !sleep(ctx, keyRetry) {
			return nil
		}
	}
	if s.cfg.Schedule.cron == nil {
		<-ctx.Done()
		return nil
	}
	return s.follow(ctx)
}

// prepare removes what a killed process has left, and notices a folder that cannot be used before the first snapshot is due.
func (s *Saver) prepare() {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := s.removeLeftovers()
	if errors.Is(err, fs.ErrNotExist) {
		// A folder that nobody needs yet is not left there.
		if err = os.MkdirAll(s.cfg.Folder, 0o700); err == nil {
			err = os.Remove(s.cfg.Folder)
		}
	}
	if err != nil && s.cfg.Schedule.cron != nil {
		s.log.Error("the folder of snapshots cannot be used; choose another with --snapshot-dir", "err", err)
		s.failed.Store(&err)
	}
}

// Describe implements lifecycle.Describer.
func (s *Saver) Describe() string {
	if err := s.failed.Load(); err != nil {
		return "the last one failed: " + (*err).Error()
	}
	return ""
}

// keyRetry is the time between attempts to read the recovery key.
const keyRetry = 10 * time.Second

// follow takes snapshots by the schedule.
func (s *Saver) follow(ctx context.Context) error {
	due, waiting := s.due(), "" // waiting is the snapshot that is still to be stored outside of the machine
	for {
		if left := due.Sub(s.now()); left > 0 {
			if !sleep(ctx, min(left, longestSleep)) {
				return nil
			}
			if left > longestSleep {
				due = s.due() // the clock may have been set
			}
			continue
		}
		err := s.take(ctx, &waiting)
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.failed.Store(&err)
			s.log.Error("the snapshot of the schedule failed; trying again", "err", err, "again", retryInterval)
			due = s.now().Add(retryInterval)
			continue
		}
		s.failed.Store(nil)
		due = s.cfg.Schedule.cron.Next(s.now())
	}
}

// take takes the snapshot that is due, or only stores the one that waits for it: another one would take the place of an
// earlier one.
func (s *Saver) take(ctx context.Context, waiting *string) error {
	if path := *waiting; path != "" && s.cfg.Schedule.cron.Next(s.latest(s.now())).After(s.now()) {
		err := s.store(ctx, path, archive.Scheduled)
		if err == nil {
			*waiting = ""
		}
		return err
	}
	*waiting = ""
	saved, err := s.Save(ctx, archive.Scheduled, nil)
	if errors.Is(err, ErrNotStored) {
		*waiting = saved.Path
	}
	if err == nil || *waiting != "" {
		if _, pruneErr := archive.Prune(s.cfg.Folder, archive.Scheduled, s.cfg.Node, s.cfg.Retention); pruneErr != nil {
			s.log.Warn("an old snapshot could not be removed", "err", pruneErr)
		}
	}
	return err
}

// due returns when the next snapshot is due, by the latest that there is.
func (s *Saver) due() time.Time {
	now := s.now()
	return s.cfg.Schedule.next(s.latest(now), now)
}

// latest returns when the schedule has taken the latest snapshot of this server. Without one, it is when the cluster was made.
func (s *Saver) latest(now time.Time) time.Time {
	all, err := archive.List(s.cfg.Folder)
	if err != nil {
		s.log.Warn("the folder of snapshots cannot be read", "err", err)
		return now
	}
	for i := len(all) - 1; i >= 0; i-- {
		if prefix, ok := archive.Prefix(all[i].Path, s.cfg.Node); ok && prefix == archive.Scheduled {
			return all[i].Taken
		}
	}
	path := identity.AuthorityFile(s.cfg.ServerDir)
	if data, err := os.ReadFile(path); err == nil {
		if ca, err := pki.ParseCertificate(path, data); err == nil && ca.NotBefore.Before(now) {
			return ca.NotBefore
		}
	}
	return now
}

// sleep returns false if ctx ended before.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// clusterOf returns the hash of the authority of the server in dir, which identifies the cluster.
func clusterOf(dir string) (string, error) {
	path := identity.AuthorityFile(dir)
	data, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	ca, err := pki.ParseCertificate(path, data)
	if err != nil {
		return "", err
	}
	return pki.Hash(ca), nil
}
