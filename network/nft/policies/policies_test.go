package policies

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	testhost "kedge/internal/test/host"
	"kedge/network/nft"
)

func newTable(t testing.TB, node string) *Table {
	t.Helper()
	testhost.RequireIsolation(t)
	t.Cleanup(func() {
		if err := nft.RemoveTables(node); err != nil {
			t.Error(err)
		}
	})
	return NewTable(node)
}

func (t *Table) mustBe(tb testing.TB, want bool) {
	tb.Helper()
	if got, err := t.intact(); err != nil || got != want {
		tb.Fatalf("intact: %v, %v, want %v", got, err, want)
	}
}

func (t *Table) generation(tb testing.TB) uint64 {
	tb.Helper()
	g, err := t.KernelGeneration()
	if err != nil {
		tb.Fatal(err)
	}
	return g
}

func testAddr(v6 bool, i int) netip.Addr {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd42::%x", i+1))
	}
	return netip.AddrFrom4([4]byte{10, 42, byte(i >> 8), byte(i)})
}

// randomPolicy makes random valid changes to a table.
type randomPolicy struct {
	*rand.Rand
	table *Table
	n     int
}

func (r *randomPolicy) element(s Set) Element {
	i := r.IntN(12)
	switch s.Kind {
	case Addresses:
		return AddrElement(testAddr(s.V6, i))
	case Blocks: // the last one without an end
		i += 4
		first := netip.AddrFrom4([4]byte{byte(i * 16)})
		last := netip.AddrFrom4([4]byte{byte(i*16 + 14), 255, 255, 255})
		if i == 15 {
			last = netip.MustParseAddr("255.255.255.255")
		}
		if s.V6 {
			a, b := [16]byte{byte(i * 16)}, [16]byte(slices.Repeat([]byte{255}, 16))
			if i < 15 {
				b[0] = byte(i*16 + 14)
			}
			first, last = netip.AddrFrom16(a), netip.AddrFrom16(b)
		}
		return BlockElement(first, last)
	case Ports:
		if s.Ranges {
			return PortElement(unix.IPPROTO_TCP, uint16(i*100), uint16(i*100+r.IntN(1)*50+49))
		}
		return PortElement(unix.IPPROTO_UDP, uint16(i), uint16(i))
	case AddressPorts:
		return AddrPortElement(testAddr(s.V6, i), unix.IPPROTO_SCTP, uint16(r.IntN(3)))
	}
	return SameAddrElement(testAddr(s.V6, i))
}

