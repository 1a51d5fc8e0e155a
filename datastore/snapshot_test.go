package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/etcd/server/v3/lease"
	"go.etcd.io/etcd/server/v3/storage/backend"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.uber.org/zap"

	"kedge/datastore/integrity"
)

// write is an acknowledged write.
type write struct {
	key, value string
	revision   int64
}

// writeLoad writes until stop is called, which returns all acknowledged writes. newest returns the highest revision so far.
func writeLoad(t *testing.T, s *Store, n int) (newest func() int64, stop func() []write) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	var all []write
	var highest int64
	var running sync.WaitGroup
	for i := range n {
		c := newClient(t, s)
		running.Go(func() {
			for sequence := 0; ctx.Err() == nil; sequence++ {
				w := write{key: fmt.Sprintf("/w/%d/%d", i, sequence%50), value: strings.Repeat(fmt.Sprint(sequence, " "), 100)}
				resp, err := c.Put(context.Background(), w.key, w.value)
				if err != nil {
					t.Errorf("write: %v", err)
					return
				}
				w.revision = resp.Header.Revision
				mu.Lock()
				all, highest = append(all, w), max(highest, w.revision)
				mu.Unlock()
			}
		})
	}
	newest = func() int64 {
		mu.Lock()
		defer mu.Unlock()
		return highest
	}
	return newest, func() []write {
		cancel()
		running.Wait()
		return all
	}
}

