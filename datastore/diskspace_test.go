package datastore

import (
	"context"
	"errors"
	"os"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// TestDiskSpace takes a volume from empty to full and back.
func TestDiskSpace(t *testing.T) {
	d := newDiskSpace(t.TempDir(), testLog(t))
	var free int64
	d.free = func() (int64, error) { return free, nil }
	for _, step := range []struct {
		name          string
		free          int64
		reserve       bool
		writesRefused bool
	}{
		{"plenty", reserveMinFree, true, false},
		{"less", minFree, true, false},
		{"little", minFree - 1, false, true}, // the released reserve adds no free space here, as if another program had used it at once
		{"a little more", resumeFree - 1, false, true},
		{"enough", resumeFree, false, false},
		{"little again", 0, false, true},
		{"plenty again", reserveMinFree, true, false},
	} {
		free = step.free
		if err := d.check(); err != nil {
			t.Fatal(err)
		}
		st, err := os.Stat(d.reservePath())
		if (err == nil) != step.reserve || d.writesRefused.Load() != step.writesRefused {
			t.Errorf("%s: reserve %v, writes refused %v", step.name, err == nil, d.writesRefused.Load())
		}
		if err == nil && st.Size() != reserveSize {
			t.Errorf("%s: the reserve has %d bytes", step.name, st.Size())
		}
	}
	// The released reserve may be enough.
	free = minFree - 1
	d.free = func() (int64, error) {
		if _, err := os.Stat(d.reservePath()); err != nil {
			return free + reserveSize, nil
		}
		return free, nil
	}
	if err := d.check(); err != nil || d.writesRefused.Load() {
		t.Errorf("writes refused %v, %v", d.writesRefused.Load(), err)
	}
}

// TestWritesOnAFullVolume: a full volume refuses changes like a reached quota. Reads, deletions and the record of the API
// server's compaction pass.
func TestWritesOnAFullVolume(t *testing.T) {
	var free atomic.Int64
	free.Store(reserveMinFree)
	s := New(testConfig(t.TempDir()), testLog(t))
	s.disk.free = func() (int64, error) { return free.Load(), nil }
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	defer func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	c := newClient(t, s)
	fill(t, c, "/a/", 2, "x")
	free.Store(0)
	if err := s.disk.check(); err != nil {
		t.Fatal(err)
	}
	if _, err := c.OptimisticPut(t.Context(), "/new", []byte("x"), 0, kubernetes.PutOptions{}); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a write: %v", err)
	}
	if _, err := c.Put(t.Context(), "/new", "x"); !errors.Is(err, rpctypes.ErrNoSpace) {
		t.Errorf("a plain write: %v", err)
	}
	if err := s.Check(t.Context()); !errors.Is(err, ErrDiskFull) {
		t.Errorf("Check: %v", err)
	}
	list, err := c.List(t.Context(), "/a/", kubernetes.ListOptions{})
	if err != nil || list.Count != 2 {
		t.Fatalf("%v, %v", list, err)
	}
	kv := list.Kvs[0]
	if again, err := c.OptimisticPut(t.Context(), string(kv.Key), []byte("x"), 0, kubernetes.PutOptions{}); err != nil || again.Succeeded {
		t.Errorf("an existing key was created again: %+v, %v", again, err)
	}
	if deleted, err := c.OptimisticDelete(t.Context(), string(kv.Key), kv.ModRevision, kubernetes.DeleteOptions{}); err != nil || !deleted.Succeeded {
		t.Errorf("a deletion: %+v, %v", deleted, err)
	}
	record := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(compactKey)}}}}}
	if _, err := (kvClient{s.transport.Load()}).Txn(context.Background(), record); err != nil {
		t.Errorf("the record of a compaction: %v", err)
	}
}

// TestDiskSpaceIsCheckedWhileWriting: a volume that another program fills suddenly is noticed after a bounded number of
// written bytes, without waiting for the interval.
func TestDiskSpaceIsCheckedWhileWriting(t *testing.T) {
	d := newDiskSpace(t.TempDir(), testLog(t))
	d.free = func() (int64, error) { return 0, nil }
	d.noteWrite(checkBytes - 1)
	if d.writesRefused.Load() {
		t.Error("checked too early")
	}
	d.noteWrite(1)
	if !d.writesRefused.Load() {
		t.Errorf("not checked after %d bytes", checkBytes)
	}
	put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Value: make([]byte, 100)}}}
	txn := &pb.TxnRequest{Success: []*pb.RequestOp{put, {Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{put}}}}}, Failure: []*pb.RequestOp{put}}
	if got := valueBytes(txn); got != 300 {
		t.Errorf("a transaction of 300 bytes counts %d", got)
	}
}
