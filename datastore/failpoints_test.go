package datastore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/kubernetes"
)

// etcd's failpoints are named places in its code at which a test may let it panic. They exist only in the build of
// scripts/failpoints.sh; each process then answers HTTP at failpointsAddress of its own host.

const (
	// failpointsVar says that the test binary has failpoints.
	failpointsVar     = "KEDGE_TEST_FAILPOINTS"
	failpointsAddress = "127.0.0.1:22381"
	// failpointPatience is how long a store is kept busy for a failpoint to be reached.
	failpointPatience = 3 * time.Second
)

// runFailpointCommand runs a command of a machine for these tests.
func runFailpointCommand(ctx context.Context, c *kubernetes.Client, words []string) (string, error) {
	switch words[0] {
	case "failpoints":
		answer, err := askFailpoints(ctx, http.MethodGet, "", "")
		var names []string
		for line := range strings.Lines(answer) {
			name, _, _ := strings.Cut(strings.TrimSpace(line), "=")
			names = append(names, name)
		}
		return strings.Join(names, " "), err
	case "failpoint": // name, what happens there
		return askFailpoints(ctx, http.MethodPut, words[1], words[2])
	}
	return "ok", occupy(ctx, c)
}

func askFailpoints(ctx context.Context, method, name, terms string) (string, error) {
	request, err := http.NewRequestWithContext(ctx, method, "http://"+failpointsAddress+"/"+name, strings.NewReader(terms))
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(request)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode >= 300 {
		err = fmt.Errorf("%s %s: %s: %s", method, name, resp.Status, answer)
	}
	return string(answer), err
}

// occupy has a store do everything once that it does seldom.
func occupy(ctx context.Context, c *kubernetes.Client) error {
	got, err := c.Client.Get(ctx, checkKey)
	if err != nil {
		return err
	}
	if _, err := c.Client.Compact(ctx, max(1, got.Header.Revision-20), clientv3.WithCompactPhysical()); err != nil && !strings.Contains(err.Error(), "compacted") {
		return err
	}
	lease, err := c.Client.Grant(ctx, 60)
	if err != nil {
		return err
	}
	if _, err := c.Client.KeepAliveOnce(ctx, lease.ID); err != nil {
		return err
	}
	if _, err := c.Client.TimeToLive(ctx, lease.ID); err != nil {
		return err
	}
	if _, err := c.Client.Revoke(ctx, lease.ID); err != nil {
		return err
	}
	if _, err := c.Kubernetes.List(ctx, "/l/", kubernetes.ListOptions{}); err != nil {
		return err
	}
	_, err = c.Defragment(ctx, Endpoint)
	return err
}

// TestFailpoints lets a lone store, and the leader or a follower of three, panic once at each failpoint, while clients write. It
// starts again, nothing that was acknowledged is lost, and the members hold the same.
func TestFailpoints(t *testing.T) {
	if os.Getenv(failpointsVar) == "" {
		t.Skip("needs a build with failpoints: make test-failpoints")
	}
	t.Setenv("GOFAIL_HTTP", failpointsAddress)
	for _, members := range []int{1, 3} {
		t.Run(fmt.Sprintf("%d members", members), func(t *testing.T) {
			d := newDamaged(t, members)
			answer, err := d.victim.ask("failpoints")
			if err != nil {
				t.Fatal(err)
			}
			names := strings.Fields(answer)
			if len(names) < 30 {
				t.Fatalf("only %d failpoints", len(names))
			}
			slices.Sort(names)
			var missed []string
			for _, name := range names {
				how := d.failAt(name)
				if how == "" {
					missed = append(missed, name)
				} else {
					t.Logf("%d members: %s: %s", members, name, how)
				}
			}
			t.Logf("%d members: %d of %d failpoints were reached; not reached: %v", members, len(names)-len(missed), len(names), missed)
			if len(missed) > len(names)/2 {
				t.Error("most failpoints were not reached")
			}
		})
	}
}

// failAt lets members panic at a failpoint until one has, and returns which; nothing if none has reached it.
func (d *damaged) failAt(name string) (how string) {
	d.Helper()
	leads := leaderOf(d.T, d.all)
	candidates := []*machine{leads}
	if others := slices.DeleteFunc(slices.Clone(d.all), func(m *machine) bool { return m == leads }); len(others) > 0 {
		candidates = append(candidates, others[0])
	}
	for i, m := range candidates {
		d.setVictim(m)
		if _, err := m.ask("failpoint " + name + " panic"); err != nil && !errors.Is(err, errEnded) {
			d.Fatalf("%s: %v", name, err)
		}
		if d.awaitEnd(m) {
			d.again(name)
			return []string{"the leader ended", "a follower ended"}[i]
		}
		if _, err := m.ask("failpoint " + name + " off"); err != nil {
			d.Fatalf("%s: %v", name, err)
		}
	}
	// At a start, after which it has much to catch up with.
	d.victim.kill()
	if len(d.all) > 1 {
		d.awaitWrites(450)
	}
	d.victim.cfg.Join = nil
	d.victim.environ = []string{"GOFAIL_FAILPOINTS=" + name + "=panic"}
	d.victim.start()
	ended := d.awaitEnd(d.victim)
	d.victim.environ = nil
	if !ended {
		d.victim.kill()
	}
	d.again(name)
	if ended {
		return "it ended at its start"
	}
	return ""
}

// setVictim makes another machine the one that clients do not use.
func (d *damaged) setVictim(m *machine) {
	d.pause()
	d.victim = m
	d.resume()
}

// awaitEnd keeps a member busy until its process has ended, and reports whether it has.
func (d *damaged) awaitEnd(m *machine) bool {
	for until := time.Now().Add(failpointPatience); time.Now().Before(until); time.Sleep(20 * time.Millisecond) {
		if _, err := m.ask("occupy"); errors.Is(err, errEnded) {
			m.readers.Wait()
			_ = m.command.Wait()
			m.command = nil
			return true
		}
	}
	return false
}

// again starts the victim without failpoints, and compares it with what the clients know.
func (d *damaged) again(name string) {
	d.Helper()
	d.pause()
	d.victim.cfg.Join = nil
	d.victim.start()
	d.victim.await("check", "ok")
	d.verify(name)
	d.resume()
}