// TestSnapshotUnderLoad: a snapshot that is saved while others write opens as a store that has all writes up to its
// revision, among them all that were acknowledged before it, and none after it.
func TestSnapshotUnderLoad(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	newest, stop := writeLoad(t, s, 4)
	dir := t.TempDir()
	var snapshots []Snapshot
	for i := range 4 {
		for before := newest(); newest() < before+100; {
			time.Sleep(time.Millisecond)
		}
		before := newest()
		saved, err := s.SaveSnapshot(t.Context(), filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			t.Fatal(err)
		}
		if saved.Revision < before {
			t.Errorf("the snapshot is of revision %d, and %d was acknowledged before", saved.Revision, before)
		}
		if again, err := VerifySnapshot(saved.Path); err != nil || again != saved {
			t.Errorf("%+v, %v, want %+v", again, err, saved)
		}
		if st, err := os.Stat(saved.Path); err != nil || st.Mode().Perm() != 0o600 || st.Size() != saved.Size {
			t.Errorf("%v, %v", st, err)
		}
		snapshots = append(snapshots, saved)
	}
	written := stop()
	for _, saved := range snapshots {
		b := backend.NewDefaultBackend(zap.NewNop(), saved.Path)
		kv := mvcc.NewStore(zap.NewNop(), b, &lease.FakeLessor{}, mvcc.StoreConfig{})
		if kv.Rev() != saved.Revision {
			t.Errorf("the store is at revision %d, the snapshot at %d", kv.Rev(), saved.Revision)
		}
		n := 0
		for _, w := range written {
			if w.revision > saved.Revision {
				continue
			}
			n++
			got, err := kv.Range(t.Context(), []byte(w.key), nil, mvcc.RangeOptions{Rev: w.revision})
			if err != nil || len(got.KVs) != 1 || got.KVs[0].ModRevision != w.revision || string(got.KVs[0].Value) != w.value {
				t.Fatalf("the write of %s at %d is lost: %v, %v", w.key, w.revision, got, err)
			}
		}
		t.Logf("%d of %d writes, %d bytes", n, len(written), saved.Size)
		if err := errors.Join(kv.Close(), b.Close()); err != nil {
			t.Error(err)
		}
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != len(snapshots) {
		t.Errorf("%v, %v", entries, err)
	}
}

// TestSnapshotOfCluster: a snapshot of any member has what another member has acknowledged just before.
func TestSnapshotOfCluster(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	dir := t.TempDir()
	for i := range 9 {
		written := put(t, nodes[i%3], "/k", fmt.Sprint(i))
		saved, err := nodes[(i/3+i+1)%3].SaveSnapshot(t.Context(), filepath.Join(dir, fmt.Sprint(i)))
		if err != nil || saved.Revision < written {
			t.Errorf("%+v, %v, want revision %d", saved, err, written)
		}
	}
	// Without a majority there is none: it might lack what the others have acknowledged.
	nodes[1].stop()
	nodes[2].stop()
	if saved, err := nodes[0].SaveSnapshot(t.Context(), filepath.Join(dir, "alone")); err == nil {
		t.Errorf("without a majority: %+v", saved)
	}
}

// TestSnapshotAfterDeletions: the revision of a snapshot is that of the store, also when its last write was a deletion and was
// compacted.
func TestSnapshotAfterDeletions(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	fill(t, c, "/a/", 3, "x")
	deleted, err := c.Client.Delete(t.Context(), "/a/00001")
	if err != nil {
		t.Fatal(err)
	}
	want := deleted.Header.Revision
	if err := (&serverDatabase{store: s, server: s.transport.Load().server, transport: s.transport.Load()}).compact(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	saved, err := s.SaveSnapshot(t.Context(), filepath.Join(t.TempDir(), "s"))
	if err != nil || saved.Revision != want {
		t.Errorf("%+v, %v, want revision %d", saved, err, want)
	}
}

func TestSnapshotNeedsAServingStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	s, stop := start(t, testConfig(t.TempDir()))
	stop()
	if _, err := s.SaveSnapshot(t.Context(), path); !errors.Is(err, ErrNotServing) {
		t.Errorf("a stopped store: %v", err)
	}
	s, _ = start(t, testConfig(t.TempDir()))
	// The file is not rewritten while it is copied: etcd would take no writes meanwhile.
	s.fileMu.Lock()
	d := &serverDatabase{store: s, server: s.transport.Load().server, transport: s.transport.Load()}
	if err := d.defragment(t.Context()); !errors.Is(err, errNotNow) {
		t.Errorf("a defragmentation during a snapshot: %v", err)
	}
	s.fileMu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := s.SaveSnapshot(ctx, path); err == nil {
		t.Error("it was saved for nobody")
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a file: %v", err)
	}
}

// savedDatabase returns the database of a store with keys, as it is in a snapshot.
func savedDatabase(t *testing.T) []byte {
	t.Helper()
	s, _ := start(t, testConfig(t.TempDir()))
	fill(t, newClient(t, s), "/k/", damagedKeys, strings.Repeat("x", 40))
	saved, err := s.SaveSnapshot(t.Context(), filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(saved.Path)
	if err != nil {
		t.Fatal(err)
	}
	return data[:len(data)-sha256.Size]
}

// rootPage returns the number of the page with the root of a database. The newer of bbolt's two meta pages has it: see the type
// Meta of its package internal/common.
func rootPage(database []byte) int {
	const header, root, transaction = 16, 16, 48
	word := func(page, at int) uint64 {
		return binary.LittleEndian.Uint64(database[page*os.Getpagesize()+header+at:])
	}
	newer := 0
	if word(1, transaction) > word(0, transaction) {
		newer = 1
	}
	return int(word(newer, root))
}

// TestSnapshotThatFailsLeavesNoFile: neither a write error nor a full volume nor a damaged database leaves a file.
func TestSnapshotThatFailsLeavesNoFile(t *testing.T) {
	database := savedDatabase(t)
	size := int64(len(database))
	damaged := bytes.Clone(database)
	damaged[rootPage(database)*os.Getpagesize()+10] ^= 1 // the count of its elements
	plenty := func(string) (int64, error) { return 1 << 40, nil }
	whole := func(data []byte) func(io.Writer) error {
		return func(w io.Writer) error { _, err := w.Write(data); return err }
	}
	broken := errors.New("the disk is broken")
	for name, tc := range map[string]struct {
		free  func(string) (int64, error)
		write func(io.Writer) error
		want  string
	}{
		"a full volume": {func(string) (int64, error) { return size + resumeFree - 1, nil }, whole(database), "free some space"},
		"a volume that fills": {func() func(string) (int64, error) {
			questions := 0
			return func(string) (int64, error) {
				questions++
				if questions == 1 {
					return 1 << 40, nil
				}
				return resumeFree - 1, nil
			}
		}(), func(w io.Writer) error { return errors.Join(whole(database)(w), whole(make([]byte, 8<<20))(w)) }, "MiB free; free some space"},
		"a write error": {plenty, func(w io.Writer) error { return errors.Join(whole(database[:len(database)/2])(w), broken) }, broken.Error()},
		"cut off":       {plenty, whole(database[:len(database)-100]), "cut off"},
		"too short":     {plenty, whole(database[:len(database)/2]), "too short"},
		"a damaged one": {plenty, whole(damaged), "page"},
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, "s.db")
		saved, err := saveSnapshot(path, tc.free, size, tc.write)
		if err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %+v, %v", name, saved, err)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			t.Errorf("%s: left %v, %v", name, entries, err)
		}
		var bad *integrity.Damage
		if name == "a damaged one" && !errors.As(err, &bad) {
			t.Errorf("%s: %v does not say that the database is damaged", name, err)
		}
	}
	// What a killed process has left is replaced, and a snapshot never is.
	dir := t.TempDir()
	path := filepath.Join(dir, "s.db")
	if err := os.WriteFile(filepath.Join(dir, ".tmp-s.db"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := saveSnapshot(path, plenty, size, whole(database)); err != nil {
		t.Error(err)
	}
	if _, err := saveSnapshot(path, plenty, size, whole(database)); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a second one: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
		t.Errorf("left %v, %v", entries, err)
	}
}

// TestVerifySnapshot finds every flipped bit, wherever it is, and every missing end.
func TestVerifySnapshot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.db")
	database := savedDatabase(t)
	saved, err := saveSnapshot(path, volumeFree, int64(len(database)), func(w io.Writer) error { _, err := w.Write(database); return err })
	if err != nil || saved.Hash != fmt.Sprintf("%x", sha256.Sum256(database)) {
		t.Fatalf("%+v, %v", saved, err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := []int{0, os.Getpagesize() + 20, len(database) - 1, len(database), len(whole) - 1}
	for range 50 {
		at = append(at, rand.IntN(len(whole)))
	}
	for _, i := range at {
		flipped := bytes.Clone(whole)
		flipped[i] ^= 1 << rand.IntN(8)
		if err := os.WriteFile(path, flipped, 0o600); err != nil {
			t.Fatal(err)
		}
		if found, err := VerifySnapshot(path); err == nil || !strings.Contains(err.Error(), "not as it was written") {
			t.Errorf("byte %d of %d: %+v, %v", i, len(whole), found, err)
		}
	}
	for _, n := range []int{0, 31, 32, len(whole) / 2, len(database), len(whole) - 1} {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if found, err := VerifySnapshot(path); err == nil {
			t.Errorf("%d of %d bytes: %+v", n, len(whole), found)
		}
	}
}
