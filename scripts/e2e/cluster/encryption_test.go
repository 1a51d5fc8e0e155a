package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestSecretsEncryptOfCluster replaces the key of Secrets of three servers, begun on a follower while a third server is away, with
// kill -9 of the server that leads, under writes through all of them. A server whose disk is a copy of before gets the present key.
// KEDGE_TEST_LONG enables it.
func TestSecretsEncryptOfCluster(t *testing.T) {
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
	harness.Eventually(t, 30*time.Second, func() error {
		for _, s := range f.Encryption(t).Servers {
			if !s.Current {
				return fmt.Errorf("%s: %s", s.Name, s.Problem)
			}
		}
		if list := serverList(t, f.Node); len(list) != 3 || strings.Contains(fmt.Sprint(list), "learner") {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	copied := map[string][]byte{}
	for _, name := range []string{"encryption-config.yaml", "known.json"} {
		data, err := os.ReadFile(filepath.Join(all[2].DataDir(), "server", name))
		if err != nil {
			t.Fatal(err)
		}
		copied[name] = data
	}
	written := writeSecrets(t, all)

	all[2].Stop(t, syscall.SIGTERM, 20*time.Second)
	leader := leaderOf(t, f.Node, all[:2])
	other := all[0]
	if leader == other {
		other = all[1]
	}
	other.Kedge(t, "secrets-encrypt", "rotate", "--no-wait")
	harness.Eventually(t, 20*time.Second, func() error {
		if s := other.Encryption(t); s.Stage != "distribute" || !strings.Contains(s.Waits, "server "+all[2].Name) {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	t.Logf("\n%s", other.Kedge(t, "secrets-encrypt", "status"))
	if err := all[2].Launch(); err != nil {
		t.Fatal(err)
	}
	// The status asks all servers, and the stages are short: the leader's file says that the second one has begun.
	file := filepath.Join(leader.DataDir(), "server", "encryption-config.yaml")
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if first, _, found := strings.Cut(string(data), "name: key2"); found && !strings.Contains(first, "name: key1") {
			break
		}
		if time.Since(begin) > 30*time.Second {
			t.Fatalf("nobody writes with the new key: %+v", other.Encryption(t))
		}
	}
	leader.Stop(t, syscall.SIGKILL, 10*time.Second)
	if err := leader.Start(); err != nil {
		t.Fatal(err)
	}
	awaitKey(t, other, "key2")
	written.check(t, all)

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
	awaitKey(t, all[2], "key2")

	if out, err := other.TryKedge("secrets-encrypt", "rotate"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	s := other.Encryption(t)
	t.Logf("%d Secrets of three servers in %s", s.Total, s.Ended.Sub(s.Began).Round(time.Millisecond))
	for _, s := range all {
		t.Log(s.LogLines(t, "all Secrets have been rewritten"))
	}
	awaitKey(t, f.Node, "key3")
	written.end(t)
	written.check(t, all)
	for _, s := range all {
		s.Stop(t, syscall.SIGTERM, 20*time.Second)
		if keys := s.SecretKeys(t); len(keys) != 1 || keys["key3"] < 500 {
			t.Errorf("the datastore of %s has %v", s.Name, keys)
		}
	}
}

// awaitKey waits until no change is carried out and all servers have the key, as one of them says.
func awaitKey(t *testing.T, at *harness.Node, key string) {
	t.Helper()
	harness.Eventually(t, 60*time.Second, func() error {
		s := at.Encryption(t)
		if s.Stage != "" || s.Key != key || len(s.Servers) != 3 {
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

// secretWrites are writes of Secrets through several servers, until they are ended.
type secretWrites struct {
	stop  context.CancelFunc
	group sync.WaitGroup

	mu    sync.Mutex
	acked map[string]string // content of the Secrets whose creation was acknowledged
}

// writeSecrets creates 500 Secrets, and goes on to create others.
func writeSecrets(t *testing.T, servers []*harness.Node) *secretWrites {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	w := &secretWrites{stop: stop, acked: map[string]string{}}
	t.Cleanup(func() { stop(); w.group.Wait() })
	create := func(n *harness.Node, name string) error {
		content := "content of " + name
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{"k": content}}
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		if _, err := n.Client.CoreV1().Secrets("default").Create(limited, s, metav1.CreateOptions{}); err != nil {
			return err
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.acked[name] = content
		return nil
	}
	var first sync.WaitGroup
	for i := range 8 {
		first.Go(func() {
			for k := i; k < 500; k += 8 {
				if err := create(servers[k%len(servers)], fmt.Sprint("first-", k)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	first.Wait()
	for i, n := range servers {
		w.group.Go(func() {
			for k := 0; ctx.Err() == nil; k++ {
				_ = create(n, fmt.Sprintf("more-%d-%d", i, k)) // servers are stopped and killed; what counts was acknowledged
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	return w
}

func (w *secretWrites) end(t *testing.T) {
	t.Helper()
	w.stop()
	w.group.Wait()
	t.Logf("%d Secrets were written", len(w.acked))
}

// check reads all that were acknowledged through each server.
func (w *secretWrites) check(t *testing.T, servers []*harness.Node) {
	t.Helper()
	w.mu.Lock()
	want := map[string]string{}
	for name, content := range w.acked {
		want[name] = content
	}
	w.mu.Unlock()
	for _, n := range servers {
		list, err := n.Client.CoreV1().Secrets("default").List(context.Background(), metav1.ListOptions{})
		if err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
		got := map[string]string{}
		for _, s := range list.Items {
			got[s.Name] = string(s.Data["k"])
		}
		for name, content := range want {
			if got[name] != content {
				t.Fatalf("%s reads %s as %q", n.Name, name, got[name])
			}
		}
	}
}