func (r *randomPolicy) step() {
	t := r.table
	sets, chains := slices.Sorted(maps.Keys(t.sets)), slices.Sorted(maps.Keys(t.chains))
	subjects := map[string]bool{}
	for _, c := range t.subjects {
		subjects[c] = true
	}
	switch r.IntN(8) {
	case 0, 1:
		r.n++
		kind := SetKind(r.IntN(5))
		s := Set{Kind: kind, V6: r.IntN(2) == 0, Ranges: kind == Ports && r.IntN(2) == 0, Comment: "a set"}
		name := fmt.Sprint("set-", r.n)
		t.AddSet(name, s)
		for range r.IntN(5) {
			t.Insert(name, r.element(s))
		}
	case 2, 3:
		if len(sets) > 0 {
			name := sets[r.IntN(len(sets))]
			e := r.element(t.sets[name].Set)
			t.Delete(name, e)
			if r.IntN(3) > 0 {
				t.Insert(name, e)
			}
		}
	case 4:
		r.n++
		name := fmt.Sprint("chain-", r.n)
		if len(chains) > 0 && r.IntN(2) == 0 {
			name = chains[r.IntN(len(chains))]
		}
		c := Chain{Direction: Direction(r.IntN(2)), V6: r.IntN(2) == 0}
		if old, ok := t.chains[name]; ok {
			c = old
		}
		c.Rules = nil
		for _, set := range sets {
			s := t.sets[set]
			rule := Rule{Comment: fmt.Sprint("rule about ", set), Then: Verdict(r.IntN(3))}
			switch {
			case r.IntN(3) > 0:
				continue
			case s.Kind == Ports:
				rule.Ports = set
			case s.V6 != c.V6:
				continue
			case s.Kind == AddressPorts:
				rule.PeerPorts = set
			case s.Kind == SameAddresses:
				rule.Itself = set
			default:
				rule.Peers = set
			}
			c.Rules = append(c.Rules, rule)
		}
		for _, other := range chains { // only to older ones: no loops
			if other < name && t.chains[other].V6 == c.V6 && t.chains[other].Direction == c.Direction && r.IntN(4) == 0 && len(t.chains[other].Rules) < 3 {
				c.Rules = append(c.Rules, Rule{Comment: "go to " + other, Then: Call, Chain: other})
			}
		}
		t.SetChain(name, c)
	case 5, 6:
		d, v6 := Direction(r.IntN(2)), r.IntN(2) == 0
		chain := []string{"", DenyAll}[r.IntN(2)]
		for _, c := range chains {
			if t.chains[c].Direction == d && t.chains[c].V6 == v6 && r.IntN(2) == 0 {
				chain = c
			}
		}
		t.Apply(d, testAddr(v6, r.IntN(8)), chain)
	case 7: // remove what nothing refers to
		used := map[string]bool{}
		for _, c := range t.chains {
			for _, rule := range c.Rules {
				for _, name := range []string{rule.Peers, rule.Ports, rule.PeerPorts, rule.Itself, rule.Chain} {
					used[name] = true
				}
			}
		}
		for _, c := range chains {
			if !used[c] && !subjects[c] && r.IntN(2) == 0 {
				t.RemoveChain(c)
			}
		}
		for _, s := range sets {
			if !used[s] && r.IntN(2) == 0 {
				t.RemoveSet(s)
			}
		}
	}
}

// After any sequence of changes the kernel has the same content as after a rewrite, and it
// got there by changes alone.
func TestTableChangesOnlyWhatDiffers(t *testing.T) {
	for seed := range uint64(5) {
		table := newTable(t, "node1")
		r := &randomPolicy{Rand: rand.New(rand.NewPCG(seed, 1)), table: table}
		table.Apply(Egress, testAddr(false, 100), DenyAll) // so that there is always a table
		var written uint64
		for i := range 150 {
			for range 1 + r.IntN(4) {
				r.step()
			}
			if err := table.Commit(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, i, err)
			}
			table.mustBe(t, true)
			switch g := table.generation(t); {
			case i == 0:
				written = g
			case g != written:
				t.Fatalf("seed %d step %d: the table was rewritten", seed, i)
			}
		}
		again := *table
		again.known = false
		again.resetChanges()
		if err := again.Commit(); err != nil {
			t.Fatal(err)
		}
		if table.generation(t) != written {
			t.Error("another process with the same policies rewrote the table")
		}
	}
}

func TestTableComesAndGoes(t *testing.T) {
	table := newTable(t, "node1")
	there := func(want bool) {
		t.Helper()
		if err := table.Commit(); err != nil {
			t.Fatal(err)
		}
		if got := table.generation(t) != 0; got != want {
			t.Fatalf("the table exists: %v, want %v", got, want)
		}
		table.mustBe(t, true)
		if repaired, err := table.Repair(); repaired || err != nil {
			t.Errorf("repaired: %v, %v", repaired, err)
		}
	}
	there(false)
	table.AddSet("s", Set{Kind: Addresses})
	there(false)
	table.Apply(Ingress, testAddr(true, 1), DenyAll)
	there(true)
	table.Apply(Ingress, testAddr(true, 1), "")
	there(false)
}

