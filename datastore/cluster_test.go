package datastore

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"go.etcd.io/etcd/client/v3/kubernetes"

	"kedge/internal/pki"
)

// testCluster is a cluster of stores in this process, on a testLAN.
type testCluster struct {
	tb    testing.TB
	lan   *testLAN
	ca    *pki.Authority
	nodes map[string]*testNode
}

type testNode struct {
	*Store
	c    *testCluster
	name string
	cfg  Config
	port *testPort

	current atomic.Pointer[Store] // for goroutines besides the test's own

	cancel context.CancelFunc
	ready  chan struct{}
	done   chan struct{}
	err    error // of Run, once done is closed
}

func newTestCluster(tb testing.TB) *testCluster {
	tb.Helper()
	ca, err := pki.EnsureAuthority(tb.TempDir(), "peer-ca", time.Now())
	if err != nil {
		tb.Fatal(err)
	}
	return &testCluster{tb: tb, lan: newTestLAN(tb), ca: ca, nodes: map[string]*testNode{}}
}

// peerConfig returns a configuration with a certificate for one member, and without addresses.
func (c *testCluster) peerConfig(name string) PeerConfig {
	c.tb.Helper()
	leaf := pki.Leaf{CommonName: name, DNSNames: []string{PeerServerName}, Client: true, Server: true}
	pair, err := c.ca.EnsureLeaf(c.tb.TempDir(), "peer", leaf, time.Now())
	if err != nil {
		c.tb.Fatal(err)
	}
	return PeerConfig{Port: freePort(c.tb), CAFile: c.ca.CertFile(), CertFile: pair.CertFile, KeyFile: pair.KeyFile}
}

// node makes a member that is not running.
func (c *testCluster) node(name string) *testNode {
	c.tb.Helper()
	cfg := testConfig(filepath.Join(c.tb.TempDir(), "store"))
	cfg.MemberName = name
	cfg.Peer = c.peerConfig(name)
	cfg.Peer.Addresses = []netip.Addr{netip.MustParseAddr("192.0.2.1")}
	n := &testNode{c: c, name: name, cfg: cfg}
	n.port = c.lan.port(name, netip.AddrPortFrom(cfg.Peer.Addresses[0], cfg.Peer.Port))
	c.nodes[name] = n
	return n
}

// launch starts a store without waiting until it is ready.
func (n *testNode) launch() {
	n.Store = New(n.cfg, testLog(n.c.tb).With("node", n.name))
	n.net = n.port
	n.current.Store(n.Store)
	var ctx context.Context
	ctx, n.cancel = context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan struct{})
	n.ready, n.done = ready, done
	s := n.Store
	go func() {
		defer close(done)
		n.err = s.Run(ctx, func() { close(ready) })
	}()
	n.c.tb.Cleanup(func() { n.stop() })
}

// start starts a store and waits until it is ready.
func (n *testNode) start() *testNode {
	n.c.tb.Helper()
	n.launch()
	n.awaitReady()
	return n
}

func (n *testNode) awaitReady() {
	n.c.tb.Helper()
	select {
	case <-n.ready:
	case <-n.done:
		n.c.tb.Fatalf("%s: Run: %v", n.name, n.err)
	case <-time.After(30 * time.Second):
		n.c.tb.Fatalf("%s is not ready", n.name)
	}
}

// stop stops a store in order.
func (n *testNode) stop() {
	n.c.tb.Helper()
	if n.cancel == nil {
		return
	}
	n.cancel()
	n.cancel = nil
	select {
	case <-n.done:
		if n.err != nil && !errors.Is(n.err, ErrRemoved) {
			n.c.tb.Errorf("%s: Run: %v", n.name, n.err)
		}
	case <-time.After(30 * time.Second):
		n.c.tb.Errorf("%s: Run did not return", n.name)
	}
}

// kill stops a store whose network is cut, so that it cannot hand over.
func (n *testNode) kill() {
	n.c.tb.Helper()
	n.c.lan.isolate(n.name, true)
	n.stop()
	n.c.lan.isolate(n.name, false)
}

// join admits a new member through another one, and starts it.
func (c *testCluster) join(via *testNode, name string) *testNode {
	c.tb.Helper()
	n := c.admit(via, name)
	n.start()
	return n
}

