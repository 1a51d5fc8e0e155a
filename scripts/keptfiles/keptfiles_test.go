package keptfiles

import (
	"flag"
	"os"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the table in docs/files.md; look at the difference before committing it")

const begin, end = "<!-- kept: begin -->\n", "<!-- kept: end -->\n"

// TestDocs: the documentation shows the list.
func TestDocs(t *testing.T) {
	const name = "../../docs/files.md"
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	table, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has no place for the list, between %q and %q", name, begin, end)
	}
	if table == Table() {
		return
	}
	if !*update {
		t.Fatalf("%s shows another list; run go test ./scripts/keptfiles -update", name)
	}
	if err := os.WriteFile(name, []byte(before+begin+Table()+end+after), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestFind(t *testing.T) {
	for name, want := range map[string]string{
		"server/store/member/wal/0000000000000000-0000000000000000.wal": "server/store/member/wal/*.wal",
		"containerd/io.containerd.snapshotter.v1.native/metadata.db":    "containerd/io.containerd.snapshotter.v1.*/metadata.db",
		"containerd/anything/else":                                      "containerd/**",
		"server/store.removed-20260101T000000Z/member/snap/db":          "server/store.removed-*/**",
		"kubelet/cpu_manager_state":                                     "kubelet/*_state",
		"server/anything":                                               "",
		"containerd":                                                    "",
	} {
		if f, ok := Find(Data, name); f.Path != want || ok != (want != "") {
			t.Errorf("%s is %q, want %q", name, f.Path, want)
		}
	}
	if _, ok := Find(Run, "kedge.json"); ok {
		t.Error("a file of the data directory is found in the run directory")
	}
}

// TestEveryDamage: the list says of every file what happens, whatever happens to it.
func TestEveryDamage(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range Files() {
		key := string(f.Dir) + "/" + f.Path
		if seen[key] || f.Holds == "" {
			t.Errorf("%s is there twice, or does not say what it holds", key)
		}
		seen[key] = true
		for d, o := range f.On {
			if o != Same && o != Again && o != Repaired && o != Refused {
				t.Errorf("%s, %v: %q", key, Damage(d), o)
			}
		}
	}
}
