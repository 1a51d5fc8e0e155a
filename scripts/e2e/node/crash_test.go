package node

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestInterruptedFirstBoot kills a node at random moments of its first boot, again and
// again in one data directory. In the end it boots, with the authorities that it had
// from the moment when they first appeared.
func TestInterruptedFirstBoot(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	seen := map[string]string{} // what must never change, by its path
	check := func(round int) {
		t.Helper()
		for _, file := range []string{"server-ca.crt", "server-ca.key", "client-ca.crt", "client-ca.key", "request-header-ca.crt", "request-header-ca.key", "service-account.key", "kubelet-ca.crt", "kubelet-ca.key", "../encryption-config.yaml"} {
			path := filepath.Join(n.DataDir(), "server/tls", file)
			data, err := os.ReadFile(path)
			if os.IsNotExist(err) && seen[file] == "" {
				continue
			}
			if err != nil {
				t.Fatalf("round %d: %s was there and is gone: %v", round, file, err)
			}
			if before := seen[file]; before != "" && before != string(data) {
				t.Fatalf("round %d: %s has changed", round, file)
			}
			seen[file] = string(data)
		}
	}
	const rounds = 50
	for i := range rounds {
		// Nothing of the log is of interest before the last round.
		if err := os.RemoveAll(n.LogFile()); err != nil {
			t.Fatal(err)
		}
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
		// Most of them early, where most is made for the first time; some late, when
		// the images are imported and the node is registered.
		limit := 2500 * time.Millisecond
		switch {
		case i%2 == 0:
			limit /= 5
		case i%9 == 0:
			limit *= 3
		}
		select {
		case <-time.After(rand.N(limit)):
		case <-n.Done:
			t.Fatalf("round %d: it ended by itself: %v\n%s", i, n.Err, n.Tail(10))
		}
		if err := n.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
			t.Fatal(err)
		}
		check(i)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	check(rounds)
	if len(seen) != 10 {
		t.Errorf("of 10 files there are %d", len(seen))
	}
	// The address that it leaves off only now: the API answers, to whom the file names.
	if out := n.Kubectl(t, "get", "nodes", "-o", "name"); out != "node/"+n.Name+"\n" {
		t.Errorf("nodes: %q", out)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("after", "echo alive", ""))
	if got := n.Output(t, ns, "after"); got != "alive\n" {
		t.Errorf("a pod printed %q", got)
	}
	var left []string
	err := filepath.WalkDir(n.DataDir(), func(path string, d os.DirEntry, err error) error {
		if err == nil && strings.HasPrefix(d.Name(), ".tmp-") {
			left = append(left, path)
		}
		return nil
	})
	if err != nil || len(left) > 0 {
		t.Errorf("temporary files are left: %v %v", left, err)
	}
}
