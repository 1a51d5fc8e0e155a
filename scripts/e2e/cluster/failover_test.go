package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/namespaces"
	"kedge/scripts/e2e/harness"
)

// stand is a host that passes on connections to the fleet's server: for agents it is
// a server of its own, which can be killed and paused.
type stand struct {
	f    *harness.Fleet
	at   *namespaces.Network
	addr netip.Addr

	gate sync.RWMutex // held while nothing is passed on

	mu    sync.Mutex // guards what follows
	l     net.Listener
	conns map[net.Conn]bool
}

// newStand makes one that works.
func newStand(t *testing.T, f *harness.Fleet) *stand {
	t.Helper()
	s := &stand{f: f, at: f.JoinHost(t), conns: map[net.Conn]bool{}}
	s.addr = netip.AddrFrom4([4]byte{192, 0, 2, f.Joined})
	t.Cleanup(func() { s.at.Close() })
	t.Cleanup(s.kill)
	if err := s.revive(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *stand) url() string { return fmt.Sprintf("https://%s:%d", s.addr, s.f.APIPort) }

// revive makes it take connections.
func (s *stand) revive() error {
	return s.at.Do(func() error {
		l, err := net.Listen("tcp", netip.AddrPortFrom(s.addr, uint16(s.f.APIPort)).String())
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
		to, err = net.Dial("tcp", fmt.Sprintf("192.0.2.1:%d", s.f.APIPort))
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

// standIn makes the cluster's servers known by these addresses only.
func standIn(t *testing.T, f *harness.Fleet, stands ...*stand) {
	t.Helper()
	client := f.Client.DiscoveryV1().EndpointSlices(metav1.NamespaceDefault)
	s, err := client.Get(t.Context(), "kubernetes", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ready := true
	s.Endpoints = nil
	for _, a := range stands {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{Addresses: []string{a.addr.String()}, Conditions: discoveryv1.EndpointConditions{Ready: &ready}})
	}
	if _, err := client.Update(t.Context(), s, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// awaitServers waits until an agent has written down these servers.
func awaitServers(t *testing.T, n *harness.Node, stands ...*stand) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		data, err := os.ReadFile(filepath.Join(n.DataDir(), "agent", "servers.json"))
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

// inUse is the one of two stands through which an agent calls the API, as it says.
func inUse(t *testing.T, n *harness.Node, a, b *stand) (used, other *stand) {
	t.Helper()
	var report struct {
		Components []struct{ Name, Detail string }
	}
	out, _ := n.Run("status", "-o", "json", "--run-dir="+n.RunDir()) // something may be amiss, and is to be
	if err := json.Unmarshal([]byte(out), &report); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	for _, c := range report.Components {
		switch {
		case c.Name != "servers":
		case strings.HasPrefix(c.Detail, a.addr.String()+":"):
			return a, b
		case strings.HasPrefix(c.Detail, b.addr.String()+":"):
			return b, a
		}
	}
	t.Fatalf("it uses neither %s nor %s:\n%s", a.addr, b.addr, out)
	return nil, nil
}

// TestAgentsFailOver: the server that an agent uses dies or hangs, and the agent goes
// on with another, as does what reaches it through its tunnel. Here the servers are
// stands in front of one.
func TestAgentsFailOver(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t, "--tls-san=192.0.2.2,192.0.2.3")
	one, two := newStand(t, f), newStand(t, f)
	standIn(t, f, one, two)
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	a.Flags[0] = "--server=" + one.url()
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	awaitServers(t, a, one, two)
	ns := f.Namespace(t)
	f.Apply(t, ns, harness.Shell("before", "exec sleep 3600", "nodeName: "+a.Name+","))
	f.WaitPod(t, ns, "before", false)

	// works proves that watches of the kubelet and of the network have moved: a pod
	// runs, and a service has it.
	works := func(name string) {
		t.Helper()
		begin := time.Now()
		f.Servers(t, ns, name, 1, "nodeName: "+a.Name+",")
		f.Service(t, ns, name, name, "")
		harness.Eventually(t, 30*time.Second, func() error {
			out, err := f.TryKubectl(nil, "exec", "-n", ns, "before", "--", "probe", "get", "http://"+name+"."+ns+"/")
			if err == nil && strings.TrimSpace(out) != name+"-0" {
				err = fmt.Errorf("it answers %q", out)
			}
			return err
		})
		t.Logf("%s: a new pod answered by its name after %s", name, time.Since(begin).Round(time.Millisecond))
	}
	works("first")
	used, other := inUse(t, a, one, two)

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
		a.Stop(t, syscall.SIGTERM, 15*time.Second)
		a.Flags = a.Flags[:1] // the dead one, and no token
		if err := a.Start(); err != nil {
			t.Fatal(err)
		}
		f.StillRuns(t, ns, "before")
		works("restarted")
		if err := one.revive(); err != nil {
			t.Fatal(err)
		}
	})

	t.Run("servers come and go", func(t *testing.T) {
		three := newStand(t, f)
		standIn(t, f, three)
		awaitServers(t, a, three)
		one.kill()
		two.kill()
		works("another")
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := a.Run("status", "--run-dir="+a.RunDir())
			if err != nil {
				return fmt.Errorf("%w\n%s", err, out)
			}
			return nil
		})
	})
}

// TestTunnelFigures measures, and fails only when something does not work. It runs
// when asked to: make bench-tunnel.
func TestTunnelFigures(t *testing.T) {
	if os.Getenv("KEDGE_BENCH") == "" {
		t.Skip("takes minutes and measures only: make bench-tunnel")
	}
	f := harness.NewFleet(t, "--tls-san=192.0.2.2,192.0.2.3")
	one, two := newStand(t, f), newStand(t, f)
	a := f.NewAgent(t, "--token="+f.NewToken(t))
	if err := harness.PrepareImages(a.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	ns := f.Namespace(t)
	nodes := map[string]*harness.Node{"on-server": f.Node, "on-agent": a}
	const size = 256 << 20
	for name, on := range nodes {
		f.Apply(t, ns, harness.Shell(name, fmt.Sprintf("mkdir /www; dd if=/dev/zero of=/www/big bs=1048576 count=%d 2>/dev/null; exec httpd -f -p 8080 -h /www", size>>20), "nodeName: "+on.Name+","))
	}
	for _, name := range []string{"on-server", "on-agent"} {
		pod := f.WaitPod(t, ns, name, false)
		read := func(url string) float64 {
			var best time.Duration
			for range 5 {
				harness.Eventually(t, 20*time.Second, func() error {
					begin := time.Now()
					n, err := readAll(f, url)
					if err != nil || n != size {
						return fmt.Errorf("%d bytes of %s: %w", n, url, err)
					}
					if took := time.Since(begin); best == 0 || took < best {
						best = took
					}
					return nil
				})
			}
			return size / best.Seconds() / 1e6
		}
		t.Logf("%s: %.0f MB/s by the pod's address", name, read(fmt.Sprintf("http://%s:8080/big", pod.Status.PodIP)))
		t.Logf("%s: %.0f MB/s by kubectl port-forward", name, read(forward(t, f, ns, "pod/"+name, 8080)+"big"))
		t.Logf("%s: %.0f MB/s by kubectl exec cat", name, func() float64 {
			begin := time.Now()
			out := f.Kubectl(t, "exec", "-n", ns, name, "--", "cat", "/www/big")
			return float64(len(out)) / time.Since(begin).Seconds() / 1e6
		}())
		var took []time.Duration
		for range 20 {
			begin := time.Now()
			f.Kubectl(t, "exec", "-n", ns, name, "--", "true")
			took = append(took, time.Since(begin))
		}
		t.Logf("%s: kubectl exec true takes %s", name, spread(took))
	}

	// From here on the agent knows the server by the stands only.
	standIn(t, f, one, two)
	awaitServers(t, a, one, two)
	a.Stop(t, syscall.SIGTERM, 15*time.Second)
	a.Flags = []string{"--server=" + one.url()}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	t.Logf("status:\n%s", func() string { out, _ := a.Run("status", "--run-dir="+a.RunDir()); return out }())
	// seen is how long it takes until the agent's kubelet has seen a new pod.
	count := 0
	seen := func() time.Duration {
		count++
		name := fmt.Sprint("seen-", count)
		begin := time.Now()
		f.Apply(t, ns, harness.Shell(name, "exec sleep 3600", "nodeName: "+a.Name+","))
		for {
			pod, err := f.Pod(ns, name)
			if err != nil {
				t.Fatal(err)
			}
			if pod.Status.StartTime != nil {
				took := time.Since(begin)
				f.Kubectl(t, "delete", "pod", "-n", ns, name, "--grace-period=0", "--force", "--wait=false")
				return took
			}
			if time.Since(begin) > time.Minute {
				t.Fatalf("%s is not seen after %s", name, time.Since(begin))
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	var undisturbed, killed, paused []time.Duration
	for range 10 {
		undisturbed = append(undisturbed, seen())
	}
	for range 20 {
		used, _ := inUse(t, a, one, two)
		used.kill()
		killed = append(killed, seen())
		if err := used.revive(); err != nil {
			t.Fatal(err)
		}
		used, _ = inUse(t, a, one, two)
		used.gate.Lock()
		paused = append(paused, seen())
		used.gate.Unlock()
	}
	t.Logf("a new pod is seen by the agent's kubelet after %s", spread(undisturbed))
	t.Logf("when its server was killed: %s", spread(killed))
	t.Logf("when its server hangs: %s", spread(paused))
}

// spread is the median and the largest.
func spread(d []time.Duration) string {
	slices.Sort(d)
	return fmt.Sprintf("%s, at most %s (%d times)", d[len(d)/2].Round(time.Millisecond), d[len(d)-1].Round(time.Millisecond), len(d))
}

// readAll reads a URL from the server's host and returns how many bytes came.
func readAll(f *harness.Fleet, url string) (int64, error) {
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true, DialContext: func(_ context.Context, network, address string) (net.Conn, error) { return f.Dial(network, address) },
	}}
	resp, err := client.Get(url)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	return io.Copy(io.Discard, resp.Body)
}
