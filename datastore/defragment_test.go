package datastore

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// The space manager defragments one of three members after the other while clients write, and one is killed meanwhile. Nothing is
// lost, and in the end the files of all are small.
func TestDefragmentUnderLoad(t *testing.T) {
	requireLong(t)
	t.Parallel()
	rounds := 1
	if n, ok := number(t, tortureVar); ok {
		rounds = 1 + int(n)/100
	}
	l := &loaded{T: t, random: seedFor(t), ledger: newLedger()}
	l.all = machinesWith(t, func(c *Config) {
		c.Defrag = DefragConfig{Interval: 200 * time.Millisecond, MinSize: bulkBytes / 2, MaxFree: 0.3, QuietRate: 1e9, Patience: time.Second}
	}, "10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24")
	for round := range rounds {
		killed := l.all[l.random.IntN(len(l.all))]
		use := l.others(killed)
		_, end := l.load(use...)
		use[0].await("bulk", "ok")
		for _, m := range l.all {
			if size := sizeOf(t, m); size < bulkBytes/2 {
				t.Logf("%s was defragmented already: its file has %d bytes", m.cfg.MemberName, size)
			}
		}
		time.Sleep(time.Duration(l.random.IntN(1500)) * time.Millisecond)
		killed.kill()
		killed.cfg.Join = nil
		killed.start()
		killed.await("check", "ok")
		for _, m := range l.all {
			for deadline := time.Now().Add(time.Minute); sizeOf(t, m) > bulkBytes/2+bulkBytes/4; time.Sleep(100 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("the file of %s still has %d bytes", m.cfg.MemberName, sizeOf(t, m))
				}
			}
		}
		end()
		l.settle(fmt.Sprintf("round %d", round))
	}
}

func sizeOf(t *testing.T, m *machine) int {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		answer, err := m.ask("size")
		size, numberErr := strconv.Atoi(answer)
		if err == nil && numberErr == nil {
			return size
		}
		if time.Now().After(deadline) {
			t.Fatal(errors.Join(err, numberErr))
		}
	}
}

// The lock of a member that was killed during a defragmentation is released when that member starts again, and by no other.
func TestDefragLockOfKilledMember(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	via := nodes[0].transport.Load()
	lease, err := leaseClient{via}.LeaseGrant(t.Context(), &pb.LeaseGrantRequest{TTL: int64(defragLockTTL.Seconds())})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := (kvClient{via}).Put(t.Context(), &pb.PutRequest{Key: []byte(defragLockKey), Value: []byte("b"), Lease: lease.ID}); err != nil {
		t.Fatal(err)
	}
	take := func() error {
		return nodes[0].withDefragLock(t.Context(), nodes[0].transport.Load().server, func() error { return nil })
	}
	restart := func(n *testNode) {
		n.kill()
		n.cfg.Join = nil
		n.start()
		c.leader(nodes...)
	}
	restart(nodes[2])
	c.await("all answer", func() error {
		if err := take(); err == nil || !strings.Contains(err.Error(), "another member is defragmenting") {
			return fmt.Errorf("%w, want that b defragments", err)
		}
		return nil
	})
	restart(nodes[1])
	c.await("the lock of b is released", take)
}
