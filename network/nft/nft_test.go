package nft

import (
	"context"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"kedge/internal/test/host"
)

// sample is a table with a set and a chain that looks into it.
func sample() Ruleset {
	c := Chain{Name: "filter", Type: nftables.ChainTypeFilter, Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw}
	s := Set{Name: "addresses", Key: nftables.TypeIPAddr, Elements: []nftables.SetElement{{Key: []byte{192, 0, 2, 1}}}}
	c.Add("from an address of the set", V4.Is(), Exprs{V4.LoadAddr(V4.SourceOffset, Reg1), &expr.Lookup{SourceRegister: Reg1, SetName: s.Name}}, Drop())
	return Ruleset{Sets: []Set{s}, Chains: []Chain{c}}
}

// newTable returns the name of a table that is removed when the test ends.
func newTable(t *testing.T, node string) string {
	t.Helper()
	host.RequireIsolation(t)
	t.Cleanup(func() {
		if err := RemoveTables(node); err != nil {
			t.Error(err)
		}
	})
	return TableName(node, "sample")
}

func write(t *testing.T, table string) {
	t.Helper()
	var s Socket
	if err := s.Replace(table, sample()); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

func mustIntact(t *testing.T, table string, want bool) {
	t.Helper()
	got, err := Intact(table, sample())
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

func TestRemoveTablesLeavesOthers(t *testing.T) {
	one, other := newTable(t, "a"), newTable(t, "a-b")
	for _, table := range []string{one, other} {
		write(t, table)
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
	write(t, table)
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
			write(t, table)
		case <-deadline:
			t.Fatal("a change of another process is not noticed")
		}
	}
	for len(changed) > 0 {
		<-changed
	}
	write(t, table)
	stranger("TestOtherStranger")
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Watch: %v", err)
	}
	if len(changed) > 0 {
		t.Error("a change of our own, or of another table, is reported")
	}
}
