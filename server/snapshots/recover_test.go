package snapshots

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/datastore"
	"kedge/internal/datadir"
	"kedge/internal/pki"
	"kedge/server/identity"
	"kedge/server/snapshots/survivor"
)

// peer is a site whose datastore has other members.
type peer struct {
	*site
	at   netip.AddrPort
	join *datastore.Admission
}

func newPeer(s *site) *peer {
	s.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		s.Fatal(err)
	}
	defer l.Close()
	return &peer{site: s, at: netip.MustParseAddrPort(l.Addr().String())}
}

// launch opens the datastore, and returns before it is ready.
func (p *peer) launch() (ready chan struct{}, stop func()) {
	p.Helper()
	cfg := datastore.DefaultConfig()
	cfg.Dir, cfg.MemberName, cfg.Join = filepath.Join(p.dir(), storeFolder), p.node, p.join
	cfg.Peer = identity.PeerConfig(p.dir(), p.at.Port(), []netip.Addr{p.at.Addr()})
	if err := cfg.Validate(); err != nil {
		p.Fatal(err)
	}
	p.store = datastore.New(cfg, quiet)
	ctx, cancel := context.WithCancel(context.Background())
	ready = make(chan struct{})
	done := make(chan error, 1)
	go func() { done <- p.store.Run(ctx, func() { close(ready) }) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			p.Errorf("%s: %v", p.node, err)
		}
	}
	p.Cleanup(stop)
	return ready, stop
}

func (p *peer) start() (stop func()) {
	p.Helper()
	ready, stop := p.launch()
	select {
	case <-ready:
	case <-time.After(30 * time.Second):
		p.Fatalf("%s is not ready", p.node)
	}
	return stop
}

