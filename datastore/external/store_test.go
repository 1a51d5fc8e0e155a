package external

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"kedge/datastore"
	"kedge/internal/errorkind"
	"kedge/internal/test/await"
)

// running is a store that runs.
type running struct {
	*Store
	ready chan struct{}
	done  chan error
	stop  context.CancelFunc
	log   *text

	entered, removed bool
}

// text is a log that a test reads.
type text struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (t *text) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.b.Write(b)
}

func (t *text) count(what string) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return strings.Count(t.b.String(), what)
}

// launch starts a server of a cluster on the etcd at the URL.
func launch(t *testing.T, cfg Config, self Server) *running {
	t.Helper()
	r := &running{ready: make(chan struct{}), done: make(chan error, 1), log: &text{}}
	self.Port = 6443
	r.Store = New(cfg, self, []netip.Addr{netip.MustParseAddr("192.0.2.1")}, slog.New(slog.NewTextHandler(r.log, nil)))
	r.times = times{ttl: 2 * time.Second, margin: 500 * time.Millisecond, renew: 200 * time.Millisecond, answer: time.Second, retry: 50 * time.Millisecond}
	r.OnEntered(func() error { r.entered = true; return nil })
	r.OnRemoved(func() error { r.removed = true; return nil })
	ctx, cancel := context.WithCancel(context.Background())
	r.stop = cancel
	go func() { r.done <- r.Run(ctx, func() { close(r.ready) }) }()
	t.Cleanup(func() { r.end() })
	return r
}

// end stops it in order and returns its error.
func (r *running) end() error {
	r.stop()
	err := <-r.done
	r.done <- err
	return err
}

// awaitReady waits until clients work.
func (r *running) awaitReady(t *testing.T) {
	t.Helper()
	select {
	case <-r.ready:
	case err := <-r.done:
		r.done <- err
		t.Fatalf("it ended with %v", err)
	case <-time.After(await.Limit):
		t.Fatalf("not ready: %s", r.Describe())
	}
}

// refusal returns the error with which it ends by itself.
func (r *running) refusal(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.done:
		r.done <- err
		return err
	case <-time.After(await.Limit):
		t.Fatalf("still running: %s", r.Describe())
		return nil
	}
}

func (r *running) leads() bool { now, _ := r.Leadership(); return now.Leading }

func (r *running) ledBy(name string) func() bool {
	return func() bool { now, _ := r.Leadership(); return now.Leader == name }
}

