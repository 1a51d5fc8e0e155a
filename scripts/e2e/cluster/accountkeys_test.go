package cluster

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestServiceAccountKeyOfCluster replaces the key of service accounts' tokens of three servers, begun on a follower while a third
// server is away, with kill -9 of the server that leads. Each server accepts what each signs, at every moment. A server whose disk
// is a copy of before gets the present key. KEDGE_TEST_LONG enables it.
func TestServiceAccountKeyOfCluster(t *testing.T) {
	if os.Getenv("KEDGE_TEST_LONG") == "" {
		t.Skip("takes more than a minute; set KEDGE_TEST_LONG=1, or run make test-long")
	}
	f := harness.NewFleet(t, "--disable-agent")
	all := []*harness.Node{f.Node}
	for range 2 {
		s := newServer(t, f)
		s.Flags = append(s.Flags, "--disable-agent")
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	current := func(at *harness.Node, stage string) {
		t.Helper()
		harness.Eventually(t, 60*time.Second, func() error {
			s := at.AccountKeys(t)
			if s.Stage != stage || len(s.Servers) != 3 {
				return fmt.Errorf("%+v", s)
			}
			for _, server := range s.Servers {
				if !server.Current {
					return fmt.Errorf("%+v", s)
				}
			}
			return nil
		})
	}
	current(f.Node, "")
	harness.Eventually(t, 30*time.Second, func() error {
		if list := serverList(t, f.Node); len(list) != 3 || strings.Contains(fmt.Sprint(list), "learner") {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	copied := map[string][]byte{}
	for _, name := range []string{"tls/service-account.key", "known.json"} {
		data, err := os.ReadFile(filepath.Join(all[2].DataDir(), "server", name))
		if err != nil {
			t.Fatal(err)
		}
		copied[name] = data
	}
	tokens := map[string]string{}
	accepted := func(servers []*harness.Node, what string) {
		t.Helper()
		for _, n := range servers {
			tokens[what+", of "+n.Name] = n.NewAccountToken(t, "default")
		}
		for _, n := range servers {
			for what, token := range tokens {
				if err := n.AcceptsToken(token, "default"); err != nil {
					t.Errorf("%s does not accept the token of %s: %v", n.Name, what, err)
				}
			}
		}
	}
	accepted(all, "before")

	all[2].Stop(t, syscall.SIGTERM, 20*time.Second)
	leader := leaderOf(t, f.Node, all[:2])
	other := all[0]
	if leader == other {
		other = all[1]
	}
	other.Kedge(t, "service-account-key", "rotate", "--no-wait")
	harness.Eventually(t, 20*time.Second, func() error {
		if s := other.AccountKeys(t); s.Stage != "distribute" || !strings.Contains(s.Waits, "server "+all[2].Name) {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	accepted(all[:2], "while one is away")
	t.Logf("\n%s", other.Kedge(t, "service-account-key", "status"))
	if err := all[2].Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error {
		if s := other.AccountKeys(t); s.Stage != "switch" && s.Stage != "keep" {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	leader.Stop(t, syscall.SIGKILL, 10*time.Second)
	if err := leader.Start(); err != nil {
		t.Fatal(err)
	}
	if err := all[2].WaitReady(90 * time.Second); err != nil {
		t.Fatal(err)
	}
	current(other, "keep")
	accepted(all, "after the switch")
	if out, err := other.TryKedge("service-account-key", "finish"); err == nil || !strings.Contains(out, "a day after the switch") {
		t.Errorf("%v\n%s", err, out)
	}
	other.Kedge(t, "service-account-key", "finish", "--force")
	current(other, "")
	tokens = map[string]string{}
	accepted(all, "at the end")

	// A copy of the disk, whose file and fingerprints are of before.
	all[2].Stop(t, syscall.SIGTERM, 20*time.Second)
	for name, data := range copied {
		if err := os.WriteFile(filepath.Join(all[2].DataDir(), "server", name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := all[2].Start(); err != nil {
		t.Fatal(err)
	}
	current(all[2], "")
	accepted(all, "after the copy")
}
