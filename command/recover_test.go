package command

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/server/snapshots/survivor"
)

func TestRecover(t *testing.T) {
	root(t)
	now := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	state := survivor.State{
		Server: "server-1", Cluster: "c", Read: now, Term: 4, LastIndex: 90, LastTerm: 3, Committed: 89, Revision: 70, Changed: now.Add(-time.Minute),
		Lease: &survivor.Lease{Holder: "server-2", Renewed: now.Add(-time.Hour)},
		Members: []survivor.Member{
			{Name: "server-1", ID: "1", Self: true},
			{Name: "server-2", ID: "2", Addresses: []netip.AddrPort{netip.MustParseAddrPort("192.0.2.2:2380")}},
			{Name: "server-3", ID: "3"},
		},
	}
	dir := t.TempDir()
	p := newProgram()
	var compared []survivor.State
	var forced bool
	done := 0
	p.Survivor = func(context.Context, Node) (survivor.State, error) { return state, nil }
	p.Recover = func(_ context.Context, _ Node, others []survivor.State, force bool) (Restored, error) {
		compared, forced, done = others, force, done+1
		return Restored{Revision: 1070, Kept: "/kept"}, nil
	}
	recover := func(code int, args ...string) string {
		t.Helper()
		got, out, errOut := p.run(append([]string{"recover", "--config=/dev/null"}, args...)...)
		if got != code {
			t.Fatalf("%v: exit code %d, %s%s", args, got, out, errOut)
		}
		return out + errOut
	}
	contains := func(out string, all ...string) {
		t.Helper()
		for _, want := range all {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in\n%s", want, out)
			}
		}
	}

	contains(recover(0), "90 of term 3", "2026-11-29T11:00:00Z, 1h0m0s before this was read, by the clock of server-2", "11:59:00Z, 1m0s before this was read, by the clock of server-1",
		"this server", "192.0.2.2:2380", "does not answer", "\"kedge recover --yes\" makes this one")
	text := recover(0, "-o", "json")
	var read survivor.State
	if err := json.Unmarshal([]byte(text), &read); err != nil || read.LastIndex != 90 || read.Lease.Holder != "server-2" {
		t.Errorf("%+v, %v", read, err)
	}
	other := read
	other.Server, other.LastIndex = "server-3", 91
	other.Members = []survivor.Member{{Name: "server-1", ID: "1"}, {Name: "server-3", ID: "3", Self: true}}
	data, err := json.Marshal(other)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "server-3.json")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	contains(recover(0, "--compare="+file), "91 of term 3", "needs --force here: server-3 is newer")
	contains(recover(2, "-o", "json", "--yes"), "leave it or --yes away")
	contains(recover(1, "--compare="+filepath.Join(dir, "none")), "none")
	if done != 0 {
		t.Error("it has recovered without --yes")
	}
	contains(recover(0, "--yes", "--force", "--compare="+file), "after revision 1070", "/kept", "kedge server reset", "kedge token create --role server")
	if done != 1 || !forced || len(compared) != 1 || compared[0].Server != "server-3" {
		t.Errorf("%d recoveries with %v, %v", done, compared, forced)
	}
	state.Members[1].Answers = netip.MustParseAddrPort("192.0.2.2:2380")
	contains(recover(0), "answers at 192.0.2.2:2380", "a majority, 2 of 3: start kedge here")
	state.Members = state.Members[:1]
	contains(recover(0), "fails here", "only member")
}
