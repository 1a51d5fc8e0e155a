package datastore

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// A member that is cut off reports it within five seconds, whether it led or followed. The others go on. All answers to
// clients fit one store.
func TestPartition(t *testing.T) {
	t.Parallel()
	const told = 5 * time.Second
	for _, led := range []bool{true, false} {
		t.Run(fmt.Sprintf("led=%v", led), func(t *testing.T) {
			if !led {
				requireLong(t)
			}
			c := newTestCluster(t)
			nodes := c.grow("a", "b", "c")
			var p pool
			p.add(nodes...)
			watches := observe(t, "/h/", p.pick)
			h := record(p.pick, 6, 3)

			cut := c.leader(nodes...)
			rest := without(nodes, cut)
			if !led {
				cut = without(nodes, cut)[0]
				rest = without(nodes, cut)
			}
			watch := watchOn(t, cut)
			deadline := time.Now().Add(told)
			c.lan.isolate(cut.name, true)

			c.awaitFor("Check of the member that is cut off", time.Until(deadline), func() error {
				if cut.Check(t.Context()) == nil {
					return errors.New("Check succeeds")
				}
				return nil
			})
			if led {
				c.awaitFor("the old leader's resignation", time.Until(deadline), func() error {
					if now, _ := cut.Leadership(); now.Leading {
						return fmt.Errorf("leadership is %+v", now)
					}
					return nil
				})
			}
			// A new call does not wait for long.
			asked := time.Now()
			if _, err := newClient(t, cut.Store).Put(t.Context(), "/w/cut", "1"); err == nil {
				t.Error("a member that is cut off has written")
			} else if took := time.Since(asked); took > told {
				t.Errorf("the call took %v to fail with %v", took, err)
			}
			select {
			case resp, ok := <-watch:
				if !ok || !errors.Is(resp.Err(), rpctypes.ErrNoLeader) {
					t.Errorf("the watch got %v, %v, want %v", resp, ok, rpctypes.ErrNoLeader)
				}
			case <-time.After(time.Until(deadline)):
				t.Error("the watch is still open")
			}
			leader := c.leader(rest...)
			put(t, leader, "/w/rest", "1")
			members, err := cut.Members(t.Context())
			if !errors.Is(err, ErrNoLeader) || len(members) != 3 {
				t.Errorf("the member that is cut off sees %+v, %v", members, err)
			}

			c.lan.isolate(cut.name, false)
			c.await("the member is back", func() error { return cut.Check(t.Context()) })
			if got := get(t, cut, "/w/rest"); got != "1" {
				t.Errorf("/w/rest is %q", got)
			}
			watch = watchOn(t, cut)
			put(t, leader, "/w/rest", "2")
			if resp := <-watch; resp.Err() != nil || len(resp.Events) != 1 {
				t.Errorf("a new watch got %+v", resp)
			}
			h.End(t)
			watches.end(t, cut)
		})
	}
}

// A link that flaps must not cost the cluster its leader.
func TestFlappingFollower(t *testing.T) {
	requireLong(t)
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	leader := c.leader(nodes...)
	before, _ := leader.Leadership()
	flaps := without(nodes, leader)[0]
	for range 10 {
		c.lan.isolate(flaps.name, true)
		time.Sleep(200 * time.Millisecond)
		c.lan.isolate(flaps.name, false)
		time.Sleep(200 * time.Millisecond)
		put(t, leader, "/a", "1")
	}
	if after, _ := leader.Leadership(); after != before {
		t.Errorf("leadership went from %+v to %+v", before, after)
	}
	c.await("its Check succeeds", func() error { return flaps.Check(t.Context()) })
}

// An orderly stop of any member costs a client that retries once nothing.
func TestRollingRestart(t *testing.T) {
	requireLong(t)
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	var p pool
	p.add(nodes...)
	watches := observe(t, "/r", p.pick)
	stop := make(chan struct{})
	errs := make(chan error, 1)
	writes := 0
	go func() {
		var failed error
		for n := 0; failed == nil; n++ {
			select {
			case <-stop:
				errs <- nil
				return
			default:
			}
			for attempt := range nodes {
				failed = writeTo(t, nodes[(n+attempt)%len(nodes)], n)
				if failed == nil || attempt == 1 {
					break
				}
			}
			writes++
		}
		errs <- failed
	}()
	for _, n := range nodes {
		led, _ := n.Leadership()
		began := time.Now()
		n.stop()
		if led.Leading {
			t.Logf("the leader stopped in %v", time.Since(began).Round(time.Millisecond))
		}
		n.cfg.Join = nil
		n.start()
		c.await("all Checks succeed", func() error {
			var errs []error
			for _, n := range nodes {
				errs = append(errs, n.Check(t.Context()))
			}
			return errors.Join(errs...)
		})
	}
	close(stop)
	if err := <-errs; err != nil {
		t.Errorf("a write failed twice: %v", err)
	}
	watches.end(t, nodes[0])
	t.Logf("%d writes", writes)
}

func writeTo(t *testing.T, n *testNode, value int) error {
	c, err := n.current.Load().NewClient()
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.Put(t.Context(), "/r", fmt.Sprint(value))
	return err
}