// TestServersOfOneEtcd is the life of two servers on an etcd with mutual TLS: the second is admitted, leads when the first stops, and
// is removed.
func TestServersOfOneEtcd(t *testing.T) {
	e := newEtcd(t, "https")
	e.CA, e.Cert, e.Key = certificates(t, "etcd")
	cfg := Config{Endpoints: []string{"https://127.0.0.1:1", e.URL}, CAFile: e.CA, CertFile: e.Cert, KeyFile: e.Key} // of the first endpoint nothing answers
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	first := launch(t, cfg, Server{Name: "s1", Cluster: "abc"})
	await.True(t, "it says what it waits for", func() bool { return strings.Contains(first.Describe(), "waiting for the external etcd") })
	if err := first.Check(t.Context()); !errors.Is(err, datastore.ErrNotServing) {
		t.Errorf("the check of a store that waits: %v", err)
	}
	e.start(t)
	first.awaitReady(t)
	if n := first.log.count("waiting for the external etcd"); n != 1 {
		t.Errorf("it said %d times that it waits, want once", n)
	}
	await.True(t, "the first server leads", first.leads)
	if !first.entered || first.Check(t.Context()) != nil {
		t.Errorf("entered: %v, check: %v", first.entered, first.Check(t.Context()))
	}

	intruder := launch(t, cfg, Server{Name: "s2", Cluster: "def"})
	if err := intruder.refusal(t); errorkind.ExitCode(err) != errorkind.ExitConfig || !strings.Contains(err.Error(), "another cluster of kedge") || intruder.entered {
		t.Errorf("a server of another cluster: %v", err)
	}
	early := launch(t, cfg, Server{Name: "s2", Cluster: "abc", Known: true})
	if err := early.refusal(t); !errors.Is(err, datastore.ErrRemoved) || !early.removed {
		t.Errorf("a server that was not admitted: %v", err)
	}
	if _, err := first.Admit(t.Context(), "s1", nil); !errors.Is(err, datastore.ErrMemberExists) {
		t.Errorf("admitted a name of a server that runs: %v", err)
	}
	if a, err := first.Admit(t.Context(), "s2", nil); err != nil || !a.External {
		t.Fatalf("%+v, %v", a, err)
	}
	second := launch(t, cfg, Server{Name: "s2", Cluster: "abc", Known: true})
	second.awaitReady(t)
	await.True(t, "the second server follows the first", second.ledBy("s1"))
	members, err := second.Members(t.Context())
	if err != nil || len(members) != 2 || !members[0].Leader || members[1].Leader || !members[0].Reachable || members[0].Addresses[0].String() != "192.0.2.1:6443" {
		t.Errorf("members %+v, %v", members, err)
	}

	if err := first.end(); err != nil {
		t.Fatal(err)
	}
	// The lease of a server that stops ends with it: s2 need not wait for its end.
	if members, err = second.Members(t.Context()); err != nil || members[0].Reachable || members[0].Leader {
		t.Errorf("the first has stopped: %+v, %v", members, err)
	}
	await.True(t, "the second server leads", second.leads)
	members, err = second.Members(t.Context())
	if err != nil || members[0].Reachable || members[0].LastSeen.IsZero() || !members[1].Leader {
		t.Errorf("after the first has stopped: %+v, %v", members, err)
	}
	again := launch(t, cfg, Server{Name: "s1", Cluster: "abc", Known: true})
	again.awaitReady(t)
	await.True(t, "the first server follows the second", again.ledBy("s2"))
	if err := again.Remove(t.Context(), "s3"); !errors.Is(err, datastore.ErrNoMember) {
		t.Errorf("removed a server that is none: %v", err)
	}
	if err := again.Remove(t.Context(), "s2"); err != nil {
		t.Fatal(err)
	}
	if err := second.refusal(t); !errors.Is(err, datastore.ErrRemoved) || !second.removed {
		t.Errorf("the removed server ended with %v", err)
	}
	await.True(t, "the first server leads again", again.leads)
	if err := again.Remove(t.Context(), "s1"); err == nil {
		t.Error("the only server was removed")
	}
}

// TestEtcdGoesAway: without an etcd there is no leader and the check fails; when it is back everything works without a new start. A
// server that was killed leads again at once, and a server whose etcd is emptied stops.
func TestEtcdGoesAway(t *testing.T) {
	e := newEtcd(t, "http")
	e.start(t)
	cfg := Config{Endpoints: []string{e.URL}}
	s := launch(t, cfg, Server{Name: "s1", Cluster: "abc"})
	s.awaitReady(t)
	await.True(t, "it leads", s.leads)
	now, _ := s.Leadership()
	e.kill()
	await.True(t, "it leads no more", func() bool { return !s.leads() })
	if err := s.Check(t.Context()); err == nil || !strings.Contains(err.Error(), "does not answer at "+e.URL) {
		t.Errorf("the check says %v", err)
	}
	await.True(t, "no leader is published", func() bool { l, _ := s.leaders.Get(); return l.Leader == "" })
	e.start(t)
	await.True(t, "it leads again", s.leads)
	if err := s.Check(t.Context()); err != nil {
		t.Error(err)
	}

	// A second process in its place, as after a kill: the old lease is still there.
	same := launch(t, cfg, Server{Name: "s1", Cluster: "abc", Known: true})
	same.awaitReady(t)
	await.True(t, "the new process leads", same.leads)
	if later, _ := same.Leadership(); later.Term < now.Term {
		t.Errorf("the term went from %d to %d", now.Term, later.Term)
	}
	_ = s.end()

	c, err := same.NewClient()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Delete(t.Context(), "/", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if err := same.refusal(t); !errors.Is(err, errLost) || errorkind.ExitCode(err) != errorkind.ExitConfig {
		t.Errorf("after the etcd was emptied it ended with %v", err)
	}
	if err := launch(t, cfg, Server{Name: "s1", Cluster: "abc", Known: true}).refusal(t); !errors.Is(err, errLost) {
		t.Errorf("on an empty etcd it ended with %v", err)
	}
	if _, err := c.Put(t.Context(), objectPrefix+"pods/a", "x"); err != nil {
		t.Fatal(err)
	}
	if err := launch(t, cfg, Server{Name: "s1", Cluster: "abc"}).refusal(t); !errors.Is(err, errOtherCluster) {
		t.Errorf("on another Kubernetes' etcd it ended with %v", err)
	}
}
