package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// Each resource type has a client. Closing one must not affect the others.
func TestClientCloseLeavesOthersAlone(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	doomed, other := newClient(t, s), newClient(t, s)

	doomedWatch := doomed.Watch(t.Context(), "/a/", clientv3.WithPrefix())
	otherWatch := other.Watch(t.Context(), "/a/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-otherWatch
	lease, err := other.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	alive, err := other.KeepAlive(t.Context(), lease.ID)
	if err != nil {
		t.Fatal(err)
	}
	<-alive

	doomed.Close()
	if _, open := <-doomedWatch; open {
		t.Error("the closed client's watch is open")
	}

	fill(t, other, "/a/", 1, "x")
	if resp, ok := <-otherWatch; !ok || len(resp.Events) != 1 {
		t.Errorf("the other client's watch got %v, %v", resp, ok)
	}
	if ttl, err := other.TimeToLive(t.Context(), lease.ID); err != nil || ttl.TTL <= 0 {
		t.Errorf("the other client's lease: %v, %v", ttl, err)
	}
	if _, err := newClient(t, s).Get(t.Context(), "/a/", kubernetes.GetOptions{}); err != nil {
		t.Errorf("a new client: %v", err)
	}
}

// The API server wraps client.KV in place, once per resource type. On a shared client the wrappers would nest.
func TestClientsShareNothing(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	a, b := newClient(t, s), newClient(t, s)
	counting := &countingKV{KV: a.KV}
	a.KV = counting

	fill(t, b, "/a/", 1, "x")
	if n := counting.puts.Load(); n != 0 {
		t.Errorf("a write through one client passed the KV of another %d times", n)
	}
	fill(t, a, "/a/", 1, "x")
	if n := counting.puts.Load(); n != 1 {
		t.Errorf("a client's own wrapper was passed %d times, want 1", n)
	}
	if a.Client == b.Client || a.Watcher == b.Watcher || a.Lease == b.Lease {
		t.Error("two clients share a part")
	}
}

type countingKV struct {
	clientv3.KV
	puts atomic.Int64
}

func (k *countingKV) Put(ctx context.Context, key, value string, opts ...clientv3.OpOption) (*clientv3.PutResponse, error) {
	k.puts.Add(1)
	return k.KV.Put(ctx, key, value, opts...)
}

// The API server's feature check asks each endpoint for its version; package hook tests the check itself.
func TestClientEndpointsAndStatus(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)

	if got := c.Endpoints(); len(got) != 1 || got[0] != Endpoint {
		t.Fatalf("endpoints %q, want %q", got, Endpoint)
	}
	status, err := c.Status(t.Context(), Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	if status.Version == "" || status.Leader != status.Header.MemberId || status.DbSize == 0 || len(status.Errors) > 0 {
		t.Errorf("status %v", status)
	}
	c.SetEndpoints("http://a.invalid", "http://b.invalid") // used to dereference a nil resolver
}

func TestClientRangeStream(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	const keys = 357 // many chunks, the last one not full
	last := fill(t, c, "/a/", keys, "value")

	chunks, err := c.GetStream(t.Context(), "/a/", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	got, err := clientv3.GetStreamToGetResponse(chunks)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Kvs) != keys || got.Count != keys || got.Header.Revision != last {
		t.Errorf("%d keys, count %d, revision %d, want %d, %d, %d", len(got.Kvs), got.Count, got.Header.Revision, keys, keys, last)
	}
	for i, kv := range got.Kvs {
		if want := fmt.Sprintf("/a/%05d", i); string(kv.Key) != want {
			t.Fatalf("key %d is %q, want %q", i, kv.Key, want)
		}
	}
}

// The errors of a stream are those of a get.
func TestClientRangeStreamErrors(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	last := fill(t, c, "/a/", 300, "value")
	if _, err := c.Compact(t.Context(), last); err != nil {
		t.Fatal(err)
	}
	chunks, err := c.GetStream(t.Context(), "/a/", clientv3.WithPrefix(), clientv3.WithRev(last-1))
	if err != nil {
		t.Fatal(err)
	}
	_, gotErr := clientv3.GetStreamToGetResponse(chunks)
	_, wantErr := c.KV.Get(t.Context(), "/a/", clientv3.WithPrefix(), clientv3.WithRev(last-1))
	if wantErr == nil || !errors.Is(gotErr, wantErr) {
		t.Errorf("stream failed with %v, a get with %v", gotErr, wantErr)
	}

}

// The API server clears the list of a chunk while etcd still reads its own.
func TestRangeStreamDoesNotShareLists(t *testing.T) {
	g := newGate(alwaysLed)
	defer g.close()
	sent := &pb.RangeStreamResponse{RangeResponse: &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{}}}}
	list := sent.RangeResponse.Kvs
	client, err := openStream(g, t.Context(), runGuarded, func(s *serverStream[pb.RangeRequest, pb.RangeStreamResponse]) error {
		return rangeStream{s}.Send(sent)
	})
	if err != nil {
		t.Fatal(err)
	}
	got, err := client.Recv()
	if err != nil {
		t.Fatal(err)
	}
	got.RangeResponse.Kvs[0] = nil
	if list[0] == nil {
		t.Error("client and server share a list")
	}
}

