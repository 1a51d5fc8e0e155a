package datastore

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// recoverStore makes the store of a new cluster from that in dir, as "kedge recover" does.
func recoverStore(t *testing.T, dir, to, name string) Snapshot {
	t.Helper()
	saved, err := RecoverSnapshot(t.Context(), dir, filepath.Join(t.TempDir(), "work"), name, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	made, err := RestoreSnapshot(saved.Path, to, name, saved.Revision, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	return made
}

// TestRecoverKeepsTheLog: two of three members are lost at a moment at which the survivor has writes that were acknowledged in
// its log only, and does not know yet that the last is committed.
func TestRecoverKeepsTheLog(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	leader := c.leader(nodes...)
	others := without(nodes, leader)
	survivor, first := others[0], others[1]
	survivor.stop()
	survivor.cfg.Join = nil
	survivor.cfg.Several.BatchInterval = time.Hour // its database lags
	survivor.start()
	c.awaitVoters(survivor, "a", "b", "c")
	leader = c.leader(leader, first)
	first = without(without(nodes, survivor), leader)[0]
	first.kill()

	// A majority is the leader and the survivor: whatever is acknowledged is in the survivor's log.
	client := newClient(t, leader.Store)
	last := int64(0)
	for _, value := range []string{"1", "2", "3"} {
		resp, err := client.Put(t.Context(), "/a", value)
		if err != nil {
			t.Fatal(err)
		}
		last = resp.Header.Revision
	}
	image := filepath.Join(t.TempDir(), "store") // as a power cut leaves it
	if err := os.CopyFS(image, os.DirFS(survivor.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	leader.kill()
	survivor.kill()

	state, err := ReadState(image, nil)
	if err != nil {
		t.Fatal(err)
	}
	if state.Committed >= state.LastIndex || state.Revision >= last {
		t.Fatalf("the survivor's database has revision %d of %d, and entries up to %d of %d are known to be committed: the test tests nothing", state.Revision, last, state.Committed, state.LastIndex)
	}
	if len(state.Members) != 3 || state.Term == 0 || state.LastTerm == 0 || state.Changed.IsZero() || state.Cluster == "" {
		t.Errorf("state %+v", state)
	}
	before := digest(t, image)

	survivor.cfg.Dir = filepath.Join(t.TempDir(), "recovered")
	made := recoverStore(t, image, survivor.cfg.Dir, survivor.name)
	if made.Revision <= last {
		t.Errorf("the recovered store begins after revision %d, and %d was handed out", made.Revision, last)
	}
	if now, err := ReadState(survivor.cfg.Dir, nil); err != nil || now.Cluster == state.Cluster || len(now.Members) != 1 {
		t.Errorf("the cluster was %s with %d members, and the recovered store is %+v, %v", state.Cluster, len(state.Members), now, err)
	}
	survivor.start()
	rc := newClient(t, survivor.Store)
	got, err := rc.Client.Get(t.Context(), "/a")
	if err != nil || len(got.Kvs) != 1 || string(got.Kvs[0].Value) != "3" || got.Kvs[0].ModRevision != last {
		t.Errorf("/a is %+v, %v; want 3 of revision %d", got, err, last)
	}
	if resp := <-rc.Watch(t.Context(), "/a", clientv3.WithRev(last)); !errors.Is(resp.Err(), rpctypes.ErrCompacted) {
		t.Errorf("a watch of before goes on: %+v, %v", resp, resp.Err())
	}
	if members, err := survivor.Members(t.Context()); err != nil || len(members) != 1 || !members[0].Leader {
		t.Errorf("members %+v, %v", members, err)
	}
	if after := digest(t, image); after != before {
		t.Error("the files of the survivor have changed")
	}
}

// digest is a text that changes with every file of the folder.
func digest(t *testing.T, dir string) (all string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		data, err := os.ReadFile(path)
		all += fmt.Sprintf("%s %x\n", path, sha256.Sum256(data))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestOldMembersDoNotDisturbARecoveredStore: a lost member that comes back with its old data neither takes part nor stops the
// recovered store, also once that has other members. Set aside, it joins.
func TestOldMembersDoNotDisturbARecoveredStore(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	last := put(t, nodes[0], "/a", "1")
	for _, n := range nodes {
		c.await("the write on all", func() error {
			if get(t, n, "/a") != "1" {
				return errors.New("missing")
			}
			return nil
		})
	}
	nodes[1].kill()
	nodes[2].kill()
	survivor, old := nodes[0], nodes[1]
	survivor.stop()
	dir := filepath.Join(t.TempDir(), "recovered")
	recoverStore(t, survivor.cfg.Dir, dir, survivor.name)
	survivor.cfg.Dir, survivor.cfg.Join = dir, nil
	survivor.start()

	waits := func() {
		t.Helper()
		select {
		case <-old.ready:
			t.Fatal("the old member serves")
		case <-old.done:
			t.Fatalf("the old member has ended: %v", old.err)
		default:
		}
	}
	old.cfg.Join = nil
	old.launch()
	joined := c.join(survivor, "d")
	c.awaitVoters(survivor, "a", "d")
	if revision := put(t, joined, "/a", "2"); revision <= last {
		t.Errorf("revision %d after %d", revision, last)
	}
	c.await("the old member reaches the recovered one", func() error {
		_, _, err := old.mesh.Get(t.Context(), survivor.port.at, "/members")
		return err
	})
	time.Sleep(2 * time.Second) // some heartbeats, and elections in vain
	waits()
	if got := get(t, survivor, "/a"); got != "2" {
		t.Errorf("/a is %q", got)
	}
	old.stop()

	kept, err := SetAside(old.cfg.Dir, time.Now())
	if err != nil || kept == "" {
		t.Fatalf("set aside: %q, %v", kept, err)
	}
	c.await("admission", func() error {
		a, err := survivor.Admit(t.Context(), old.name, []netip.AddrPort{old.port.at})
		old.cfg.Join = &a
		return err
	})
	old.start()
	c.awaitVoters(survivor, "a", "b", "d")
	if got := get(t, old, "/a"); got != "2" {
		t.Errorf("the member that joined has %q", got)
	}
}

// TestReadStateRefuses: what cannot be recovered is refused, with the reason.
func TestReadStateRefuses(t *testing.T) {
	if _, err := ReadState(t.TempDir(), nil); err == nil {
		t.Error("an empty folder has a state")
	}
	cfg := testConfig(t.TempDir())
	s, stop := start(t, cfg)
	if _, err := newClient(t, s).Put(t.Context(), "/a", "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(cfg.Dir, nil); !errors.Is(err, ErrInUse) {
		t.Errorf("while the store runs: %v", err)
	}
	stop()
	written := map[string]string{}
	state, err := ReadState(cfg.Dir, func(key, value []byte) { written[string(key)] = string(value) })
	if err != nil || written["/a"] != "x" || len(state.Members) != 1 || state.Members[0].Name != cfg.MemberName || state.Committed != state.LastIndex {
		t.Errorf("%+v, %v", state, err)
	}
	if err := markRemoved(cfg.Dir); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(cfg.Dir, nil); !errors.Is(err, ErrRemoved) {
		t.Errorf("a removed member: %v", err)
	}
	if err := os.Remove(filepath.Join(cfg.Dir, removedFile)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cfg.Dir, memberDir, "snap", "db")
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadState(cfg.Dir, nil); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged store: %v", err)
	}
	if _, err := RecoverSnapshot(t.Context(), cfg.Dir, filepath.Join(t.TempDir(), "work"), cfg.MemberName, testLog(t)); !errors.Is(err, ErrDamaged) {
		t.Errorf("recovery from a damaged store: %v", err)
	}
}
