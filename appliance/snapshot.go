package appliance

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kedge/internal/control"
)

const (
	// keptSnapshots is how many snapshots of before upgrades are kept.
	keptSnapshots = 2
	// snapshotLimit is the time limit for a snapshot: of the largest database, on a slow SD card.
	snapshotLimit = 10 * time.Minute

	snapshotPrefix, snapshotSuffix = "before-upgrade-", ".db"
)

// saveSnapshot has the running kedge save the datastore of a server before an upgrade. Without a running kedge there is no
// snapshot: the datastore stays closed until the new version opens it.
func (s *Staged) saveSnapshot(ctx context.Context) error {
	if s.in.Role != "server" {
		return nil
	}
	if _, err := control.GetReport(ctx, s.in.RunDir); err != nil {
		s.machine.Say("the datastore is not saved before this upgrade, because kedge does not answer")
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, snapshotLimit, fmt.Errorf("it was not complete within %s", snapshotLimit))
	defer cancel()
	var saved control.SavedSnapshot
	err := control.Post(ctx, s.in.RunDir, control.SaveSnapshotPath, url.Values{"name": {snapshotPrefix + s.id + snapshotSuffix}}, &saved)
	if errors.Is(err, control.ErrUnknownRequest) {
		s.machine.Say("the datastore is not saved before this upgrade, because the running kedge is too old to do it")
		return nil
	}
	if cause := context.Cause(ctx); err != nil && cause != nil {
		err = cause
	}
	if err != nil {
		return fmt.Errorf("no snapshot of the datastore could be saved, so the upgrade has not begun: %w", err)
	}
	if saved.Path == "" {
		s.machine.Say("the datastore is not saved before this upgrade, because it is an external etcd; save it with etcd's own tools")
		return nil
	}
	s.details.Snapshot = &saved
	s.machine.Say(fmt.Sprintf("the datastore is saved in %s (%d MiB, revision %d)", saved.Path, (saved.Size+1<<20-1)>>20, saved.Revision))
	return nil
}

// discardSnapshot removes the snapshot of an upgrade that did not begin.
func (s *Staged) discardSnapshot() error {
	if s.details.Snapshot == nil {
		return nil
	}
	return os.Remove(s.machine.path(s.details.Snapshot.Path))
}

// pruneSnapshots removes the snapshots of earlier upgrades but the latest. The upgrade has begun: an error only costs space.
func (s *Staged) pruneSnapshots() {
	if s.details.Snapshot == nil {
		return
	}
	dir, own := filepath.Split(s.machine.path(s.details.Snapshot.Path))
	entries, err := os.ReadDir(dir)
	var complete, partial []string // partial are what snapshots that were interrupted have left
	for _, e := range entries {
		name, isPartial := strings.CutPrefix(e.Name(), ".tmp-")
		switch {
		case !strings.HasPrefix(name, snapshotPrefix) || !strings.HasSuffix(name, snapshotSuffix):
		case isPartial:
			partial = append(partial, e.Name())
		case name != own: // which is the latest even if the clock was set back
			complete = append(complete, name)
		}
	}
	// The entries are sorted by name, and the names begin with the time.
	for _, name := range append(partial, complete[:max(0, len(complete)-keptSnapshots+1)]...) {
		err = errors.Join(err, os.Remove(filepath.Join(dir, name)))
	}
	if err != nil {
		s.machine.Say(fmt.Sprintf("a snapshot of an earlier upgrade could not be removed: %v", err))
	}
}