func TestHandOver(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	old := c.leader(nodes...)
	_, changed := old.Leadership()
	if err := old.HandOver(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	case <-time.After(10 * time.Second):
		t.Error("no change of leadership was reported")
	}
	c.await("the old leader does not lead any more", func() error {
		if now, _ := old.Leadership(); now.Leading {
			return errors.New("it leads")
		}
		return nil
	})
	leader := c.leader(without(nodes, old)...)
	for _, n := range nodes {
		c.await("all members know the leader", func() error {
			if now, _ := n.Leadership(); now.Leader != leader.name {
				return fmt.Errorf("%s says %+v", n.name, now)
			}
			return nil
		})
	}
	if err := old.HandOver(t.Context()); err != nil {
		t.Errorf("HandOver of a member that does not lead: %v", err)
	}
}

// A term must never have two leaders.
func TestLeadershipIsConfirmed(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	terms := map[uint64]string{}
	note := func() {
		for _, n := range nodes {
			if now, _ := n.Leadership(); now.Leading {
				if other := terms[now.Term]; other != "" && other != n.name {
					t.Errorf("%s and %s led in term %d", other, n.name, now.Term)
				}
				terms[now.Term] = n.name
			}
		}
	}
	for range 4 {
		leader := c.leader(nodes...)
		note()
		if err := leader.HandOver(t.Context()); err != nil {
			t.Fatal(err)
		}
		c.leader(without(nodes, leader)...)
		note()
	}
	if len(terms) < 4 {
		t.Errorf("terms %v", terms)
	}
}

// move changes the address of the machine. The old address is not reachable any more.
func (n *testNode) move(a netip.Addr) {
	n.c.lan.mu.Lock()
	n.port.at = netip.AddrPortFrom(a, n.cfg.Peer.Port)
	for conn := range n.c.lan.streams {
		if conn.ends[0] == n.name || conn.ends[1] == n.name {
			conn.freeze()
		}
	}
	n.c.lan.mu.Unlock()
	n.cfg.Peer.Addresses = []netip.Addr{a}
	n.SetAddresses(n.cfg.Peer.Addresses)
}

func TestMemberMoves(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	for i, n := range nodes { // the leader, too
		to := netip.AddrFrom4([4]byte{198, 51, 100, byte(1 + i)})
		began := time.Now()
		n.move(to)
		c.await("it has moved", func() error {
			if err := n.Check(t.Context()); err != nil {
				return err
			}
			for _, other := range without(nodes, n) {
				members, err := other.Members(t.Context())
				if err != nil {
					return err
				}
				for _, m := range members {
					if m.Name == n.name && (!m.Reachable || m.Addresses[0].Addr() != to) {
						return fmt.Errorf("%s sees %+v", other.name, m)
					}
				}
			}
			return nil
		})
		t.Logf("%s was reachable again after %v", n.name, time.Since(began).Round(time.Millisecond))
	}
	put(t, nodes[0], "/a", "1")

	// Two members move while they are stopped. The third has not moved, so both reach it and tell it their new addresses.
	for i, n := range nodes[:2] {
		n.stop()
		n.cfg.Join = nil
		n.move(netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)}))
	}
	for _, n := range nodes[:2] {
		n.launch()
	}
	for _, n := range nodes[:2] {
		n.awaitReady()
		if got := get(t, n, "/a"); got != "1" {
			t.Errorf("%s has %q", n.name, got)
		}
	}
}

// Two machines swap their addresses. Each is found at the old address of the other, and neither is mistaken for the other.
func TestMembersSwapAddresses(t *testing.T) {
	requireLong(t)
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	a, b := nodes[0], nodes[1]
	for _, n := range []*testNode{a, b} {
		n.stop()
		n.cfg.Join = nil
	}
	a.port.at, b.port.at = b.port.at, a.port.at
	a.cfg.Peer.Port, b.cfg.Peer.Port = b.cfg.Peer.Port, a.cfg.Peer.Port
	a.launch()
	b.launch()
	for _, n := range []*testNode{a, b} {
		n.awaitReady()
	}
	put(t, b, "/a", "1")
	for _, n := range nodes {
		c.await("its Check succeeds", func() error { return n.Check(t.Context()) })
	}
	for _, n := range []*testNode{a, b} {
		c.await("its location is known", func() error {
			if at := nodes[2].mesh.Location(n.book.Self().ID); at != n.port.at {
				return fmt.Errorf("location of %s is %v, want %v", n.name, at, n.port.at)
			}
			return nil
		})
	}
}

// Only one member at a time holds the defrag lock, and it does not lead meanwhile.
func TestDefragLock(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	leader := c.leader(nodes...)
	others := without(nodes, leader)
	withLock := func(n *testNode, do func() error) error {
		return n.withDefragLock(t.Context(), n.transport.Load().server, do)
	}
	err := withLock(leader, func() error {
		if now, _ := leader.Leadership(); leader.transport.Load().server.Leader() == leader.transport.Load().server.MemberID() {
			t.Errorf("the leader holds the lock while it leads: %+v", now)
		}
		for _, n := range others {
			if err := withLock(n, func() error { t.Error("two members hold the lock"); return nil }); !errors.Is(err, errNotNow) {
				t.Errorf("%s takes the lock while another member holds it: %v", n.name, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	done := false
	if err := withLock(leader, func() error { done = true; return nil }); err != nil || !done {
		t.Errorf("the lock after its release: %v", err)
	}
	others[0].kill()
	c.await("no member takes the lock while another is unreachable", func() error {
		if err := withLock(others[1], func() error { return nil }); !errors.Is(err, errNotNow) {
			return fmt.Errorf("%w, want not now", err)
		}
		return nil
	})
}
