package datastore

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

func TestStoreKeepsDataAcrossRestart(t *testing.T) {
	cfg := testConfig(t.TempDir())

	s, stop := start(t, cfg)
	c := newClient(t, s)
	put, err := c.OptimisticPut(t.Context(), "/a", []byte("1"), 0, kubernetes.PutOptions{})
	if err != nil || !put.Succeeded {
		t.Fatalf("put: %+v, %v", put, err)
	}
	stop()

	s, _ = start(t, cfg)
	got, err := newClient(t, s).Kubernetes.Get(t.Context(), "/a", kubernetes.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got.KV == nil || string(got.KV.Value) != "1" || got.KV.ModRevision != put.Revision {
		t.Errorf("after the restart /a is %v, want 1 at revision %d", got.KV, put.Revision)
	}
}

func TestStoreStates(t *testing.T) {
	cfg := testConfig(t.TempDir())
	s := New(cfg, testLog(t))
	if _, err := s.NewClient(); !errors.Is(err, ErrNotServing) {
		t.Errorf("client before Run: %v, want ErrNotServing", err)
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrNotServing) {
		t.Errorf("Check before Run: %v, want ErrNotServing", err)
	}
	if entries, err := os.ReadDir(cfg.Dir); err != nil || len(entries) != 0 {
		t.Errorf("New touched the disk: %v, %v", entries, err)
	}

	s, stop := start(t, cfg)
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("Check: %v", err)
	}
	if err := s.Run(t.Context(), func() {}); err == nil {
		t.Error("a second Run was allowed")
	}
	stop()
	if _, err := s.NewClient(); !errors.Is(err, ErrNotServing) {
		t.Errorf("client after Run: %v, want ErrNotServing", err)
	}
}

// A context that has ended before the store is open is not an error, and must not hang.
func TestStoreStopsWhileOpening(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := New(testConfig(t.TempDir()), testLog(t))
	if err := s.Run(ctx, func() {}); err != nil {
		t.Error(err)
	}
}

func TestStoreRefusesDirectoryInUse(t *testing.T) {
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)

	second := New(cfg, testLog(t))
	if err := second.Run(t.Context(), func() { t.Error("ready") }); !errors.Is(err, ErrInUse) {
		t.Errorf("second store: %v, want ErrInUse", err)
	}
	if err := s.Check(t.Context()); err != nil {
		t.Errorf("first store, after the second was refused: %v", err)
	}
	stop()
	start(t, cfg)
}

// With a batch interval far beyond the test, only the commit at the stop writes the changes to the database file.
func TestStoreCommitsWhenItStops(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Alone.BatchInterval *= 1000
	s, stop := start(t, cfg)
	want := fill(t, newClient(t, s), "/a/", 10, "x")
	stop()

	db, err := bbolt.Open(filepath.Join(cfg.Dir, memberDir, "snap", "db"), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		if got := tx.Bucket([]byte("key")).Stats().KeyN; got != 10 {
			t.Errorf("the file has %d of 10 revisions, the last should be %d", got, want)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// A first start that a crash has interrupted leaves a log from which etcd cannot start.
func TestStoreBeginsAfreshAfterUnfinishedCreation(t *testing.T) {
	cfg := testConfig(t.TempDir())
	for _, file := range []string{newFile, memberDir + "/wal/0000000000000000-0000000000000000.wal", memberDir + "/snap/db"} {
		name := filepath.Join(cfg.Dir, file)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s, stop := start(t, cfg)
	fill(t, newClient(t, s), "/a/", 1, "x")
	stop()
	if _, err := os.Stat(filepath.Join(cfg.Dir, newFile)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the marker is still there: %v", err)
	}
	s, _ = start(t, cfg)
	if got, err := newClient(t, s).Count(t.Context(), "/a/", kubernetes.CountOptions{}); err != nil || got != 1 {
		t.Errorf("%d keys, %v, want 1: a store that exists must never be created again", got, err)
	}
}

func TestStoreRemovesLeftovers(t *testing.T) {
	cfg := testConfig(t.TempDir())
	_, stop := start(t, cfg)
	stop()
	left := filepath.Join(cfg.Dir, memberDir, "snap", "db.tmp.123")
	if err := os.WriteFile(left, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, cfg)
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", left, err)
	}
}

// A member without others does not wait for an election timeout.
func TestStoreDoesNotWaitForElection(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Tick, cfg.Election = time.Second, 50*time.Second
	for range 2 { // new, and again
		began := time.Now()
		_, stop := start(t, cfg)
		if took := time.Since(began); took > cfg.Election/5 {
			t.Errorf("ready after %v", took)
		}
		stop()
	}
}