// admit admits a new member and does not start it. It retries, because the leader may change meanwhile on a busy machine.
func (c *testCluster) admit(via *testNode, name string) *testNode {
	c.tb.Helper()
	n := c.node(name)
	c.await("admission", func() error {
		a, err := via.Admit(c.tb.Context(), name, []netip.AddrPort{n.port.at})
		n.cfg.Join = &a
		return err
	})
	return n
}

// grow makes a cluster of the named members, all of which are voters.
func (c *testCluster) grow(names ...string) []*testNode {
	c.tb.Helper()
	nodes := []*testNode{c.node(names[0]).start()}
	for _, name := range names[1:] {
		nodes = append(nodes, c.join(nodes[0], name))
	}
	// Each member must have applied the promotions, or it does not count the new votes after the loss of the leader.
	for _, n := range nodes {
		c.awaitVoters(n, names...)
	}
	return nodes
}

// awaitVoters waits until the voters are exactly the named members.
func (c *testCluster) awaitVoters(via *testNode, names ...string) {
	c.tb.Helper()
	slices.Sort(names)
	c.await("voters "+fmt.Sprint(names), func() error {
		members, err := via.Members(c.tb.Context())
		if err != nil {
			return err
		}
		var voters []string
		for _, m := range members {
			if !m.Learner {
				voters = append(voters, m.Name)
			}
		}
		if !slices.Equal(voters, names) {
			return fmt.Errorf("voters are %v", voters)
		}
		return nil
	})
}

// await waits until check returns nil.
func (c *testCluster) await(what string, check func() error) {
	c.tb.Helper()
	c.awaitFor(what, 30*time.Second, check)
}

func (c *testCluster) awaitFor(what string, limit time.Duration, check func() error) {
	c.tb.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := check()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.tb.Fatalf("%s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// leader waits until one of the nodes leads.
func (c *testCluster) leader(nodes ...*testNode) *testNode {
	c.tb.Helper()
	var leader *testNode
	c.await("a leader", func() error {
		for _, n := range nodes {
			if now, _ := n.Leadership(); now.Leading {
				leader = n
				return nil
			}
		}
		return errors.New("no leader")
	})
	return leader
}

func without(nodes []*testNode, n *testNode) []*testNode {
	return slices.DeleteFunc(slices.Clone(nodes), func(o *testNode) bool { return o == n })
}

func names(nodes []*testNode) []string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.name)
	}
	return out
}

func put(tb testing.TB, n *testNode, key, value string) int64 {
	tb.Helper()
	resp, err := newClient(tb, n.Store).Put(tb.Context(), key, value)
	if err != nil {
		tb.Fatal(err)
	}
	return resp.Header.Revision
}

func get(tb testing.TB, n *testNode, key string) string {
	tb.Helper()
	resp, err := newClient(tb, n.Store).Kubernetes.Get(tb.Context(), key, kubernetes.GetOptions{})
	if err != nil {
		tb.Fatal(err)
	}
	if resp.KV == nil {
		return ""
	}
	return string(resp.KV.Value)
}

func TestStoreAloneListensNowhere(t *testing.T) {
	c := newTestCluster(t)
	n := c.node("a").start()
	select {
	case <-n.mesh.Opened():
		t.Error("a store that stays alone listens")
	default:
	}
	members, err := n.Members(t.Context())
	if err != nil || len(members) != 1 || !members[0].Self || !members[0].Leader || members[0].Name != "a" {
		t.Errorf("members %+v, %v", members, err)
	}
}

func TestStoreGrows(t *testing.T) {
	t.Parallel()
	c := newTestCluster(t)
	nodes := c.grow("a", "b", "c")
	put(t, nodes[2], "/a", "1")
	for _, n := range nodes {
		if got := get(t, n, "/a"); got != "1" {
			t.Errorf("%s has %q", n.name, got)
		}
		if err := n.Check(t.Context()); err != nil {
			t.Errorf("%s: %v", n.name, err)
		}
		members, err := n.Members(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range members {
			if !m.Reachable || !m.Started || m.Learner || len(m.Addresses) != 1 || m.Addresses[0] != c.nodes[m.Name].port.at {
				t.Errorf("%s sees %+v", n.name, m)
			}
		}
	}
	// All members stop, and start again at once.
	for _, n := range nodes {
		n.stop()
	}
	for _, n := range nodes {
		n.cfg.Join = nil
		n.launch()
	}
	for _, n := range nodes {
		n.awaitReady()
		if got := get(t, n, "/a"); got != "1" {
			t.Errorf("%s has %q after the restart", n.name, got)
		}
	}
}
