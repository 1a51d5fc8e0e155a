package bootguard

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// site is a data directory with two executables beside it.
type site struct {
	dir, base, candidate string
	trial                Trial
}

func newSite(t *testing.T, save ...string) site {
	t.Helper()
	dir := t.TempDir()
	s := site{dir: filepath.Join(dir, "data"), base: filepath.Join(dir, "bin", "kedge")}
	s.candidate = Path(s.dir, "kedge")
	for path, text := range map[string]string{s.base: "old", s.candidate: "new", filepath.Join(s.dir, "kedge.json"): "format 1", filepath.Join(s.dir, "server", "store", "db"): "rows of before"} {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	s.trial = Trial{ID: "1", Candidate: s.candidate, Base: s.base, MaxStarts: 3, Save: save}
	if err := Begin(s.dir, s.trial); err != nil {
		t.Fatal(err)
	}
	return s
}

// convert is what a new version does to the data.
func (s site) convert(t *testing.T) {
	t.Helper()
	for path, text := range map[string]string{"kedge.json": "format 2", "server/store/db": "rows of after", "server/store/more": ""} {
		if err := os.WriteFile(filepath.Join(s.dir, path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func (s site) text(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.dir, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestNoTrial(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "none")
	if c := Choose(dir, "/bin/kedge"); c != (Choice{}) {
		t.Errorf("without a trial: %+v", c)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("it has made the data directory")
	}
}

// A new version that never gets a verdict is given up after its starts, and stays given up.
func TestGivenUpAfterStarts(t *testing.T) {
	s := newSite(t)
	for i := range 3 {
		c := Choose(s.dir, s.base)
		if c.Run != s.candidate || c.Watcher != s.base || c.Base != s.base {
			t.Fatalf("start %d: %+v", i+1, c)
		}
	}
	for range 2 {
		if c := Choose(s.dir, s.base); c.Run != "" || c.Watcher != s.base || !strings.Contains(c.Note, "did not become healthy in 3 starts") {
			t.Errorf("after three starts: %+v", c)
		}
	}
	if v, found, err := ReadVerdict(s.dir, s.trial); err != nil || !found || v.Proven {
		t.Errorf("verdict %+v, %v, %v", v, found, err)
	}
	// The launcher of the new version itself starts the base.
	if c := Choose(s.dir, s.candidate); c.Run != s.base {
		t.Errorf("asked by the candidate's launcher: %+v", c)
	}
	if err := End(s.dir); err != nil {
		t.Fatal(err)
	}
	if c := Choose(s.dir, s.base); c != (Choice{}) {
		t.Errorf("after the trial: %+v", c)
	}
	if got := s.text(t, "upgrade/kedge"); got != "new" {
		t.Errorf("the candidate is %q", got)
	}
}

// A base of before this package cannot watch: the trial says who does, until its end.
func TestWatcher(t *testing.T) {
	s := newSite(t)
	s.trial.Watcher = s.candidate
	if err := Begin(s.dir, s.trial); err != nil {
		t.Fatal(err)
	}
	if c := Choose(s.dir, s.candidate); c.Watcher != s.candidate || c.Base != s.base || c.Run != "" {
		t.Errorf("%+v", c)
	}
	if _, err := Decide(s.dir, s.trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	if c := Choose(s.dir, s.candidate); c.Watcher != s.candidate || c.Run != s.base {
		t.Errorf("on the way back: %+v", c)
	}
}

// A version that was proven is started as often as it likes.
func TestProven(t *testing.T) {
	s := newSite(t)
	Choose(s.dir, s.base)
	if v, err := Decide(s.dir, s.trial, true, ""); err != nil || !v.Proven {
		t.Fatal(v, err)
	}
	// The first verdict stays.
	if v, err := Decide(s.dir, s.trial, false, "late"); err != nil || !v.Proven {
		t.Errorf("a second verdict: %+v, %v", v, err)
	}
	for range 5 {
		if c := Choose(s.dir, s.base); c.Run != s.candidate {
			t.Errorf("%+v", c)
		}
	}
}

// Of many that decide at the same time one is the first, and all know it.
func TestDecideOnce(t *testing.T) {
	s := newSite(t)
	var all [8]Verdict
	var wg sync.WaitGroup
	for i := range all {
		wg.Go(func() {
			var err error
			if all[i], err = Decide(s.dir, s.trial, i%2 == 0, ""); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	want, found, err := ReadVerdict(s.dir, s.trial)
	if err != nil || !found {
		t.Fatal(err, found)
	}
	for _, v := range all {
		if v != want {
			t.Errorf("%+v, want %+v", v, want)
		}
	}
	if got, err := Decide(s.dir, s.trial, !want.Proven, ""); err != nil || got != want {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
}

// The data that a new version converts comes back with the version before.
func TestDataComesBack(t *testing.T) {
	s := newSite(t, "kedge.json", "server", "missing")
	before := s.text(t, "server/store/db")
	for range 3 {
		Choose(s.dir, s.base)
		s.convert(t)
	}
	if c := Choose(s.dir, s.base); c.Run != "" {
		t.Fatalf("%+v", c)
	}
	if got := s.text(t, "server/store/db"); got != before {
		t.Errorf("the database is %q", got)
	}
	if got := s.text(t, "kedge.json"); got != "format 1" {
		t.Errorf("the description is %q", got)
	}
	if _, err := os.Stat(filepath.Join(s.dir, "server/store/more")); err == nil {
		t.Error("a file of the new version is left")
	}
	if st, err := os.Stat(filepath.Join(s.dir, "server/store/db")); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode: %v, %v", st, err)
	}
	// What the base writes from then on is not replaced at its next start.
	if err := os.WriteFile(filepath.Join(s.dir, "server/store/db"), []byte("rows of today"), 0o600); err != nil {
		t.Fatal(err)
	}
	Choose(s.dir, s.base)
	if got := s.text(t, "server/store/db"); got != "rows of today" {
		t.Errorf("after another start the database is %q", got)
	}
}

// A restoration that was interrupted at any file is completed by the next start.
func TestRestoreInterrupted(t *testing.T) {
	s := newSite(t, "kedge.json", "server")
	Choose(s.dir, s.base)
	s.convert(t)
	if _, err := Decide(s.dir, s.trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(s.dir, "server")); err != nil { // as far as it came
		t.Fatal(err)
	}
	Choose(s.dir, s.base)
	if got := s.text(t, "server/store/db") + ", " + s.text(t, "kedge.json"); got != "rows of before, format 1" {
		t.Errorf("it is %q", got)
	}
}

// full lets no start be recorded, as a full disk does, until release is called.
func (s site) full(t *testing.T) (release func()) {
	t.Helper()
	obstacle := Path(s.dir, ".tmp-"+startsFile)
	if err := os.MkdirAll(filepath.Join(obstacle, "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.RemoveAll(obstacle); err != nil {
			t.Fatal(err)
		}
	}
}

// A start that cannot be recorded is one of the base, and what that writes is not replaced later by a copy from before it.
func TestStartIsNotRecorded(t *testing.T) {
	s := newSite(t, "kedge.json", "server")
	release := s.full(t)
	if c := Choose(s.dir, s.base); c.Run != "" || c.Watcher == "" || !strings.Contains(c.Note, "its start cannot be recorded") || c.Fail != nil {
		t.Errorf("%+v", c)
	}
	if err := os.WriteFile(filepath.Join(s.dir, "server/store/db"), []byte("rows of the base"), 0o600); err != nil {
		t.Fatal(err)
	}
	release()
	if c := Choose(s.dir, s.base); c.Run != s.candidate {
		t.Fatalf("%+v", c)
	}
	s.convert(t)
	if _, err := Decide(s.dir, s.trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	Choose(s.dir, s.base)
	if got := s.text(t, "server/store/db"); got != "rows of the base" {
		t.Errorf("the database is %q", got)
	}
}

// While it cannot be recorded that the data of before is back, nothing is started that would write to it.
func TestReturnIsNotRecorded(t *testing.T) {
	s := newSite(t, "kedge.json", "server")
	Choose(s.dir, s.base)
	s.convert(t)
	if _, err := Decide(s.dir, s.trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	release := s.full(t)
	if c := Choose(s.dir, s.base); c.Fail == nil || !strings.HasPrefix(c.Fail.Error(), "the data of before the upgrade has yet to come back: ") {
		t.Errorf("%+v", c)
	}
	release()
	if c := Choose(s.dir, s.base); c.Run != "" || c.Fail != nil {
		t.Errorf("with room: %+v", c)
	}
	if got := s.text(t, "server/store/db") + ", " + s.text(t, "kedge.json"); got != "rows of before, format 1" {
		t.Errorf("it is %q", got)
	}
	// Nor is it while a further start of the new version cannot be recorded.
	s = newSite(t, "kedge.json", "server")
	Choose(s.dir, s.base)
	s.full(t)
	if c := Choose(s.dir, s.base); c.Fail == nil {
		t.Errorf("the second start: %+v", c)
	}
	// Without data to bring back the base runs.
	s = newSite(t)
	Choose(s.dir, s.base)
	if _, err := Decide(s.dir, s.trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	s.full(t)
	if c := Choose(s.dir, s.base); c.Run != "" || c.Fail != nil || c.Note == "" {
		t.Errorf("without data: %+v", c)
	}
}

// If the data cannot be saved, the new version never touches it.
func TestNotSaved(t *testing.T) {
	s := newSite(t, "kedge.json")
	if err := os.MkdirAll(Path(s.dir, ".tmp-saved", "x"), 0o700); err != nil { // of a power cut
		t.Fatal(err)
	}
	if c := Choose(s.dir, s.base); c.Run != s.candidate {
		t.Fatalf("what a power cut left is in the way: %+v", c)
	}
	s = newSite(t, "kedge.json/below-a-file/x")
	if err := os.WriteFile(filepath.Join(s.dir, "upgrade", ".tmp-saved"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if c := Choose(s.dir, s.base); c.Run != "" || !strings.Contains(c.Note, "cannot be saved") {
		t.Errorf("%+v", c)
	}
}

// What cannot be read or counted starts the version of before.
func TestDamagedState(t *testing.T) {
	for name, damage := range map[string]func(s site) error{
		"starts":  func(s site) error { return os.WriteFile(Path(s.dir, startsFile), []byte("{"), 0o600) },
		"verdict": func(s site) error { return os.WriteFile(Path(s.dir, verdictFile), []byte("{"), 0o600) },
		"folder in place of starts": func(s site) error {
			return os.MkdirAll(Path(s.dir, startsFile, "x"), 0o700)
		},
		"candidate is gone": func(s site) error { return os.Remove(s.candidate) },
		"trial":             func(s site) error { return os.WriteFile(Path(s.dir, trialFile), []byte(`{"format":1}`), 0o600) },
		"trial of later":    func(s site) error { return os.WriteFile(Path(s.dir, trialFile), []byte(`{"format":2}`), 0o600) },
		"trial leads out": func(s site) error {
			tr := s.trial
			tr.Save = []string{"../bin"}
			return Begin(s.dir, tr)
		},
	} {
		s := newSite(t)
		if err := damage(s); err != nil {
			t.Fatal(err)
		}
		if c := Choose(s.dir, s.base); c.Run != "" || c.Note == "" {
			t.Errorf("%s: %+v", name, c)
		}
	}
}

// The error for a damaged file says what to do, and that helps.
func TestDamagedStateIsRemoved(t *testing.T) {
	for _, name := range []string{startsFile, verdictFile, trialFile} {
		s := newSite(t)
		if err := os.WriteFile(Path(s.dir, name), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		if c := Choose(s.dir, s.base); !strings.Contains(c.Note, Path(s.dir, name)) || !strings.Contains(c.Note, "; remove it to ") {
			t.Errorf("%s: %+v", name, c)
		}
		if err := os.Remove(Path(s.dir, name)); err != nil {
			t.Fatal(err)
		}
		if c := Choose(s.dir, s.base); (c.Run == s.candidate) != (name != trialFile) {
			t.Errorf("without %s: %+v", name, c)
		}
	}
}

// Files of an earlier trial mean nothing to the next one.
func TestNextTrial(t *testing.T) {
	s := newSite(t)
	for range 4 {
		Choose(s.dir, s.base)
	}
	starts, verdict := s.text(t, "upgrade/"+startsFile), s.text(t, "upgrade/"+verdictFile)
	s.trial.ID = "2"
	if err := Begin(s.dir, s.trial); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{startsFile: starts, verdictFile: verdict} {
		if err := os.WriteFile(Path(s.dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if c := Choose(s.dir, s.base); c.Run != s.candidate {
		t.Errorf("%+v", c)
	}
	entries, err := os.ReadDir(Path(s.dir))
	if err != nil || slices.ContainsFunc(entries, func(e os.DirEntry) bool { return strings.HasPrefix(e.Name(), ".tmp-") }) {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// Executables of earlier trials go, except the one that runs, and one that has just come.
func TestTidy(t *testing.T) {
	s := newSite(t)
	now := time.Now()
	for name, age := range map[string]time.Duration{"kedge-old": time.Hour, "kedge-runs": time.Hour, "kedge-new": -time.Second} {
		path := Path(s.dir, name)
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(path, now, now.Add(-age)); err != nil {
			t.Fatal(err)
		}
	}
	if err := Tidy(s.dir, Path(s.dir, "kedge-runs"), now); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{"kedge-old": false, "kedge-runs": true, "kedge-new": true, "trial.json": true} {
		if _, err := os.Stat(Path(s.dir, name)); (err == nil) != want {
			t.Errorf("%s: %v, want it there: %v", name, err, want)
		}
	}
}
