package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/netns"
)

// stand is a host that passes on connections to the fleet's server: for agents it is
// a server of its own, which can be killed and paused.
type stand struct {
	f    *fleet
	at   *netns.NS
	addr netip.Addr

	gate sync.RWMutex // held while nothing is passed on

	mu    sync.Mutex // guards what follows
	l     net.Listener
	conns map[net.Conn]bool
	moved int64 // bytes that were passed on
}

// newStand makes one that works.
func (f *fleet) newStand(t *testing.T) *stand {
	t.Helper()
	s := &stand{f: f, at: f.host(t), conns: map[net.Conn]bool{}}
	s.addr = netip.AddrFrom4([4]byte{192, 0, 2, f.joined})
	t.Cleanup(func() { s.at.Close() })
	t.Cleanup(s.kill)
	if err := s.revive(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *stand) url() string { return fmt.Sprintf("https://%s:%d", s.addr, s.f.apiPort) }

// revive makes it take connections.
func (s *stand) revive() error {
	return s.at.Do(func() error {
		l, err := net.Listen("tcp", netip.AddrPortFrom(s.addr, uint16(s.f.apiPort)).String())
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.l = l
		s.mu.Unlock()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go s.pass(c)
			}
		}()
		return nil
	})
}

func (s *stand) pass(c net.Conn) {
	var to net.Conn
	err := s.at.Do(func() (err error) {
		to, err = net.Dial("tcp", fmt.Sprintf("192.0.2.1:%d", s.f.apiPort))
		return err
	})
	if err != nil {
		c.Close()
		return
	}
	s.mu.Lock()
	s.conns[c], s.conns[to] = true, true
	s.mu.Unlock()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{c, to}, {to, c}} {
		both.Go(func() {
			defer way[0].Close()
			defer way[1].Close()
			_, _ = io.Copy(gated{s, way[1]}, struct{ io.Reader }{way[0]})
		})
	}
	both.Wait()
	s.mu.Lock()
	delete(s.conns, c)
	delete(s.conns, to)
	s.mu.Unlock()
}

// gated waits while the stand is paused.
type gated struct {
	s *stand
	w io.Writer
}

func (g gated) Write(b []byte) (int, error) {
	g.s.gate.RLock()
	defer g.s.gate.RUnlock()
	g.s.mu.Lock()
	g.s.moved += int64(len(b))
	g.s.mu.Unlock()
	return g.w.Write(b)
}

// kill ends it as a crash of the machine's process does.
func (s *stand) kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.l.Close()
	for c := range s.conns {
		c.Close()
	}
}

// busy is how many bytes it passes on while f runs.
func (s *stand) busy(f func()) int64 {
	s.mu.Lock()
	before := s.moved
	s.mu.Unlock()
	f()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.moved - before
}

// standIn makes the cluster's servers known by these addresses only.
func (f *fleet) standIn(t *testing.T, stands ...*stand) {
	t.Helper()
	slices := f.client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	s, err := slices.Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ready := true
	s.Endpoints = nil
	for _, a := range stands {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.addr.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	if _, err := slices.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// knows waits until an agent has written down these servers.
func (n *node) knows(t *testing.T, stands ...*stand) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		data, err := os.ReadFile(filepath.Join(n.dataDir(), "agent", "servers.json"))
		if err != nil {
			return err
		}
		for _, s := range stands {
			if !strings.Contains(string(data), `"`+s.url()+`"`) {
				return fmt.Errorf("%s is not among %s", s.url(), data)
			}
		}
		if got := strings.Count(string(data), "https://"); got != len(stands) {
			return fmt.Errorf("%s are %d, want %d", data, got, len(stands))
		}
		return nil
	})
}

// inUse is the one of two stands through which an agent's kubelet calls the API.
func (n *node) inUse(t *testing.T, a, b *stand) (used, other *stand) {
	t.Helper()
	count := func(s *stand) int64 {
		return s.busy(func() { // tunnels and probes are there too, but say little
			for range 20 {
				if out, err := n.run("status", "--run-dir="+n.runDir()); err != nil {
					t.Fatalf("%v\n%s", err, out)
				}
			}
		})
	}
	if count(a) > count(b) {
		return a, b
	}
	return b, a
}

// TestAgentsFailOver: the server that an agent uses dies or hangs, and the agent goes
// on with another, as does what reaches it through its tunnel. Here the servers are
// stands in front of one.
func TestAgentsFailOver(t *testing.T) {
	t.Parallel()
	f := newFleet(t, "--tls-san=192.0.2.2,192.0.2.3")
	one, two := f.newStand(t), f.newStand(t)
	f.standIn(t, one, two)
	a := f.newAgent(t, "--token="+f.token(t))
	a.flags[0] = "--server=" + one.url()
	if err := prepareImages(a.dataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.start(); err != nil {
		t.Fatal(err)
	}
	a.knows(t, one, two)
	ns := f.namespace(t)
	f.apply(t, ns, shell("before", "exec sleep 3600", "nodeName: "+a.name+","))
	f.waitPod(t, ns, "before", false)

	// works proves that watches of the kubelet and of the network have moved: a pod
	// runs, and a service has it.
	works := func(name string) {
		t.Helper()
		begin := time.Now()
		f.servers(t, ns, name, 1, "nodeName: "+a.name+",")
		f.service(t, ns, name, name, "")
		eventually(t, 30*time.Second, func() error {
			out, err := f.tryKubectl(nil, "exec", "-n", ns, "before", "--", "probe", "get", "http://"+name+"."+ns+"/")
			if err == nil && strings.TrimSpace(out) != name+"-0" {
				err = fmt.Errorf("it answers %q", out)
			}
			return err
		})
		t.Logf("%s: a new pod answered by its name after %s", name, time.Since(begin).Round(time.Millisecond))
	}
	works("first")
	used, other := a.inUse(t, one, two)

	t.Run("killed", func(t *testing.T) {
		used.kill()
		works("killed")
		if err := used.revive(); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("paused", func(t *testing.T) {
		other.gate.Lock()
		works("paused")
		other.gate.Unlock()
	})

	t.Run("a start while the named server is dead", func(t *testing.T) {
		one.kill()
		a.stop(t, syscall.SIGTERM, 15*time.Second)
		a.flags = a.flags[:1] // the dead one, and no token
		if err := a.start(); err != nil {
			t.Fatal(err)
		}
		f.stillRuns(t, ns, "before")
		works("restarted")
		if err := one.revive(); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("servers come and go", func(t *testing.T) {
		three := f.newStand(t)
		f.standIn(t, three)
		a.knows(t, three)
		one.kill()
		two.kill()
		works("another")
	})

	// A session through each of the servers that there are, and none too many.
	eventually(t, 20*time.Second, func() error {
		out, err := a.run("status", "--run-dir="+a.runDir())
		if err != nil {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
}
