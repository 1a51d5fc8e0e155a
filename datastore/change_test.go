package datastore

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
	"go.etcd.io/etcd/server/v3/etcdserver"

	"kedge/datastore/peers"
)

// pool holds the members that clients use. A member stays in it while it is stopped.
type pool struct {
	mu    sync.Mutex
	nodes []*testNode
}

func (p *pool) add(nodes ...*testNode) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.nodes = append(p.nodes, nodes...)
}

func (p *pool) pick(client int) *testNode {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodes[client%len(p.nodes)]
}

// TestGrowAndShrink grows a cluster from 1 to 5 members and shrinks it to 1 under load. In each step one member is killed
// and started again.
func TestGrowAndShrink(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a").start()
	var p pool
	p.add(a)
	watches := observe(t, "/h/", p.pick)
	h := record(p.pick, 5, 3)

	grow := func(via *testNode, first, second string, all ...string) (*testNode, *testNode) {
		x, y := c.join(via, first), c.join(via, second)
		c.awaitVoters(via, all...)
		p.add(x, y)
		return x, y
	}
	restart := func(n *testNode) {
		n.kill()
		time.Sleep(300 * time.Millisecond)
		n.cfg.Join = nil
		n.launch()
		n.awaitReady()
	}
	b, d := grow(a, "b", "d", "a", "b", "d")
	restart(c.leader(a, b, d))
	e, f := grow(b, "e", "f", "a", "b", "d", "e", "f")
	restart(e)
	restart(c.leader(a, b, d, e, f))

	// The removed members may be the leader.
	for i, gone := range []*testNode{f, a} {
		if err := d.Remove(t.Context(), gone.name); err != nil {
			t.Fatal(err)
		}
		<-gone.done
		if !errors.Is(gone.err, ErrRemoved) {
			t.Errorf("%d: %s ended with %v, want ErrRemoved", i, gone.name, gone.err)
		}
	}
	c.awaitVoters(d, "b", "d", "e")
	restart(b)
	for _, name := range []string{"e", "b"} {
		if err := d.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	c.awaitVoters(d, "d")
	put(t, d, "/end", "1")
	h.End(t)
	watches.end(t, d)

	// After its next start the store, which is alone again, does not listen.
	d.stop()
	d.start()
	select {
	case <-d.mesh.Opened():
		t.Error("a store that is alone again listens")
	default:
	}
	if got := get(t, d, "/end"); got != "1" {
		t.Errorf("/end is %q", got)
	}
}

// Members that were admitted and never start do not block others.
func TestUnstartedLearnersDoNotBlock(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a").start()
	for _, name := range []string{"o1", "o2", "o3", "o4", "o5"} {
		c.admit(a, name)
	}
	c.join(a, "b")
	c.awaitVoters(a, "a", "b")
	// The same name once more, as from a machine that has lost its admission.
	c.join(a, "o5")
	c.awaitVoters(a, "a", "b", "o5")
	members, err := a.Members(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	unstarted := 0
	for _, m := range members {
		if !m.Started {
			unstarted++
			if !m.Learner || m.Reachable || !strings.HasPrefix(m.Name, "o") {
				t.Errorf("unstarted learner %+v", m)
			}
		}
	}
	if unstarted == 0 || unstarted > maxPendingLearners {
		t.Errorf("%d unstarted learners of %+v", unstarted, members)
	}
}

// A new member of the same name replaces a dead one, but not one that is alive or needed for a majority.
func TestReplaceDeadMember(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	a, b := nodes[0], nodes[1]
	elsewhere := []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:1")}
	if _, err := a.Admit(t.Context(), "b", elsewhere); !errors.Is(err, ErrMemberExists) {
		t.Errorf("admission with the name of a member that is alive: %v, want ErrMemberExists", err)
	}
	if _, err := a.Admit(t.Context(), "a", elsewhere); !errors.Is(err, ErrMemberExists) {
		t.Errorf("admission with the name of this member: %v, want ErrMemberExists", err)
	}
	put(t, a, "/a", "1")
	c.admit(a, "orphan")
	b.kill()
	c.await("b is unreachable", func() error {
		if a.mesh.Status(b.book.Self().ID).Alive(time.Now()) {
			return errors.New("alive")
		}
		return nil
	})
	if err := a.Remove(t.Context(), "c"); !errors.Is(err, ErrQuorum) {
		t.Errorf("removal of one of two members alive of three: %v, want ErrQuorum", err)
	}
	again := c.join(a, "b")
	c.awaitVoters(a, "a", "b", "c")
	if got := get(t, again, "/a"); got != "1" {
		t.Errorf("the new b has %q", got)
	}
	// The old member starts again.
	b.launch()
	<-b.done
	if !errors.Is(b.err, ErrRemoved) {
		t.Errorf("the old b: %v, want ErrRemoved", b.err)
	}
	if got := get(t, again, "/a"); got != "1" {
		t.Errorf("with the old b running the new one has %q", got)
	}
}

func TestRemovedMember(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	a, b := nodes[0], nodes[1]
	put(t, a, "/a", "1")
	if err := a.Remove(t.Context(), "nobody"); !errors.Is(err, ErrNoMember) {
		t.Errorf("removal of an unknown member: %v, want ErrNoMember", err)
	}

	// Removed while it is stopped.
	b.stop()
	gone := b.book.Get()
	if err := a.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	body, err := json.Marshal(map[string]any{"cluster": gone.Cluster, "from": gone.Self, "others": gone.Others})
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: peerClient(t, b.cfg.Peer), DisableKeepAlives: true}}
	resp, err := client.Post(fmt.Sprintf("https://127.0.0.1:%d/kedge/hello", a.cfg.Peer.Port), "application/json", bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(answer), `"removed":true`) {
		t.Errorf("the heartbeat of the removed member was answered with %s, %v", answer, err)
	}
	b.launch()
	<-b.done
	if !errors.Is(b.err, ErrRemoved) {
		t.Fatalf("b: %v, want ErrRemoved", b.err)
	}
	// The directory is marked, so a further start needs no other member to fail.
	c.lan.isolate("b", true)
	b.launch()
	<-b.done
	if !errors.Is(b.err, ErrRemoved) {
		t.Fatalf("b, started again: %v, want ErrRemoved", b.err)
	}
	c.lan.isolate("b", false)

	// SetAside keeps the old store, and the member may join again.
	kept, err := SetAside(b.cfg.Dir, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if holds, err := HoldsStore(b.cfg.Dir); err != nil || holds {
		t.Errorf("the directory holds a store: %v, %v", holds, err)
	}
	if holds, err := HoldsStore(kept); err != nil || !holds {
		t.Errorf("the directory set aside holds a store: %v, %v", holds, err)
	}
	admission, err := a.Admit(t.Context(), "b", []netip.AddrPort{b.port.at})
	if err != nil {
		t.Fatal(err)
	}
	b.cfg.Join = &admission
	b.start()
	c.awaitVoters(a, "a", "b", "c")

	// Removed by itself, while it leads.
	leader := c.leader(nodes...)
	if err := leader.Remove(t.Context(), leader.name); err != nil {
		t.Fatal(err)
	}
	<-leader.done
	if !errors.Is(leader.err, ErrRemoved) {
		t.Errorf("the leader that removed itself: %v, want ErrRemoved", leader.err)
	}
	left := without(nodes, leader)
	c.awaitVoters(left[0], names(left)...)
	if got := get(t, left[0], "/a"); got != "1" {
		t.Errorf("/a is %q", got)
	}
	if err := left[0].Remove(t.Context(), left[1].name); err != nil {
		t.Fatal(err)
	}
	<-left[1].done
	if err := left[0].Remove(t.Context(), left[0].name); !errors.Is(err, ErrQuorum) {
		t.Errorf("removal of the last member: %v, want ErrQuorum", err)
	}
}

// A member that was admitted and removed before its first start learns of it.
func TestAdmissionIsOver(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a").start()
	b := c.admit(a, "b")
	if err := a.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	b.launch()
	<-b.done
	if !errors.Is(b.err, ErrRemoved) {
		t.Errorf("b: %v, want ErrRemoved", b.err)
	}
}

// A joining member may ask a member that has not applied its admission yet. That does not mean that it was removed.
func TestJoinByWayOfOneThatLags(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	leader := c.leader(nodes...)
	lags := without(nodes, leader)[0]
	d := c.node("d")
	c.awaitFor("admission", time.Minute, func() error {
		// The admission must be committed before the isolated member counts as unhealthy.
		c.lan.isolate(lags.name, true)
		a, err := leader.Admit(t.Context(), "d", []netip.AddrPort{d.port.at})
		if err != nil { // on a busy machine; etcd wants connections that have been good for a while
			c.lan.isolate(lags.name, false)
			time.Sleep(etcdserver.HealthInterval + time.Second)
		}
		d.cfg.Join = &a
		return err
	})
	c.lan.isolate("d", true)
	c.lan.plug(true, "d", lags.name)
	d.launch()
	select {
	case <-d.done:
		t.Fatalf("d: Run: %v", d.err)
	case <-time.After(2 * joinRetryInterval):
	}
	c.lan.isolate(lags.name, false)
	c.lan.isolate("d", false)
	d.awaitReady()
	c.awaitVoters(leader, "a", "b", "c", "d")
}

// A joining member may be killed at any moment of its first start, while the list of members changes.
func TestJoinIsResumed(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a").start()
	fill(t, newClient(t, a.Store), "/a/", 500, strings.Repeat("x", 1000))
	b := c.admit(a, "b")
	c.admit(a, "orphan")
	for round := range 8 {
		b.launch()
		select {
		case <-b.ready:
		case <-time.After(time.Duration(20*round+randomMillis(20)) * time.Millisecond):
		}
		b.kill()
	}
	// From here on the directory holds the data of the admission.
	b.cfg.Join = nil
	b.start()
	c.awaitVoters(a, "a", "b")
	put(t, b, "/a", "1")
}

// A new member, or one that was away for long, gets a copy of the database if the log does not reach back far enough.
func TestCatchUpBySnapshot(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a")
	a.cfg.Alone.SnapshotCount, a.cfg.Alone.SnapshotCatchUp = 100, 10
	a.start()
	fill(t, newClient(t, a.Store), "/a/", 500, strings.Repeat("x", 1000))
	b, d := c.join(a, "b"), c.join(a, "d")
	c.awaitVoters(a, "a", "b", "d")
	count := func(n *testNode) int64 {
		got, err := newClient(t, n.Store).Count(t.Context(), "/a/", kubernetes.CountOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return got
	}
	if got := count(b); got != 500 {
		t.Errorf("b has %d of 500 keys", got)
	}
	c.lan.isolate("d", true)
	c.await("d is cut off", func() error {
		if d.Check(t.Context()) == nil {
			return errors.New("Check succeeds")
		}
		return nil
	})
	fill(t, newClient(t, a.Store), "/a/b", 500, "y")
	c.lan.isolate("d", false)
	c.await("d is back", func() error { return d.Check(t.Context()) })
	if got := count(d); got != 1000 {
		t.Errorf("d has %d of 1000 keys", got)
	}
	watch := watchOn(t, d)
	put(t, a, "/w/1", "1")
	if resp := <-watch; resp.Err() != nil || len(resp.Events) != 1 {
		t.Errorf("a new watch got %+v", resp)
	}
}

// Peers that are no members, from other members' messages, are dropped from the address book.
func TestUnknownPeersAreDropped(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	unknown := Peer{ID: "1234", Name: "unknown", URL: peers.NewLoopbackURL(), Addresses: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.66:1")}, Seq: 1}
	nodes[1].mesh.Learn([]Peer{unknown})
	if _, known := nodes[1].book.Other(unknown.ID); known {
		t.Error("a member with a leader accepted an unknown peer")
	}
	if _, err := nodes[1].book.Merge([]Peer{unknown}); err != nil { // as while there is no leader
		t.Fatal(err)
	}
	c.await("the unknown peer is dropped", func() error {
		for _, n := range nodes {
			if _, known := n.book.Other(unknown.ID); known {
				return fmt.Errorf("it is in the address book of %s", n.name)
			}
		}
		return nil
	})
}

// Stores that were created without a loopback address and a peer port can grow.
func TestStoreOfBeforeGrows(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a := c.node("a")
	peer := a.cfg.Peer
	a.cfg.Peer = PeerConfig{}
	a.start()
	put(t, a, "/a", "1")
	if _, err := a.Admit(t.Context(), "b", []netip.AddrPort{netip.AddrPortFrom(peer.Addresses[0], peer.Port)}); !errors.Is(err, ErrNoPeers) {
		t.Errorf("admission without a port: %v, want ErrNoPeers", err)
	}
	a.stop()
	if err := os.Remove(filepath.Join(a.cfg.Dir, peers.BookFile)); err != nil {
		t.Fatal(err)
	}
	a.cfg.Peer = peer
	a.start()
	b := c.join(a, "b")
	c.awaitVoters(a, "a", "b")
	if got := get(t, b, "/a"); got != "1" {
		t.Errorf("b has %q", got)
	}
}

// The address book may be lost, because the store holds a copy.
func TestAddressBookIsLost(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	put(t, nodes[0], "/a", "1")
	for _, n := range nodes {
		c.await("the addresses are in the store", func() error {
			peers, err := publishedPeers(n.transport.Load().server)
			if err != nil || len(peers) != 3 {
				return errors.Join(err, errors.New("not all"))
			}
			return nil
		})
		n.stop()
		n.cfg.Join = nil
	}
	// All address books are lost at once: one damaged, the others missing.
	for i, n := range nodes {
		file := filepath.Join(n.cfg.Dir, peers.BookFile)
		damage := os.Remove(file)
		if i == 0 {
			damage = os.WriteFile(file, []byte("{"), 0o600)
		}
		if damage != nil {
			t.Fatal(damage)
		}
		n.launch()
	}
	for _, n := range nodes {
		n.awaitReady()
		if got := get(t, n, "/a"); got != "1" {
			t.Errorf("%s has %q", n.name, got)
		}
	}
}

// watchOn opens a watch like the API server's.
func watchOn(t *testing.T, n *testNode) clientv3.WatchChan {
	t.Helper()
	w := newClient(t, n.Store).Watch(clientv3.WithRequireLeader(t.Context()), "/w", clientv3.WithPrefix(), clientv3.WithCreatedNotify())
	<-w
	return w
}
