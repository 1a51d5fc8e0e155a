package bootguard

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kedge/internal/atomicfile"
)

// Format grows when an older launcher could not conduct a trial any more.
const Format = 1

// Names in the data directory.
const (
	Folder = "upgrade"
	// CandidatePrefix begins the names of new executables in the folder.
	CandidatePrefix = "kedge-"

	trialFile   = "trial.json"
	startsFile  = "starts.json"
	verdictFile = "verdict.json"
	savedFolder = "saved"
)

// maxFile bounds the size of the files of a trial, in bytes.
const maxFile = 1 << 20

// Trial is an upgrade that has not been proven yet.
type Trial struct {
	Format    int    `json:"format"`
	ID        string `json:"id"`
	Candidate string `json:"candidate"` // the new executable
	Base      string `json:"base"`      // the executable of before
	MaxStarts int    `json:"maxStarts"` // starts of the candidate without a verdict
	// Watcher is the executable that watches the candidate. It is empty for the base, and the candidate itself if the base is
	// from before this package and could not.
	Watcher string `json:"watcher,omitempty"`
	// Save has the files and folders of the data directory, relative to it, that are copied before the candidate's first
	// start and come back with the base. It is empty if the base can read what the candidate writes.
	Save []string `json:"save,omitempty"`
	// Details are for the program that made the trial. The launcher does not read them.
	Details json.RawMessage `json:"details,omitempty"`
}

// Starts is what the launcher has done in a trial.
type Starts struct {
	ID    string `json:"id"`
	Count int    `json:"count"` // starts of the candidate
	PID   int    `json:"pid"`   // of the last start
	Saved bool   `json:"saved"` // the data was saved
	Back  bool   `json:"back"`  // the base was started after the verdict, with its data
}

// Verdict is the result of a trial.
type Verdict struct {
	ID     string `json:"id"`
	Proven bool   `json:"proven"` // otherwise the base comes back
	Reason string `json:"reason,omitempty"`
}

// Path returns the path of a file in the folder of trials.
func Path(dataDir string, elem ...string) string {
	return filepath.Join(append([]string{dataDir, Folder}, elem...)...)
}

// ReadTrial returns the trial of a data directory. The error wraps fs.ErrNotExist if there is none.
func ReadTrial(dataDir string) (t Trial, err error) {
	if err := read(Path(dataDir, trialFile), "give this upgrade up", &t); err != nil {
		return t, err
	}
	switch {
	case t.Format > Format:
		return t, fmt.Errorf("%s was written by a newer kedge, in format %d", Path(dataDir, trialFile), t.Format)
	case t.ID == "" || t.Candidate == "" || t.Base == "" || t.MaxStarts < 1:
		return t, fmt.Errorf("%s is not complete; remove it to give this upgrade up", Path(dataDir, trialFile))
	}
	for _, name := range t.Save {
		if !filepath.IsLocal(name) || filepath.Clean(name) == "." {
			return t, fmt.Errorf("%s: %q is not below the data directory", Path(dataDir, trialFile), name)
		}
	}
	return t, nil
}

// Begin starts a trial. What earlier trials left is removed first. The candidate and the base must be on the disk.
func Begin(dataDir string, t Trial) error {
	t.Format = Format
	for _, name := range []string{trialFile, startsFile, verdictFile, savedFolder} {
		if err := os.RemoveAll(Path(dataDir, name)); err != nil {
			return err
		}
	}
	return write(Path(dataDir, trialFile), t)
}

// End ends a trial that has a verdict that was carried out. The candidate stays: the running kedge may have been started
// from it.
func End(dataDir string) error {
	for _, name := range []string{trialFile, verdictFile, startsFile, savedFolder} { // without the first there is no trial
		if err := os.RemoveAll(Path(dataDir, name)); err != nil {
			return err
		}
		if name == trialFile {
			if err := atomicfile.SyncDir(Path(dataDir)); err != nil {
				return err
			}
		}
	}
	return nil
}

// Tidy removes executables that earlier trials have left. That of the running kedge stays, because its CNI plugin is a link
// to it, and those that are newer than since: an upgrade is about to begin.
func Tidy(dataDir, running string, since time.Time) error {
	found, err := filepath.Glob(Path(dataDir, CandidatePrefix+"*"))
	if err != nil {
		return err
	}
	var errs []error
	for _, path := range found {
		if st, err := os.Stat(path); err != nil || path == running || !st.ModTime().Before(since) {
			continue
		}
		errs = append(errs, os.Remove(path))
	}
	return errors.Join(errs...)
}

// ReadStarts returns what the launcher has done in a trial.
func ReadStarts(dataDir string, t Trial) (Starts, error) {
	s := Starts{}
	err := read(Path(dataDir, startsFile), "count the starts of the upgrade anew", &s)
	if errors.Is(err, fs.ErrNotExist) || err == nil && s.ID != t.ID {
		return Starts{ID: t.ID}, nil
	}
	return s, err
}

// ReadVerdict returns the verdict of a trial, if it has one.
func ReadVerdict(dataDir string, t Trial) (v Verdict, found bool, err error) {
	err = read(Path(dataDir, verdictFile), "try the new version again", &v)
	if errors.Is(err, fs.ErrNotExist) || err == nil && v.ID != t.ID {
		return Verdict{}, false, nil
	}
	return v, err == nil, err
}

// Decide gives the verdict of a trial. The first verdict stays: the result is that verdict.
func Decide(dataDir string, t Trial, proven bool, reason string) (Verdict, error) {
	if v, found, err := ReadVerdict(dataDir, t); err != nil || found {
		return v, err
	}
	v := Verdict{ID: t.ID, Proven: proven, Reason: reason}
	tmp, err := writeTemporary(dataDir, v)
	if err != nil {
		return v, err
	}
	defer os.Remove(tmp)
	// A link fails if the file exists, so one of two that decide at the same time is the first.
	if err := os.Link(tmp, Path(dataDir, verdictFile)); err != nil && !errors.Is(err, fs.ErrExist) {
		return v, err
	}
	if err := atomicfile.SyncDir(Path(dataDir)); err != nil {
		return v, err
	}
	v, found, err := ReadVerdict(dataDir, t)
	if err == nil && !found {
		err = fmt.Errorf("%s belongs to another trial", Path(dataDir, verdictFile))
	}
	return v, err
}

// writeTemporary writes a verdict durably into a file of its own.
func writeTemporary(dataDir string, v Verdict) (name string, err error) {
	data, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	f, err := os.CreateTemp(Path(dataDir), ".tmp-*-"+verdictFile)
	if err != nil {
		return "", err
	}
	_, err = f.Write(append(data, '\n'))
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return "", errors.Join(err, os.Remove(f.Name()))
	}
	return f.Name(), nil
}

// read reads a file of a trial. If it is damaged, what can be done by its removal is said with the error.
func read(path, remedy string, v any) error {
	data, err := atomicfile.ReadSmall(path, maxFile)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("read %s: %w; remove it to %s", path, err, remedy)
	}
	return nil
}

func write(path string, v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(path, append(data, '\n'), 0o600)
}
