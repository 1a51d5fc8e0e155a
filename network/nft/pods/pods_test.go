package pods

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	testhost "kedge/internal/test/host"
	"kedge/network/nft"
)

func sampleRules() Rules {
	return Rules{
		LinkPrefix: "kdgtest",
		PodRanges:  []netip.Prefix{netip.MustParsePrefix("10.42.0.0/24"), netip.MustParsePrefix("fd42::/64")},
		Inside:     []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")},
	}
}

func samplePorts() []HostPort {
	return []HostPort{
		{Port: 80, Protocol: unix.IPPROTO_TCP, Pod: netip.MustParseAddrPort("10.42.0.5:8080")},
		{Port: 80, Protocol: unix.IPPROTO_TCP, Pod: netip.MustParseAddrPort("[fd42::5]:8080")},
		{Port: 53, Protocol: unix.IPPROTO_UDP, Pod: netip.MustParseAddrPort("10.42.0.5:53"), HostIP: netip.MustParseAddr("192.0.2.1")},
	}
}

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

func mustIntact(t *testing.T, table *Table, want bool) {
	t.Helper()
	got, err := nft.Intact(table.name, table.now)
	if err != nil || got != want {
		t.Fatalf("intact: %v, %v, want %v", got, err, want)
	}
}

func TestSetAndRepair(t *testing.T) {
	table := newTable(t, "node1")
	if repaired, err := table.Repair(); repaired || err != nil {
		t.Fatalf("repair before anything was written: %v, %v", repaired, err)
	}
	setPorts := func(ports []HostPort) {
		t.Helper()
		if err := table.SetHostPorts(ports); err != nil {
			t.Fatal(err)
		}
		if ports = slices.Clone(ports); !table.written {
			ports = nil
		}
		got, err := table.HostPorts()
		order := func(a, b HostPort) int { return strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) }
		slices.SortFunc(got, order)
		slices.SortFunc(ports, order)
		if err != nil || !slices.Equal(got, ports) {
			t.Fatalf("the kernel has the host ports %v, %v, want %v", got, err, ports)
		}
	}
	setPorts(samplePorts()) // kept for the first Set
	rules := sampleRules()
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, table, true)

	setPorts(samplePorts()[:1]) // refilled
	mustIntact(t, table, true)
	setPorts(nil)
	setPorts(samplePorts())
	mustIntact(t, table, true)
	rules.Nodes = []netip.Addr{netip.MustParseAddr("192.0.2.2")} // refilled, with the host ports
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	setPorts(samplePorts())
	mustIntact(t, table, true)

	ref := &nftables.Table{Name: table.Name(), Family: nftables.TableFamilyINet}
	for what, damage := range map[string]func(*nftables.Conn){
		"table removed": func(c *nftables.Conn) { c.DelTable(ref) },
		"rules flushed": func(c *nftables.Conn) { c.FlushTable(ref) },
		"chain emptied": func(c *nftables.Conn) { c.FlushChain(&nftables.Chain{Name: chainGuard, Table: ref}) },
		"chain added":   func(c *nftables.Conn) { c.AddChain(&nftables.Chain{Name: "stranger", Table: ref}) },
		"map emptied":   func(c *nftables.Conn) { c.FlushSet(&nftables.Set{Name: setHostPorts + "6", Table: ref, IsMap: true}) },
		"rule added": func(c *nftables.Conn) {
			c.AddRule(&nftables.Rule{Table: ref, Chain: &nftables.Chain{Name: chainGuard, Table: ref}, Exprs: nft.Drop()})
		},
	} {
		conn, err := nftables.New()
		if err != nil {
			t.Fatal(err)
		}
		damage(conn)
		if err := conn.Flush(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		mustIntact(t, table, false)
		if repaired, err := table.Repair(); !repaired || err != nil {
			t.Fatalf("%s: repair: %v, %v", what, repaired, err)
		}
		mustIntact(t, table, true)
		if repaired, err := table.Repair(); repaired || err != nil {
			t.Fatalf("%s: repaired twice: %v, %v", what, repaired, err)
		}
	}

	// Refilling notices by itself that the table is gone.
	if err := nft.RemoveTables("node1"); err != nil {
		t.Fatal(err)
	}
	setPorts(nil)
	mustIntact(t, table, true)
}
