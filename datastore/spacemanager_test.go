package datastore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const mib = int64(1 << 20)

type fakeDatabase struct {
	now               usage
	live              int64 // what remains in use after a compaction
	late              int64 // of that, what is deleted during the first rewrite
	rewrites, cleared int
}

func (d *fakeDatabase) usage() (usage, error) { return d.now, nil }

func (d *fakeDatabase) compact(_ context.Context, revision int64) error {
	d.now.inUse = d.live
	return nil
}

func (d *fakeDatabase) defragment(context.Context) error {
	d.rewrites++
	d.now.total = d.now.inUse
	if d.late > 0 {
		d.now.revision++
		d.live, d.late = d.live-d.late, 0
	}
	return nil
}

func (d *fakeDatabase) disarmAlarms(context.Context) error {
	d.cleared++
	d.now.full = false
	return nil
}

func TestSpaceManager(t *testing.T) {
	for _, tc := range []struct {
		name string
		// busy is the number of entries applied per interval of a minute, and deletions the increase of the revision.
		busy      uint64
		deletions int64
		// The volume has 1000 MiB free and the quota is 1000 MiB unless the case says otherwise.
		usage             usage
		live, late        int64
		ticks             int
		rewrites, cleared int
		wantErr           string
	}{
		{name: "half empty and large", usage: usage{total: 100 * mib, inUse: 49 * mib}, ticks: 5, rewrites: 1},
		{name: "half full", usage: usage{total: 100 * mib, inUse: 51 * mib}, ticks: 5},
		{name: "small", usage: usage{total: 60 * mib, inUse: 1 * mib}, ticks: 5},
		{name: "quiet enough", busy: 120, usage: usage{total: 100 * mib, inUse: 10 * mib}, ticks: 1, rewrites: 1},
		{name: "busy", busy: 121, usage: usage{total: 100 * mib, inUse: 10 * mib}, ticks: 60},
		{name: "busy for too long", busy: 121, usage: usage{total: 100 * mib, inUse: 10 * mib}, ticks: 62, rewrites: 1},
		{name: "no room for the copy", usage: usage{total: 100 * mib, inUse: 49 * mib, free: 60 * mib}, ticks: 1, wantErr: "needed"},
		{name: "full of history", busy: 1000, usage: usage{total: 1000 * mib, inUse: 900 * mib, full: true}, live: 600 * mib, ticks: 3, rewrites: 1, cleared: 1},
		{name: "full of data", usage: usage{total: 1000 * mib, inUse: 950 * mib, full: true}, live: 950 * mib, ticks: 3, rewrites: 1},
		{name: "full of data, being deleted", deletions: 1, usage: usage{total: 1000 * mib, inUse: 950 * mib, full: true}, live: 950 * mib, ticks: 3, rewrites: 3},
		{name: "full of data that is deleted during the rewrite", usage: usage{total: 1000 * mib, inUse: 950 * mib, full: true}, live: 950 * mib, late: 500 * mib, ticks: 3, rewrites: 2, cleared: 1},
		{name: "full no more", usage: usage{total: 500 * mib, inUse: 400 * mib, full: true}, ticks: 3, cleared: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			db := fakeDatabase{now: tc.usage, live: tc.live, late: tc.late}
			db.now.quota, db.now.revision = 1000*mib, 1
			if db.now.free == 0 {
				db.now.free = 1000 * mib
			}
			k := newSpaceManager(DefaultConfig().Defrag, testLog(t), &db)
			now := time.Now()
			for range tc.ticks {
				db.now.applied += tc.busy
				db.now.revision += tc.deletions
				now = now.Add(time.Minute)
				err := k.reconcile(t.Context(), now)
				switch {
				case err == nil && tc.wantErr != "", err != nil && (tc.wantErr == "" || !strings.Contains(err.Error(), tc.wantErr)):
					t.Fatalf("reconcile: %v, want %q", err, tc.wantErr)
				}
			}
			if db.rewrites != tc.rewrites || db.cleared != tc.cleared {
				t.Errorf("%d rewrites, %d alarms cleared, want %d, %d", db.rewrites, db.cleared, tc.rewrites, tc.cleared)
			}
		})
	}
}

// The same with a real file and small thresholds.
func TestStoreDefragmentsByItself(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Alone.BatchInterval = 10 * time.Millisecond
	cfg.Defrag.Interval = 50 * time.Millisecond
	cfg.Defrag.MinSize = 1 << 20
	cfg.Defrag.QuietRate = 1e6 // the test writes while it waits
	s, _ := start(t, cfg)
	c := newClient(t, s)
	fill(t, c, "/a/", 300, string(bytes.Repeat([]byte("x"), 20_000)))
	keep := fill(t, c, "/b/", 3, "keep")
	before := dbSize(t, s) // while there is nothing to gain
	if before < 4*mib {
		t.Fatalf("the test's file has only %d bytes", before)
	}
	if _, err := c.Delete(t.Context(), "/a/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	compact(t, s, keep+1)

	shrunk := func() bool {
		// bbolt counts the pages that a commit frees as free from the next commit on.
		fill(t, c, "/b/", 1, "keep")
		return dbSize(t, s) < 1*mib
	}
	if !within(10*time.Second, shrunk) {
		t.Fatalf("the file still has %d of %d bytes", dbSize(t, s), before)
	}
	if got, err := c.KV.Get(t.Context(), "/b/", clientv3.WithPrefix()); err != nil || len(got.Kvs) != 3 {
		t.Errorf("after the rewrite: %v, %v", got, err)
	}
}

// A store that has reached its quota must accept writes again, without an administrator, once there is room.
func TestStoreRecoversFromQuota(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.Alone.BatchInterval = 10 * time.Millisecond
	cfg.Defrag.Interval = 50 * time.Millisecond
	cfg.Quota = 8 * mib
	s, _ := start(t, cfg)
	c := newClient(t, s)
	value := string(bytes.Repeat([]byte("x"), 100_000))
	var err error
	for i := 0; err == nil; i++ {
		_, err = c.Put(t.Context(), fmt.Sprintf("/a/%d", i), value)
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("writing ended with %v", err)
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Check: %v, want ErrNoSpace", err)
	}

	// Deletions are allowed at the quota.
	if _, err := c.Delete(t.Context(), "/a/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if !within(10*time.Second, func() bool { return s.Check(t.Context()) == nil }) {
		t.Fatalf("still not taking writes: %v", s.Check(t.Context()))
	}
	fill(t, c, "/b/", 1, value)
}

func compact(t *testing.T, s *Store, revision int64) {
	t.Helper()
	if _, err := newClient(t, s).Compact(t.Context(), revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
}

func dbSize(t *testing.T, s *Store) int64 {
	t.Helper()
	status, err := newClient(t, s).Status(t.Context(), Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	return status.DbSize
}

// within waits for events that etcd triggers by its own timers.
func within(limit time.Duration, done func() bool) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if done() {
			return true
		}
	}
	return false
}