// newPair makes a cluster of two servers, which run.
func newPair(t *testing.T) (one, two *peer, stopOne, stopTwo func()) {
	one = newPeer(newSite(t, "one"))
	stopOne = one.start()
	two = newPeer(&site{T: t, dataDir: t.TempDir(), node: "two", secrets: fake.NewClientset()})
	files, err := keyFiles(one.dir())
	if err != nil {
		t.Fatal(err)
	}
	delete(files, nodeKeyName(one.dir()))
	if err := os.MkdirAll(filepath.Join(two.dir(), "tls"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, data := range files {
		if err := os.WriteFile(filepath.Join(two.dir(), name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := pki.EnsureKey(identity.NodeKeyFile(two.dir())); err != nil {
		t.Fatal(err)
	}
	two.prepare(true)
	admission, err := one.store.Admit(t.Context(), two.node, []netip.AddrPort{two.at})
	if err != nil {
		t.Fatal(err)
	}
	two.join = &admission
	stopTwo = two.start()
	two.join = nil
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		members, err := two.store.Members(t.Context())
		if err == nil && len(members) == 2 && !members[0].Learner && !members[1].Learner {
			return one, two, stopOne, stopTwo
		}
		if time.Now().After(deadline) {
			t.Fatalf("%+v, %v", members, err)
		}
	}
}

func leaseValue(t *testing.T, holder string, renewed time.Time) string {
	t.Helper()
	lease := coordinationv1.Lease{ObjectMeta: metav1.ObjectMeta{Namespace: "kube-node-lease", Name: holder}, Spec: coordinationv1.LeaseSpec{
		HolderIdentity: &holder,
	}}
	if !renewed.IsZero() {
		lease.Spec.RenewTime = &metav1.MicroTime{Time: renewed}
	}
	raw, err := lease.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data, err := (&runtime.Unknown{Raw: raw}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return "k8s\x00" + string(data)
}

// TestRecovery: one of two servers is gone. The other one is refused while that answers or is newer, and then serves alone, with
// everything that it has, higher revisions, and its old state beside.
func TestRecovery(t *testing.T) {
	one, two, stopOne, stopTwo := newPair(t)
	renewed := time.Date(2026, 11, 29, 12, 0, 0, 0, time.UTC)
	for _, name := range []string{"one", "two"} {
		two.put(leasePrefix+"kube-node-lease/"+name, leaseValue(t, name, renewed))
		renewed = renewed.Add(time.Second)
	}
	two.put(leasePrefix+"kube-system/addresses", leaseValue(t, "three", time.Time{})) // it is not renewed
	last := two.put("/a", "then")
	stopOne()
	stopTwo()
	r := Recovery{DataDir: two.dataDir, Node: two.node, Log: quiet}
	before := two.tree()
	state, err := r.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(state.Members) != 2 || state.Members[0].Answers.IsValid() || state.Members[1].Answers.IsValid() || state.NotAsked != "" || state.Revision < last {
		t.Errorf("state %+v after revision %d", state, last)
	}
	if state.Lease == nil || state.Lease.Holder != "two" || state.Lease.Name != "kube-node-lease/two" || !state.Lease.Renewed.Equal(renewed.Add(-time.Second)) {
		t.Errorf("lease %+v", state.Lease)
	}

	refused := func(what string, others []survivor.State, want error, text string) {
		t.Helper()
		if _, err := r.Run(t.Context(), others, false); !errors.Is(err, want) || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: %v", what, err)
		}
		if after := two.tree(); after != before {
			t.Errorf("%s has changed\n%s\nto\n%s", what, before, after)
		}
	}
	newer, err := Recovery{DataDir: one.dataDir, Node: one.node, Log: quiet}.Inspect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	newer.LastTerm++
	refused("a newer one", []survivor.State{newer}, survivor.ErrRefused, "--force")
	lock, err := datadir.TryLock(two.dataDir)
	if err != nil {
		t.Fatal(err)
	}
	refused("while it runs", nil, datadir.ErrInUse, "stop it first")
	lock.Close()
	_, stopOne = one.launch() // it waits for its majority
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		state, err := r.Inspect(t.Context())
		if err == nil && (state.Members[0].Answers == one.at || state.Members[1].Answers == one.at) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the other server does not answer: %+v, %v", state, err)
		}
	}
	refused("the other one answers", nil, survivor.ErrRefused, "start kedge here")
	stopOne()

	done, err := r.Run(t.Context(), []survivor.State{newer}, true)
	if err != nil {
		t.Fatal(err)
	}
	if done.Revision <= last || done.NewNode || !strings.HasPrefix(filepath.Base(done.Kept), keptPrefix) {
		t.Errorf("%+v after revision %d", done, last)
	}
	if _, err := os.Stat(filepath.Join(done.Kept, storeFolder, "member", "wal")); err != nil {
		t.Errorf("the old datastore: %v", err)
	}
	for _, name := range two.entries() {
		if name == workFolder || name == newFolder || name == pendingFile {
			t.Errorf("%s is left", name)
		}
	}
	two.prepare(true)
	defer two.start()()
	if got := two.get("/a"); got != "then" {
		t.Errorf("/a is %q", got)
	}
	if members, err := two.store.Members(t.Context()); err != nil || len(members) != 1 {
		t.Errorf("members %+v, %v", members, err)
	}
	if next := two.put("/a", "later"); next <= last {
		t.Errorf("revision %d after %d", next, last)
	}
}

// TestRecoveryKilled kills recoveries at many moments. What is left is the old state or the new one, and the next recovery, or the
// next start, goes on from there.
func TestRecoveryKilled(t *testing.T) {
	_, two, stopOne, stopTwo := newPair(t)
	last := two.put("/a", "then")
	stopOne()
	stopTwo()
	recovered, old := 0, 0
	for i, step := 0, 40*time.Millisecond; recovered == 0 && i < 1000; i++ {
		dir := filepath.Join(t.TempDir(), "data")
		if err := os.CopyFS(dir, os.DirFS(two.dataDir)); err != nil {
			t.Fatal(err)
		}
		child := exec.Command(os.Args[0])
		child.Env = append(os.Environ(), childDir+"="+dir)
		var output bytes.Buffer
		child.Stderr = &output
		if err := child.Start(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 1)
		go func() { done <- child.Wait() }()
		select {
		case err := <-done:
			if err != nil {
				t.Fatalf("%v: %s", err, output.String())
			}
		case <-time.After(time.Duration(i) * step):
			if err := child.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
			<-done
		}
		if err := EndInterrupted(dir); err != nil {
			t.Fatal(err)
		}
		copied := &peer{site: &site{T: t, dataDir: dir, node: "two"}, at: two.at}
		kept, err := filepath.Glob(filepath.Join(dir, keptPrefix+"*", storeFolder, "member"))
		if err != nil {
			t.Fatal(err)
		}
		state, err := datastore.ReadState(filepath.Join(copied.dir(), storeFolder), nil)
		switch {
		case err != nil:
			t.Fatalf("killed after %v: %v", time.Duration(i)*step, err)
		case len(state.Members) == 2 && len(kept) == 0 && state.Revision >= last:
			old++
		case len(state.Members) == 1 && len(kept) == 1 && state.Revision > last:
			recovered++
		default:
			t.Fatalf("killed after %v: %+v, kept %v", time.Duration(i)*step, state, kept)
		}
		for _, name := range copied.entries() {
			if name == workFolder || name == newFolder || name == pendingFile {
				t.Errorf("killed after %v: %s is left", time.Duration(i)*step, name)
			}
		}
	}
	if old == 0 || recovered == 0 {
		t.Errorf("%d kills before the exchange, and %d recoveries", old, recovered)
	}
}

// TestRecoveryOfOne: a server without others has nothing to recover, and a folder that is no server's neither.
func TestRecoveryOfOne(t *testing.T) {
	s := newSite(t, "one")
	stop := s.run()
	s.put("/a", "x")
	stop()
	work := filepath.Join(s.dataDir, workFolder) // of a recovery that was killed
	if err := os.MkdirAll(filepath.Join(work, "store"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := (Recovery{DataDir: s.dataDir, Node: s.node, Log: quiet}).Run(t.Context(), nil, true); !errors.Is(err, survivor.ErrImpossible) {
		t.Errorf("alone: %v", err)
	}
	if _, err := os.Stat(work); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what was left is there: %v", err)
	}
	if _, err := (Recovery{DataDir: t.TempDir(), Node: s.node, Log: quiet}).Inspect(t.Context()); err == nil || !strings.Contains(err.Error(), "--data-dir") {
		t.Errorf("no server: %v", err)
	}
}

// TestSinceWritten: the older of two times counts, and a clock that was set back does not lower the revision.
func TestSinceWritten(t *testing.T) {
	now := time.Now()
	hour, minute, future := now.Add(-time.Hour), now.Add(-time.Minute), now.Add(time.Hour)
	for _, c := range []struct {
		changed time.Time
		lease   *survivor.Lease
		want    int64
	}{
		{hour, nil, 3600},
		{minute, &survivor.Lease{Renewed: hour}, 3600},
		{hour, &survivor.Lease{Renewed: minute}, 3600},
		{future, nil, 0},
	} {
		if got := sinceWritten(survivor.State{Changed: c.changed, Lease: c.lease}, now); got != c.want*writesASecond {
			t.Errorf("%+v: %d", c, got)
		}
	}
}
