package nft

import (
	"context"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"kedge/internal/testhost"
)

func samplePods() PodRules {
	return PodRules{
		LinkPrefix: "kdgtest",
		PodRanges:  []netip.Prefix{netip.MustParsePrefix("10.42.0.0/24"), netip.MustParsePrefix("fd42::/64")},
		Inside:     []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")},
		HostPorts: []HostPort{
			{Port: 80, Protocol: unix.IPPROTO_TCP, Pod: netip.MustParseAddrPort("10.42.0.5:8080")},
			{Port: 80, Protocol: unix.IPPROTO_TCP, Pod: netip.MustParseAddrPort("[fd42::5]:8080")},
			{Port: 53, Protocol: unix.IPPROTO_UDP, Pod: netip.MustParseAddrPort("10.42.0.5:53"), HostIP: netip.MustParseAddr("192.0.2.1")},
		},
	}
}

func newTable(t testing.TB, node string) *PodTable {
	t.Helper()
	testhost.RequireIsolation(t)
	t.Cleanup(func() {
		if err := RemoveTables(node); err != nil {
			t.Error(err)
		}
	})
	return NewPodTable(node)
}

func mustIntact(t *testing.T, table *PodTable, want bool) {
	t.Helper()
	got, err := intact(table.name, table.now)
	if err != nil || got != want {
		t.Fatalf("intact: %v, %v, want %v", got, err, want)
	}
}

func TestTableNames(t *testing.T) {
	long := strings.Repeat("n", 253)
	for _, c := range []struct{ node, want string }{
		{"node1", "kedge-node1/pods"},
		{"a.b-c", "kedge-a.b-c/pods"},
	} {
		if got := TableName(c.node, "pods"); got != c.want {
			t.Errorf("TableName(%q) = %q, want %q", c.node, got, c.want)
		}
	}
	if name := TableName(long, "pods"); len(name) > maxTableName || !strings.HasSuffix(name, "/pods") {
		t.Errorf("name for the longest node name: %q", name)
	}
}

func TestSetAndRepair(t *testing.T) {
	table := newTable(t, "node1")
	if repaired, err := table.Repair(); repaired || err != nil {
		t.Fatalf("repair before anything was written: %v, %v", repaired, err)
	}
	rules := samplePods()
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, table, true)

	rules.HostPorts = rules.HostPorts[:1] // refilled
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, table, true)
	rules.HostPorts = nil
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	rules = samplePods()
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, table, true)

	ref := &nftables.Table{Name: table.Name(), Family: nftables.TableFamilyINet}
	for what, damage := range map[string]func(*nftables.Conn){
		"table removed": func(c *nftables.Conn) { c.DelTable(ref) },
		"rules flushed": func(c *nftables.Conn) { c.FlushTable(ref) },
		"chain emptied": func(c *nftables.Conn) { c.FlushChain(&nftables.Chain{Name: chainGuard, Table: ref}) },
		"chain added":   func(c *nftables.Conn) { c.AddChain(&nftables.Chain{Name: "stranger", Table: ref}) },
		"map emptied":   func(c *nftables.Conn) { c.FlushSet(&nftables.Set{Name: setHostPorts + "6", Table: ref, IsMap: true}) },
		"rule added": func(c *nftables.Conn) {
			c.AddRule(&nftables.Rule{Table: ref, Chain: &nftables.Chain{Name: chainGuard, Table: ref}, Exprs: drop()})
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
	if err := RemoveTables("node1"); err != nil {
		t.Fatal(err)
	}
	rules.HostPorts = nil
	if err := table.Set(rules); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, table, true)
}

func TestRemoveTablesLeavesOthers(t *testing.T) {
	one, other := newTable(t, "a"), newTable(t, "a-b")
	for _, table := range []*PodTable{one, other} {
		if err := table.Set(samplePods()); err != nil {
			t.Fatal(err)
		}
	}
	if err := RemoveTables("a"); err != nil {
		t.Fatal(err)
	}
	mustIntact(t, one, false)
	mustIntact(t, other, true)
	if err := RemoveTables("a"); err != nil {
		t.Errorf("removing nothing: %v", err)
	}
}

// strangerVar makes the test program another process that changes rules.
const strangerVar = "KEDGE_TEST_STRANGER"

func TestStranger(t *testing.T) {
	if os.Getenv(strangerVar) == "" {
		t.Skip("runs only as another process of TestWatch")
	}
	if err := RemoveTables("watched"); err != nil {
		t.Fatal(err)
	}
}

// TestOtherStranger changes a table that is not ours.
func TestOtherStranger(t *testing.T) {
	if os.Getenv(strangerVar) == "" {
		t.Skip("runs only as another process of TestWatch")
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	conn.AddTable(&nftables.Table{Name: "firewall", Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
}

func TestWatch(t *testing.T) {
	table := newTable(t, "watched")
	ctx, cancel := context.WithCancel(t.Context())
	changed, done := make(chan struct{}, 100), make(chan error, 1)
	go func() { done <- Watch(ctx, func() { changed <- struct{}{} }) }()

	// Own changes are no news; they also tell when the watch has begun, below.
	if err := table.Set(samplePods()); err != nil {
		t.Fatal(err)
	}
	deadline := time.After(30 * time.Second)
	stranger := func(test string) {
		t.Helper()
		cmd := exec.Command("/proc/self/exe", "-test.run", "^"+test+"$")
		cmd.Env = append(slices.Clone(os.Environ()), strangerVar+"=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	for heard := false; !heard; {
		stranger("TestStranger")
		select {
		case <-changed:
			heard = true
		case <-time.After(200 * time.Millisecond): // the watch had not begun
			if err := table.Set(samplePods()); err != nil {
				t.Fatal(err)
			}
		case <-deadline:
			t.Fatal("a change of another process is not noticed")
		}
	}
	for len(changed) > 0 {
		<-changed
	}
	if err := new(socket).replace(table.name, samplePods().ruleset()); err != nil {
		t.Fatal(err)
	}
	stranger("TestOtherStranger")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch: %v", err)
	}
	if len(changed) > 0 {
		t.Error("a change of our own, or of another table, is reported")
	}
}
