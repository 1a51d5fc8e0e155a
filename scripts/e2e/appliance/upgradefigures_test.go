package appliance

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"

	"kedge/scripts/e2e/harness"
)

// askEvery is how often the clients of these figures ask.
const askEvery = 20 * time.Millisecond

// asker asks a server's API over the network, and does nothing by itself when that fails.
type asker struct {
	client *http.Client
	url    string
}

func newAsker(t *testing.T, n *harness.Node) asker {
	t.Helper()
	client, err := rest.HTTPClientFor(n.Config)
	if err != nil {
		t.Fatal(err)
	}
	return asker{client: client, url: n.Config.Host + "/api/v1/namespaces/default"}
}

func (a asker) ask(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, a.url, nil)
	if err != nil {
		return err
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if _, err := io.Copy(io.Discard, resp.Body); err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the API answers %s", resp.Status)
	}
	return nil
}

// away asks until the returned function is called, which tells the longest time from the first request that failed to the next
// answer, and when that request was.
func (a asker) away(t *testing.T) func() (longest time.Duration, from time.Time) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var longest time.Duration
	var from time.Time
	go func() {
		defer close(done)
		var failed time.Time
		for tick := time.NewTicker(askEvery); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			begin := time.Now()
			switch err := a.ask(ctx); {
			case err != nil && failed.IsZero():
				failed = begin
			case err == nil && !failed.IsZero():
				if d := time.Since(failed); d > longest {
					longest, from = d, failed
				}
				failed = time.Time{}
			}
		}
	}()
	return func() (time.Duration, time.Time) {
		cancel()
		<-done
		return longest, from
	}
}

// TestUpgradeFigures measures how long one server's API is away during an upgrade.
func TestUpgradeFigures(t *testing.T) {
	harness.OnlyMeasures(t, "make bench-appliance")
	s := newLoneUpgradeSite(t, asItIs)
	var away, before, ending, starting, upgrades []time.Duration
	for i := range 5 {
		begin := time.Now()
		file := s.newer(fmt.Sprint("version-", i))
		if out, err := s.RunKedge("upgrade", "--observe=2s", "--file="+file); err != nil {
			t.Fatalf("upgrade: %v\n%s", err, out)
		}
		before = append(before, time.Since(begin))
		a := newAsker(t, s.Node)
		if err := a.ask(t.Context()); err != nil {
			t.Fatal(err)
		}
		gap := a.away(t)
		time.Sleep(time.Second)
		stop := time.Now()
		s.stop()
		ending = append(ending, time.Since(stop))
		start := time.Now()
		if err := s.Launch(); err != nil {
			t.Fatal(err)
		}
		for a.ask(t.Context()) != nil {
			time.Sleep(10 * time.Millisecond)
		}
		starting = append(starting, time.Since(start))
		if o := s.supervise(nil); o.Result != "upgraded" {
			t.Fatalf("%+v", o)
		}
		longest, from := gap()
		away, upgrades = append(away, longest), append(upgrades, time.Since(begin))
		t.Logf("the API is away for %s, beginning %s after SIGTERM; kedge ends within %s, and serves %s after its start", longest, from.Sub(stop), ending[i], starting[i])
	}
	t.Logf("one server is upgraded: the API is away for %s", harness.Figures(away))
	t.Logf("kedge upgrade until the restart: %s", harness.Figures(before))
	t.Logf("from SIGTERM to the end of the process: %s", harness.Figures(ending))
	t.Logf("from the start to the first answer: %s", harness.Figures(starting))
	t.Logf("the whole upgrade, with two seconds of observation: %s", harness.Figures(upgrades))
}

// patientAnswers counts the requests of a client that tries again, with another server.
type patientAnswers struct {
	requests, again, failed int
	longest                 time.Duration
	last                    error
}

// patience is for how long such a client tries again.
const patience = 10 * time.Second

// askPatiently asks one of the servers, and another when that does not answer, until the returned function is called.
func askPatiently(t *testing.T, servers []asker) func() patientAnswers {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	var n patientAnswers
	go func() {
		defer close(done)
		for tick := time.NewTicker(askEvery); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			begin := time.Now()
			err := servers[n.requests%len(servers)].ask(ctx)
			if err != nil && ctx.Err() == nil {
				n.again++
			}
			for i := n.requests + 1; err != nil && time.Since(begin) < patience && ctx.Err() == nil; i++ {
				time.Sleep(askEvery)
				err = servers[i%len(servers)].ask(ctx)
			}
			if ctx.Err() != nil {
				return
			}
			n.requests++
			n.longest = max(n.longest, time.Since(begin))
			if err != nil {
				n.failed++
				n.last = err
			}
		}
	}()
	return func() patientAnswers {
		cancel()
		<-done
		return n
	}
}

// TestClusterUpgradeFigures counts the failed requests while "kedge upgrade --all" upgrades three servers.
func TestClusterUpgradeFigures(t *testing.T) {
	harness.OnlyMeasures(t, "make bench-appliance")
	s := newClusterSite(t, newLoneUpgradeSite(t, asItIs), 3, 0)
	release := s.supervise(t)
	var servers []asker
	for _, n := range s.nodes {
		servers = append(servers, newAsker(t, n))
	}
	begin := time.Now()
	answers := askPatiently(t, servers)
	stopped := s.load(t)
	out, err := s.RunKedge("upgrade", "--all", "--observe=2s", "--file="+s.newer("good"))
	if err != nil || strings.Count(out, ": upgraded\n") != len(s.nodes) {
		t.Fatalf("%v\n%s", err, out)
	}
	took := time.Since(begin)
	written := stopped()
	n := answers()
	t.Logf("three servers are upgraded within %s: of %d requests %d were tried again with another server and %d failed (%v); the longest took %s; %d objects were written",
		took.Round(time.Second), n.requests, n.again, n.failed, n.last, n.longest.Round(time.Millisecond), len(written))
	release()
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Error(err)
		}
	}
}
