package join

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/internal/pki"
)

// TestAgentRotates: an agent gets new certificates when it is asked to, running or stopped, and all of them are listed. Without
// a server, and once it was removed, it keeps what it has.
func TestAgentRotates(t *testing.T) {
	c := newCluster(t, nil)
	dir := t.TempDir()
	m := c.mustJoin(t, dir, "a", c.token(t, Spec{}))
	contents := func() map[string]string {
		t.Helper()
		all := map[string]string{}
		for _, e := range joining.Certificates(dir, time.Now()) {
			if e.Problem != "" || len(e.Names) == 0 || e.Ends.IsZero() || e.UsedBy == "" || e.CA != strings.HasSuffix(e.Name, "-ca") {
				t.Errorf("a good certificate is %+v", e)
			}
			data, err := os.ReadFile(e.File)
			if err != nil {
				t.Fatal(err)
			}
			all[e.Name] = string(data)
		}
		return all
	}
	before := contents()
	if got, want := slices.Sorted(maps.Keys(before)), []string{"client-ca", "kubelet", "network", "node", "server-ca"}; !slices.Equal(got, want) {
		t.Fatalf("listed are %v, want %v", got, want)
	}
	stopped := joining.Config{Dir: dir, Server: c.url, NodeName: "a"}
	for name, rotate := range map[string]func() ([]string, error){
		"running": func() ([]string, error) { return m.Rotate(t.Context()) },
		"stopped": func() ([]string, error) { return joining.Rotate(t.Context(), stopped, quiet) },
	} {
		rotated, err := rotate()
		if err != nil || !slices.Equal(rotated, []string{"node", "network", "kubelet"}) {
			t.Fatal(name, rotated, err)
		}
		after := contents()
		for file := range after {
			if changed := after[file] != before[file]; changed != slices.Contains(rotated, file) {
				t.Errorf("%s: %s changed: %v", name, file, changed)
			}
		}
		before = after
	}
	if err := joining.CheckNames([]string{"node"}); errorkind.ExitCode(err) != errorkind.ExitUsage || joining.CheckNames(nil) != nil {
		t.Errorf("with a name: %v", err)
	}
	if _, err := joining.Rotate(t.Context(), joining.Config{Dir: t.TempDir(), Server: c.url, NodeName: "b"}, quiet); err != joining.ErrNotJoined {
		t.Errorf("before it has joined: %v", err)
	}
	if err := c.Nodes().Forget(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Rotate(t.Context()); err == nil || !strings.Contains(err.Error(), ErrUnknownNode.Error()) {
		t.Errorf("after it was removed: %v", err)
	}
	if !maps.Equal(contents(), before) {
		t.Error("a refusal has changed its files")
	}
	if err := os.Remove(filepath.Join(dir, "kubelet.crt")); err != nil {
		t.Fatal(err)
	}
	if i := slices.IndexFunc(joining.Certificates(dir, time.Now()), func(e pki.Examined) bool { return e.Problem != "" }); i != 4 {
		t.Errorf("the certificate with a problem is %d", i)
	}
}
