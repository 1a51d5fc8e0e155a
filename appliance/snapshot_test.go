package appliance

import (
	"context"
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kedge/internal/control"
)

// TestSnapshotBeforeUpgrade: the running kedge of a server saves its datastore, and the upgrade does not begin if it cannot.
func TestSnapshotBeforeUpgrade(t *testing.T) {
	dataDir, runDir := t.TempDir(), t.TempDir()
	folder := filepath.Join(dataDir, control.SnapshotFolder)
	if err := os.Mkdir(folder, 0o700); err != nil {
		t.Fatal(err)
	}
	var said []string
	staged := func(role string) *Staged {
		said = nil
		return &Staged{machine: Machine{Say: func(text string) { said = append(said, text) }}, in: Upgrade{Role: role, RunDir: runDir, DataDir: dataDir}, id: "20260102T000000Z-7"}
	}
	saves := func(s *Staged, want string) {
		t.Helper()
		if err := s.saveSnapshot(t.Context()); err != nil {
			t.Error(err)
		}
		if text := strings.Join(said, "\n"); !strings.Contains(text, want) || (text == "") != (want == "") {
			t.Errorf("it says %q, and should say %q", text, want)
		}
	}
	saves(staged("agent"), "")
	saves(staged("server"), "kedge does not answer")

	// serve answers as a running kedge; save is nil for a version that does not know snapshots.
	serve := func(save func(name string) (any, error)) (stop func()) {
		requests := control.NewServer(runDir, func(context.Context) control.Report { return control.Report{} })
		if save != nil {
			requests.HandlePost(control.SaveSnapshotPath, func(_ context.Context, v url.Values) (any, error) { return save(v.Get("name")) })
		}
		ctx, cancel := context.WithCancel(t.Context())
		ready, done := make(chan struct{}), make(chan error, 1)
		go func() { done <- requests.Run(ctx, func() { close(ready) }) }()
		<-ready
		return func() {
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
	}
	stop := serve(nil)
	s := staged("server")
	saves(s, "the running kedge is too old")
	if s.details.Snapshot != nil || s.discardSnapshot() != nil {
		t.Errorf("a snapshot %+v", s.details.Snapshot)
	}
	stop()

	stop = serve(func(string) (any, error) { return control.SavedSnapshot{}, nil })
	s = staged("server")
	saves(s, "because it is an external etcd")
	if s.details.Snapshot != nil || s.discardSnapshot() != nil {
		t.Errorf("a snapshot %+v of an external etcd", s.details.Snapshot)
	}
	stop()

	stop = serve(func(string) (any, error) { return nil, errors.New("there is no space") })
	if err := staged("server").Begin(t.Context()); err == nil || !strings.Contains(err.Error(), "so the upgrade has not begun: there is no space") {
		t.Errorf("a snapshot that fails: %v", err)
	}
	if entries, err := os.ReadDir(dataDir); err != nil || len(entries) != 1 {
		t.Errorf("the upgrade has begun: %v, %v", entries, err)
	}
	stop()

	const name = "before-upgrade-20260102T000000Z-7.db"
	path := filepath.Join(folder, name)
	stop = serve(func(n string) (any, error) {
		return control.SavedSnapshot{Path: path, Size: 3 << 20, Revision: 7, Hash: "abc"}, os.WriteFile(path, []byte(n), 0o600)
	})
	defer stop()
	// The clock was set back: two of the others are later by their names.
	stay := []string{"before-upgrade-20260301T000000Z-7.db", "mine.db", "before-upgrade-x", ".tmp-other.db"}
	for _, f := range append(stay, "before-upgrade-20250101T000000Z-1.db", "before-upgrade-20260201T000000Z-1.db", ".tmp-before-upgrade-20250101T000000Z-9.db") {
		if err := os.WriteFile(filepath.Join(folder, f), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = staged("server")
	saves(s, "the datastore is saved in "+path+" (3 MiB, revision 7)")
	if got, err := os.ReadFile(path); err != nil || string(got) != name {
		t.Errorf("%q, %v", got, err)
	}
	s.pruneSnapshots()
	if got := names(t, folder); !slices.Equal(got, slices.Sorted(slices.Values(append(stay, name)))) {
		t.Errorf("there are %v", got)
	}
	// An upgrade that cannot begin takes its snapshot with it.
	if err := s.discardSnapshot(); err != nil || slices.Contains(names(t, folder), name) {
		t.Errorf("it is still there: %v", err)
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
