package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"

	"kedge/launcher/bootguard"
)

// Begun is an upgrade that has begun, for the process that shows it to the user.
type Begun struct {
	machine Machine
	dataDir string
	id      string
}

// Follow returns the upgrade that is on trial.
func (m Machine) Follow(dataDir string) (*Begun, error) {
	t, err := bootguard.ReadTrial(m.path(dataDir))
	if err != nil {
		return nil, err
	}
	return &Begun{machine: m, dataDir: dataDir, id: t.ID}, nil
}

// Restart makes the service start the new version, or the version of before if that was decided.
func (b *Begun) Restart(ctx context.Context) error {
	if err := b.machine.Manager.Reload(ctx); err != nil {
		return err
	}
	return b.machine.Manager.Restart(ctx)
}

// watchedLimit is how long nobody may watch a trial before the process that follows it says so.
const watchedLimit = 2 * time.Minute

// takeOverAfter is how often in sequence nobody must be seen to watch: a process that watches needs a moment to start.
const takeOverAfter = 20

// Wait waits for the end of the upgrade. show is told what is waited for whenever that changes.
func (b *Begun) Wait(ctx context.Context, show func(text string)) (Outcome, error) {
	last, alone := "", 0
	for begin := time.Now(); ; {
		if o, found, err := b.outcome(); err != nil || found {
			return o, err
		}
		s, err := b.machine.Upgrades(b.dataDir)
		if err != nil {
			return Outcome{}, err
		}
		text := "waiting for the start of the new version"
		switch {
		case s.Trial == nil || s.Trial.ID != b.id:
			text = last // it has ended just now
		case s.Trial.Verdict == string(WentBack):
			text = "going back to the version of before, because " + s.Trial.Reason
		case s.Trial.Verdict == string(Upgraded):
			text = "the new version is healthy"
		case s.Trial.Starts > 0:
			text = fmt.Sprintf("the new version is on trial (start %d of at most %d)", s.Trial.Starts, s.Trial.MaxStarts)
		}
		if text != last {
			show(text)
			last, begin = text, time.Now()
		}
		if s.Trial != nil && s.Trial.Starts == 0 && s.Trial.Verdict == "" && time.Since(begin) > watchedLimit {
			return Outcome{}, b.notStarted()
		}
		// The launcher starts a process that watches. If that was killed, this one takes its place.
		if started := s.Trial != nil && (s.Trial.Starts > 0 || s.Trial.Verdict != ""); started && !b.machine.watched(b.dataDir) {
			alone++
		} else {
			alone = 0
		}
		if alone > takeOverAfter {
			if err := b.machine.Watch(ctx, b.dataDir); err != nil {
				return Outcome{}, err
			}
			alone = 0
		}
		if err := Sleep(ctx, pollInterval); err != nil {
			return Outcome{}, fmt.Errorf("the upgrade goes on by itself; \"kedge upgrade status\" shows it: %w", err)
		}
	}
}

// notStarted returns the error for a trial whose new version nobody has started.
func (b *Begun) notStarted() error {
	var st unix.Statfs_t
	if err := unix.Statfs(b.machine.path(b.dataDir), &st); err == nil && st.Bavail*uint64(st.Bsize) < fullBelow {
		return fmt.Errorf("the disk of %s is full, so the version of before runs, and the upgrade ends when there is room; free some space", b.dataDir)
	}
	return errors.New("kedge was not started again; the new version is tried by its next start")
}

// fullBelow is the free space, in bytes, below which the state of a trial may not be writable.
const fullBelow = 1 << 20

// outcome returns how the upgrade has ended, if it has.
func (b *Begun) outcome() (Outcome, bool, error) {
	if _, err := bootguard.ReadTrial(b.machine.path(b.dataDir)); !errors.Is(err, fs.ErrNotExist) {
		return Outcome{}, false, err
	}
	list, err := b.machine.readHistory(b.dataDir)
	if err != nil {
		return Outcome{}, false, err
	}
	for _, o := range list {
		if o.ID == b.id {
			return o, true, nil
		}
	}
	return Outcome{}, false, errors.New("the upgrade was ended without a result: kedge was uninstalled, or its files were removed")
}