func TestTableIsRepaired(t *testing.T) {
	table := newTable(t, "node1")
	table.AddSet("peers", Set{Kind: Blocks})
	table.Insert("peers", BlockElement(netip.MustParseAddr("10.0.0.0"), netip.MustParseAddr("10.0.0.255")))
	table.SetChain("c", Chain{Direction: Ingress, Rules: []Rule{{Comment: "one", Peers: "peers", Then: Allow}, {Comment: "two", Then: Deny}}})
	table.Apply(Ingress, testAddr(false, 1), "c")
	if repaired, err := table.Repair(); repaired || err != nil {
		t.Fatalf("repair before anything was written: %v, %v", repaired, err)
	}
	if err := table.Commit(); err != nil {
		t.Fatal(err)
	}
	table.mustBe(t, true)
	ref := &nftables.Table{Name: table.Name(), Family: nftables.TableFamilyINet}
	for what, damage := range map[string]func(*nftables.Conn){
		"table removed": func(c *nftables.Conn) { c.DelTable(ref) },
		"rules flushed": func(c *nftables.Conn) { c.FlushTable(ref) },
		"chain emptied": func(c *nftables.Conn) { c.FlushChain(&nftables.Chain{Name: "c", Table: ref}) },
		"set emptied":   func(c *nftables.Conn) { c.FlushSet(&nftables.Set{Name: "peers", Table: ref, Interval: true}) },
		"pod freed":     func(c *nftables.Conn) { c.FlushSet(&nftables.Set{Name: "ingress-4", Table: ref, IsMap: true}) },
		"chain added":   func(c *nftables.Conn) { c.AddChain(&nftables.Chain{Name: "stranger", Table: ref}) },
	} {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		damage(conn)
		if err := conn.Flush(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		table.mustBe(t, false)
		if repaired, err := table.Repair(); !repaired || err != nil {
			t.Fatalf("%s: repair: %v, %v", what, repaired, err)
		}
		table.mustBe(t, true)
	}
	// A change notices by itself that the table is gone.
	if err := nft.RemoveTables("node1"); err != nil {
		t.Fatal(err)
	}
	table.Apply(Egress, testAddr(false, 1), DenyAll)
	if err := table.Commit(); err != nil || table.Damaged() == nil {
		t.Fatalf("commit: %v, damage: %v", err, table.Damaged())
	}
	table.mustBe(t, true)
	table.Apply(Egress, testAddr(false, 1), "")
	if err := table.Commit(); err != nil || table.Damaged() != nil {
		t.Fatalf("commit: %v, damage: %v", err, table.Damaged())
	}
}

func TestHoldLeavesOtherPodsAlone(t *testing.T) {
	before := newTable(t, "node1")
	before.SetChain("c", Chain{Direction: Egress, Rules: []Rule{{Comment: "one", Then: Deny}}})
	before.Apply(Egress, testAddr(false, 1), "c")
	before.Apply(Egress, testAddr(false, 2), "c")
	held := []netip.Addr{testAddr(false, 2), testAddr(false, 3), testAddr(true, 3)}

	after := NewTable("node1") // of the process that starts next
	if err := after.Isolate(held[1:]); err != nil {
		t.Fatal("without a table:", err)
	}
	if err := before.Commit(); err != nil {
		t.Fatal(err)
	}
	written := before.generation(t)
	for range 2 {
		if err := after.Isolate(held); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range held {
		before.Apply(Egress, a, DenyAll)
		before.Apply(Ingress, a, DenyAll)
	}
	before.mustBe(t, true)
	if before.generation(t) != written {
		t.Error("holding a pod rewrote the table")
	}
}

// A policy in a large cluster must fit into one transaction.
func TestLargePolicyTable(t *testing.T) {
	table := newTable(t, "node1")
	for i := range 1000 {
		peers, chain := fmt.Sprint("peers-", i), fmt.Sprint("chain-", i)
		table.AddSet(peers, Set{Kind: Addresses})
		for j := range 50 {
			table.Insert(peers, AddrElement(testAddr(false, i*50+j)))
		}
		table.SetChain(chain, Chain{Direction: Ingress, Rules: []Rule{{Comment: "allow", Peers: peers, Then: Allow}, {Comment: "refuse", Then: Deny}}})
		table.Apply(Ingress, testAddr(false, i), chain)
	}
	if err := table.Commit(); err != nil {
		t.Fatal(err)
	}
	table.mustBe(t, true)
}
