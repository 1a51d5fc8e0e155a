package datastore

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"
)

// withWitness makes a cluster of two servers and a witness.
func (c *testCluster) withWitness() (a, b, w *testNode) {
	c.tb.Helper()
	servers := c.grow("a", "b")
	w = c.node("w")
	w.cfg.Witness = true
	c.await("admission", func() error {
		admitted, err := servers[0].AdmitWitness(c.tb.Context(), "w", []netip.AddrPort{w.port.at})
		w.cfg.Join = &admitted
		return err
	})
	w.start()
	for _, n := range append(servers, w) {
		c.awaitVoters(n, "a", "b", "w")
	}
	return servers[0], servers[1], w
}

// TestWitness: of two servers and a witness the other server leads when one is gone, with the witness's vote, and every
// member knows which of them is a witness.
func TestWitness(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a, b, w := c.withWitness()
	for _, n := range []*testNode{a, b, w} {
		c.await("every member knows the witness", func() error {
			members, err := n.Members(t.Context())
			if err != nil {
				return err
			}
			var witnesses []string
			for _, m := range members {
				if m.Witness {
					witnesses = append(witnesses, m.Name)
				}
			}
			if !slices.Equal(witnesses, []string{"w"}) {
				return fmt.Errorf("%s says that the witnesses are %v", n.name, witnesses)
			}
			return nil
		})
	}
	for range 2 {
		leader := c.leader(a, b)
		other := without([]*testNode{a, b}, leader)[0]
		put(t, leader, "/x", leader.name)
		leader.kill()
		if now := c.leader(other); get(t, now, "/x") != leader.name {
			t.Errorf("%s lacks the last write of %s", now.name, leader.name)
		}
		leader.cfg.Join = nil
		leader.start()
	}
}

// TestWitnessHasTheLastWrite: a write that only the witness shares with a server that dies is not lost. The witness is the
// only member that can be elected then; it leads until the other server has the write.
func TestWitnessHasTheLastWrite(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a, b, w := c.withWitness()
	leader := c.leader(a, b)
	other := without([]*testNode{a, b}, leader)[0]
	c.lan.isolate(other.name, true)
	put(t, leader, "/x", "acknowledged")
	leader.kill()
	c.lan.isolate(leader.name, true)
	c.lan.isolate(other.name, false)
	if got := get(t, c.leader(other), "/x"); got != "acknowledged" {
		t.Errorf("the write is %q", got)
	}
	c.await("the witness follows", func() error {
		if now, _ := w.Leadership(); now.Leading || now.Leader != other.name {
			return fmt.Errorf("%+v", now)
		}
		return nil
	})
}

// TestWitnessYields: a witness that raft has made the leader hands the leadership over to a server.
func TestWitnessYields(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a, b, w := c.withWitness()
	// Whatever raft elects, a server leads in the end.
	for range 3 {
		leader := c.leader(a, b)
		before := leader.transport.Load().server
		term := before.Term()
		// The witness yields so soon that MoveLeader may not see it lead, and waits until its end.
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		err := before.MoveLeader(ctx, uint64(before.MemberID()), uint64(w.transport.Load().server.MemberID()))
		cancel()
		c.leader(a, b)
		if now := w.transport.Load().server.Term(); now < term+2 {
			t.Errorf("the term went from %d to %d, so the witness has not led: %v", term, now, err)
		}
		c.awaitFor("the witness has yielded", 10*time.Second, func() error {
			if now, _ := w.Leadership(); now.Leader == "w" {
				return errors.New("it leads")
			}
			return nil
		})
	}
}

// TestLastServerBesideWitness: a server whose removal leaves witnesses only stays.
func TestLastServerBesideWitness(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	a, b, _ := c.withWitness()
	if err := a.Remove(t.Context(), "b"); err != nil {
		t.Fatal(err)
	}
	b.stop()
	if err := a.Remove(t.Context(), "a"); !errors.Is(err, ErrQuorum) {
		t.Errorf("the removal of the last server: %v", err)
	}
	if err := a.Remove(t.Context(), "w"); err != nil {
		t.Errorf("the removal of the witness: %v", err)
	}
}