func TestClientLeaseExpires(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	lease, err := c.Grant(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	watch := c.Watch(t.Context(), "/a")
	if _, err := c.Put(t.Context(), "/a", "x", clientv3.WithLease(lease.ID)); err != nil {
		t.Fatal(err)
	}
	for resp := range watch {
		for _, event := range resp.Events {
			if event.Type == clientv3.EventTypeDelete {
				return
			}
		}
	}
	t.Error("the watch ended before the key expired")
}

func TestClientLeaseKeepAlive(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	lease, err := c.Grant(t.Context(), 60)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := c.KeepAliveOnce(t.Context(), lease.ID); err != nil || resp.TTL != 60 {
		t.Errorf("keep alive once: %v, %v", resp, err)
	}
	alive, err := c.KeepAlive(t.Context(), lease.ID)
	if err != nil {
		t.Fatal(err)
	}
	if resp := <-alive; resp == nil || resp.TTL != 60 {
		t.Errorf("keep alive: %v", resp)
	}
	if leases, err := c.Leases(t.Context()); err != nil || len(leases.Leases) != 1 {
		t.Errorf("leases: %v, %v", leases, err)
	}
	if _, err := c.Revoke(t.Context(), lease.ID); err != nil {
		t.Error(err)
	}
	if resp, err := c.TimeToLive(t.Context(), lease.ID); err != nil || resp.TTL != -1 {
		t.Errorf("revoked lease: %v, %v", resp, err)
	}
}

// Consistent lists from the API server's caches wait for this answer.
func TestClientRequestProgress(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	ctx := clientv3.WithRequireLeader(t.Context())
	watch := c.Watch(ctx, "/a/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-watch
	want := fill(t, c, "/elsewhere/", 3, "x")

	if err := c.RequestProgress(ctx); err != nil {
		t.Fatal(err)
	}
	for resp := range watch {
		if resp.IsProgressNotify() {
			if resp.Header.Revision != want {
				t.Errorf("progress at revision %d, want %d", resp.Header.Revision, want)
			}
			return
		}
		t.Errorf("unexpected %v", resp)
	}
	t.Error("the watch ended")
}

func TestClientWatchDeliversInOrder(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	first := fill(t, c, "/a/", 1, "old")
	const n = 2000
	last := fill(t, c, "/a/", n, "new")

	next := first
	for resp := range c.Watch(t.Context(), "/a/", clientv3.WithPrefix(), clientv3.WithRev(first), clientv3.WithPrevKV()) {
		if err := resp.Err(); err != nil {
			t.Fatal(err)
		}
		for _, event := range resp.Events {
			if event.Kv.ModRevision != next {
				t.Fatalf("event of revision %d, want %d", event.Kv.ModRevision, next)
			}
			if next == first+1 && (event.PrevKv == nil || string(event.PrevKv.Value) != "old") {
				t.Errorf("previous value %v, want old", event.PrevKv)
			}
			if next == last {
				return
			}
			next++
		}
	}
}

// etcd's own in-process client panics in this call.
func TestClientDefragment(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	fill(t, c, "/a/", 10, "x")
	if _, err := c.Defragment(t.Context(), Endpoint); err != nil {
		t.Fatal(err)
	}
	if got, err := c.Count(t.Context(), "/a/", kubernetes.CountOptions{}); err != nil || got != 10 {
		t.Errorf("%d keys, %v, want 10", got, err)
	}
}

func TestClientSnapshot(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	fill(t, c, "/a/", 1000, string(bytes.Repeat([]byte("x"), 1000)))
	r, err := c.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	snapshot, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	// etcd appends the checksum of the file.
	file, sum := snapshot[:len(snapshot)-sha256.Size], snapshot[len(snapshot)-sha256.Size:]
	if got := sha256.Sum256(file); !bytes.Equal(got[:], sum) || len(file) < 1000*1000 {
		t.Errorf("%d bytes with checksum %x, want %x", len(file), got, sum)
	}
}

func TestClientHashKV(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	revision := fill(t, c, "/a/", 10, "x")
	first, err := c.HashKV(t.Context(), Endpoint, revision)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, c, "/b/", 10, "x")
	if again, err := c.HashKV(t.Context(), Endpoint, revision); err != nil || again.Hash != first.Hash || first.Hash == 0 {
		t.Errorf("hash of one revision is %v and then %v, %v", first, again, err)
	}
}

func TestClientMembers(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	members, err := newClient(t, s).MemberList(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(members.Members) != 1 || members.Members[0].Name != "kedge" || len(members.Members[0].ClientURLs) != 0 {
		t.Errorf("members %v", members.Members)
	}
}

// The store has no users, and authentication cannot be enabled.
func TestClientAuthIsOff(t *testing.T) {
	s, _ := start(t, testConfig(t.TempDir()))
	if resp, err := newClient(t, s).AuthEnable(t.Context()); err == nil {
		t.Errorf("AuthEnable answered %v", resp)
	}
}

// A store that stops ends all calls of its clients, and refuses later ones.
func TestClientsOfStoppingStore(t *testing.T) {
	s, stop := start(t, testConfig(t.TempDir()))
	c := newClient(t, s)
	watch := c.Watch(t.Context(), "/a/", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-watch
	writing := make(chan error, 1)
	go func() {
		for {
			if _, err := c.Put(t.Context(), "/a/b", "x"); err != nil {
				writing <- err
				return
			}
		}
	}()
	<-watch

	began := time.Now()
	stop()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("stopping took %v", took)
	}
	if err := <-writing; !isStopped(err) {
		t.Errorf("the writer got %v", err)
	}
	if _, err := c.Put(t.Context(), "/a/b", "x"); !isStopped(err) {
		t.Errorf("a late write got %v", err)
	}
	if _, err := c.KV.Get(t.Context(), "/a/b", clientv3.WithSerializable()); !isStopped(err) {
		t.Errorf("a late read got %v", err)
	}
}
