package bootguard

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
)

// Choice is what a launcher starts.
type Choice struct {
	// Run is the executable; empty for the launcher's own program.
	Run string
	// Watcher is the executable that has to watch the trial; empty if there is none.
	Watcher string
	Base    string
	// Note is for the log; empty if there is nothing to say.
	Note string
	// Fail is why nothing may be started: the data of before has yet to come back, and would replace what is written until then.
	Fail error
}

// Choose returns what the launcher self, which starts a node, has to run. Without a trial it writes nothing. With one it
// records the start. The caller holds the lock of the data directory: no kedge runs with it.
//
// If the state of a trial cannot be read or written, the base runs: a start that cannot be counted could be repeated for
// ever.
func Choose(dataDir, self string) Choice {
	t, err := ReadTrial(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return Choice{}
	}
	if err != nil {
		return Choice{Note: fmt.Sprintf("the state of the upgrade is ignored: %v", err)}
	}
	c := Choice{Watcher: cmp.Or(t.Watcher, t.Base), Base: t.Base}
	run, note, err := choose(dataDir, t)
	if errors.Is(err, errNotBack) {
		c.Fail = err
		return c
	}
	if err != nil {
		run, note = t.Base, fmt.Sprintf("the new version is not started, because its start cannot be recorded: %v", err)
	}
	c.Note = note
	if _, err := os.Stat(run); err != nil {
		if run == t.Candidate {
			run = t.Base
		}
		c.Note = fmt.Sprintf("%v; %s is started", err, run)
	}
	if !sameFile(run, self) {
		c.Run = run
	}
	return c
}

// errNotBack means that the data of before the trial is not back for good.
var errNotBack = errors.New("the data of before the upgrade has yet to come back")

// choose returns the executable that a trial is at.
func choose(dataDir string, t Trial) (run, note string, err error) {
	starts, err := ReadStarts(dataDir, t)
	if err != nil {
		return "", "", err
	}
	run, note, err = next(dataDir, t, starts)
	if err != nil && starts.Saved && !starts.Back { // the new version has run
		err = fmt.Errorf("%w: %w", errNotBack, err)
	}
	return run, note, err
}

// next is choose after the starts so far.
func next(dataDir string, t Trial, starts Starts) (run, note string, err error) {
	v, found, err := ReadVerdict(dataDir, t)
	if err != nil {
		return "", "", err
	}
	if !found && starts.Count >= t.MaxStarts {
		if v, err = Decide(dataDir, t, false, fmt.Sprintf("it did not become healthy in %d starts", starts.Count)); err != nil {
			return "", "", err
		}
		found = true
	}
	if !found && len(t.Save) > 0 && !starts.Saved {
		if err := saveAll(dataDir, t.Save); err != nil {
			// Nothing was changed yet, so there is nothing to bring back.
			if v, err = Decide(dataDir, t, false, fmt.Sprintf("the data of before cannot be saved: %v", err)); err != nil {
				return "", "", err
			}
			found = true
		} else {
			starts.Saved = true
		}
	}
	if found && !v.Proven {
		if starts.Saved && !starts.Back {
			if err := restoreAll(dataDir, t.Save); err != nil {
				return "", "", err
			}
		}
		starts.Back = true
		return t.Base, "the version before the upgrade is started: the new version was given up, because " + v.Reason, write(Path(dataDir, startsFile), starts)
	}
	starts.Count++
	starts.PID = os.Getpid()
	if err := write(Path(dataDir, startsFile), starts); err != nil {
		if starts.Count == 1 {
			// The base runs, and a copy from before would replace what it writes.
			err = errors.Join(err, os.RemoveAll(Path(dataDir, savedFolder)))
		}
		return "", "", err
	}
	if !found {
		note = fmt.Sprintf("the new version is on trial: start %d of at most %d", starts.Count, t.MaxStarts)
	}
	return t.Candidate, note, nil
}

// sameFile reports whether two paths lead to the same file.
func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}
