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

type fakeSpace struct {
	total, inUse, freeBytes, limit int64
	entries                        uint64
	isFull                         bool
	rewrites, cleared              int
}

func (s *fakeSpace) size() (int64, int64) { return s.total, s.inUse }
func (s *fakeSpace) free() (int64, error) { return s.freeBytes, nil }
func (s *fakeSpace) applied() uint64      { return s.entries }
func (s *fakeSpace) full() bool           { return s.isFull }
func (s *fakeSpace) quota() int64         { return s.limit }
func (s *fakeSpace) defragment(context.Context) error {
	s.rewrites++
	s.total = s.inUse
	return nil
}
func (s *fakeSpace) clearFull(context.Context) error {
	s.cleared++
	s.isFull = false
	return nil
}

func TestKeeper(t *testing.T) {
	plenty := fakeSpace{freeBytes: 1000 * mib, limit: 1000 * mib}
	for _, tc := range []struct {
		name string
		// busy is how many entries are applied in each interval of a minute.
		busy              uint64
		space             fakeSpace
		ticks             int
		rewrites, cleared int
		wantErr           string
	}{
		{name: "half empty and large", space: fakeSpace{total: 100 * mib, inUse: 49 * mib}, ticks: 5, rewrites: 1},
		{name: "half full", space: fakeSpace{total: 100 * mib, inUse: 51 * mib}, ticks: 5},
		{name: "small", space: fakeSpace{total: 60 * mib, inUse: 1 * mib}, ticks: 5},
		{name: "quiet enough", busy: 120, space: fakeSpace{total: 100 * mib, inUse: 10 * mib}, ticks: 1, rewrites: 1},
		{name: "busy", busy: 121, space: fakeSpace{total: 100 * mib, inUse: 10 * mib}, ticks: 60},
		{name: "busy for too long", busy: 121, space: fakeSpace{total: 100 * mib, inUse: 10 * mib}, ticks: 62, rewrites: 1},
		{name: "no room for the copy", space: fakeSpace{total: 100 * mib, inUse: 49 * mib, freeBytes: 60 * mib}, ticks: 1, wantErr: "needs"},
		{name: "at the quota, with free pages", busy: 1000, space: fakeSpace{total: 1000 * mib, inUse: 600 * mib, isFull: true}, ticks: 3, rewrites: 1, cleared: 1},
		{name: "at the quota, full of data", space: fakeSpace{total: 1000 * mib, inUse: 950 * mib, isFull: true}, ticks: 3},
		{name: "alarm left from before", space: fakeSpace{total: 500 * mib, inUse: 400 * mib, isFull: true}, ticks: 3, cleared: 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			space := tc.space
			space.limit = plenty.limit
			if space.freeBytes == 0 {
				space.freeBytes = plenty.freeBytes
			}
			k := newKeeper(DefaultConfig(), testLog(t), &space)
			now := time.Now()
			for range tc.ticks {
				space.entries += tc.busy
				now = now.Add(time.Minute)
				err := k.tick(t.Context(), now)
				switch {
				case err == nil && tc.wantErr != "", err != nil && (tc.wantErr == "" || !strings.Contains(err.Error(), tc.wantErr)):
					t.Fatalf("tick: %v, want %q", err, tc.wantErr)
				}
			}
			if space.rewrites != tc.rewrites || space.cleared != tc.cleared {
				t.Errorf("%d rewrites, %d alarms cleared, want %d, %d", space.rewrites, space.cleared, tc.rewrites, tc.cleared)
			}
		})
	}
}

// The same with a real file and small thresholds.
func TestStoreDefragmentsByItself(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.BatchInterval = 10 * time.Millisecond
	cfg.Defrag.Interval = 50 * time.Millisecond
	cfg.Defrag.MinSize = 1 << 20
	s, _ := start(t, cfg)
	c := newClient(t, s)
	fill(t, c, "/a/", 300, string(bytes.Repeat([]byte("x"), 20_000)))
	keep := fill(t, c, "/b/", 3, "keep")
	if _, err := c.Delete(t.Context(), "/a/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	compact(t, s, keep+1)

	before := dbSize(t, s)
	if before < 4*mib {
		t.Fatalf("the test's file has only %d bytes", before)
	}
	if !within(10*time.Second, func() bool { return dbSize(t, s) < 1*mib }) {
		t.Fatalf("the file still has %d of %d bytes", dbSize(t, s), before)
	}
	if got, err := c.KV.Get(t.Context(), "/b/", clientv3.WithPrefix()); err != nil || len(got.Kvs) != 3 {
		t.Errorf("after the rewrite: %v, %v", got, err)
	}
}

// A store that was filled to its quota must take writes again without anybody's help once there is room.
func TestStoreRecoversFromQuota(t *testing.T) {
	cfg := testConfig(t.TempDir())
	cfg.BatchInterval = 10 * time.Millisecond
	cfg.Defrag.Interval = 50 * time.Millisecond
	cfg.Quota = 8 * mib
	s, _ := start(t, cfg)
	c := newClient(t, s)
	value := string(bytes.Repeat([]byte("x"), 100_000))
	var err error
	var last int64
	for i := 0; err == nil; i++ {
		var resp *clientv3.PutResponse
		if resp, err = c.Put(t.Context(), fmt.Sprintf("/a/%d", i), value); err == nil {
			last = resp.Header.Revision
		}
	}
	if !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Fatalf("writing ended with %v", err)
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrNoSpace) {
		t.Errorf("Check: %v, want ErrNoSpace", err)
	}

	// Deletes are allowed at the quota, and the API server compacts.
	if _, err := c.Delete(t.Context(), "/a/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	compact(t, s, last+1)
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

// within waits for what etcd does on timers of its own.
func within(limit time.Duration, done func() bool) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if done() {
			return true
		}
	}
	return false
}
