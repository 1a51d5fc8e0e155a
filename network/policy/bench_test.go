package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"syscall"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/yaml"

	"kedge/internal/test/host"
	"kedge/network/cni"
	"kedge/network/nft"
	"kedge/network/nft/policies"
)

const (
	benchNamespaces = 20
	benchPods       = 500 // all on this node
)

func benchAddr(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 99, byte(i >> 8), byte(i)}) }

// populate makes a cluster of 500 pods in 20 namespaces, and policies, each about
// one pod or two of its namespace, with pods of the same and of other namespaces as
// peers.
func populate(e *engine, policies []*policy) {
	for i := range benchNamespaces {
		e.setNamespace(fmt.Sprint("ns", i), labels.Set{"team": fmt.Sprint("team", i%5)})
	}
	for i := range benchPods {
		addPod(e, i)
	}
	for _, p := range policies {
		e.setPolicy(p.key, p)
	}
}

func benchPolicies(b testing.TB, n int) (out []*policy) {
	for i := range n {
		out = append(out, benchPolicy(b, i, 80))
	}
	return out
}

func addPod(e *engine, i int) {
	key := podKey{fmt.Sprint("ns", i%benchNamespaces), fmt.Sprint("pod", i)}
	addrs := []netip.Addr{benchAddr(i)}
	e.setPod(key, &pod{key: key, uid: key.name, labels: labels.Set{"app": fmt.Sprint("app", i/benchNamespaces)}, addrs: addrs, peer: true})
	e.attach(newAttachment(cni.Attachment{Owner: key.name, Namespace: key.namespace, Name: key.name, UID: key.name, Addrs: addrs}))
}

func benchPolicy(b testing.TB, i, port int) *policy {
	app := func(n int) int { return n % (benchPods / benchNamespaces) }
	np := &networkingv1.NetworkPolicy{}
	err := yaml.Unmarshal(fmt.Appendf(nil, `{metadata: {namespace: ns%d, name: policy%d}, spec: {podSelector: {matchLabels: {app: app%d}}, policyTypes: [Ingress, Egress],
		ingress: [{from: [{podSelector: {matchLabels: {app: app%d}}}, {namespaceSelector: {matchLabels: {team: team%d}}, podSelector: {matchLabels: {app: app%d}}}], ports: [{port: %d}]}],
		egress: [{to: [{namespaceSelector: {matchLabels: {team: team%d}}}], ports: [{port: 443}]}, {to: [{ipBlock: {cidr: 10.%d.0.0/16}}]}]}}`,
		i%benchNamespaces, i, app(i/benchNamespaces), app(i/7), i%5, app(i/3), port, (i+1)%5, i%200), np)
	if err != nil {
		b.Fatal(err)
	}
	p, err := newPolicy(np)
	if err != nil {
		b.Fatal(err)
	}
	return p
}

func benchEngine(b testing.TB, count int) *engine {
	b.Helper()
	host.RequireIsolation(b)
	b.Cleanup(func() { nft.RemoveTables("node1") })
	e := newEngine(policies.NewTable("node1"))
	e.applyAll()
	populate(e, benchPolicies(b, count))
	if err := e.table.Commit(); err != nil {
		b.Fatal(err)
	}
	return e
}

// BenchmarkNewPod is the time from an address to the pod's policies in force.
func BenchmarkNewPod(b *testing.B) {
	for _, policies := range []int{0, 10, 1000} {
		b.Run(fmt.Sprint(policies, "-policies"), func(b *testing.B) {
			e := benchEngine(b, policies)
			i := 0
			for b.Loop() {
				addPod(e, benchPods+i%100)
				if err := e.table.Commit(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				key := podKey{fmt.Sprint("ns", (benchPods+i%100)%benchNamespaces), fmt.Sprint("pod", benchPods+i%100)}
				e.detach(key.name)
				e.setPod(key, nil)
				if err := e.table.Commit(); err != nil {
					b.Fatal(err)
				}
				i++
				b.StartTimer()
			}
		})
	}
}

// BenchmarkPolicyChange is the time from a change of one policy to its being in force.
func BenchmarkPolicyChange(b *testing.B) {
	for _, policies := range []int{10, 1000} {
		b.Run(fmt.Sprint(policies, "-policies"), func(b *testing.B) {
			e := benchEngine(b, policies)
			versions := []*policy{benchPolicy(b, 3, 81), benchPolicy(b, 3, 80)}
			i := 0
			for b.Loop() {
				e.setPolicy(podKey{"ns3", "policy3"}, versions[i%2])
				if err := e.table.Commit(); err != nil {
					b.Fatal(err)
				}
				i++
				b.StopTimer()
				time.Sleep(50 * time.Millisecond) // the kernel clears away what was before
				b.StartTimer()
			}
		})
	}
}

// BenchmarkStart is the start of a process with 1,000 policies and 500 pods: the first
// start, and another one with the content in the kernel already. It reports the memory that
// stays in use.
func BenchmarkStart(b *testing.B) {
	for _, restart := range []bool{false, true} {
		b.Run(map[bool]string{false: "first", true: "again"}[restart], func(b *testing.B) {
			keep := benchEngine(b, 1000)
			var before, after runtime.MemStats
			for b.Loop() {
				b.StopTimer()
				if !restart {
					if err := policies.RemoveTable("node1"); err != nil {
						b.Fatal(err)
					}
				}
				all := benchPolicies(b, 1000)
				runtime.GC()
				runtime.ReadMemStats(&before)
				b.StartTimer()
				e := newEngine(policies.NewTable("node1"))
				populate(e, all)
				e.applyAll()
				if err := e.table.Commit(); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				runtime.GC()
				runtime.ReadMemStats(&after)
				runtime.KeepAlive(e)
				b.StartTimer()
			}
			runtime.KeepAlive(keep)
			b.ReportMetric(float64(after.HeapAlloc-before.HeapAlloc)/1e6, "MB")
		})
	}
}

// benchCases are the pods between which packets are sent, and the policies.
var benchCases = []struct {
	name     string
	policies int // about other pods
	own      int // about the two, all but the last of no use
}{
	{"no-policies", 0, 0},
	{"10-about-others", 10, 0},
	{"1000-about-others", 1000, 0},
	{"1-about-these", 0, 1},
	{"1000-about-others-1-about-these", 1000, 1},
	{"10-about-these", 0, 10},
	{"100-about-these", 0, 100},
}

func benchPath(b *testing.B, run func(b *testing.B, s *station, client, server netip.Addr)) {
	for n, c := range benchCases {
		b.Run(c.name, func(b *testing.B) {
			s := &station{newLab(b), benchEngine(b, c.policies)}
			// Other addresses each time: those before are still being tracked.
			client, server := podAddr(2*n, false), podAddr(2*n+1, false)
			s.pod(2*n, "a")
			s.pod(2*n+1, "b")
			// On a node connections are tracked whether there are policies or not.
			s.translate(netip.MustParseAddr("10.43.0.99"), server, false)
			for i := range c.own {
				port := 1000 + i
				if i == c.own-1 {
					port = 80
				}
				s.policy(fmt.Sprintf("own%03d", i), fmt.Sprintf(`podSelector: {}, policyTypes: [Ingress, Egress],
					ingress: [{from: [{podSelector: {}}], ports: [{port: %d, protocol: UDP}, {port: %[1]d}]}],
					egress: [{to: [{podSelector: {}}], ports: [{port: %[1]d, protocol: UDP}, {port: %[1]d}]}]`, port))
			}
			run(b, s, client, server)
		})
	}
}

// BenchmarkRoundTrip is a datagram and its answer between two pods that know each
// other: four times through the rules of a connection.
func BenchmarkRoundTrip(b *testing.B) {
	benchPath(b, func(b *testing.B, s *station, from, to netip.Addr) {
		var server, client net.PacketConn
		addr := net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 80))
		s.must(s.pods[to].Do(func() (err error) { server, err = net.ListenUDP("udp", addr); return err }))
		defer server.Close()
		s.must(s.pods[from].Do(func() (err error) { client, err = net.ListenUDP("udp", nil); return err }))
		defer client.Close()
		go func() {
			buf := make([]byte, 100)
			for {
				n, from, err := server.ReadFrom(buf)
				if err != nil {
					return
				}
				server.WriteTo(buf[:n], from)
			}
		}()
		buf := make([]byte, 100)
		for b.Loop() {
			client.SetDeadline(time.Now().Add(time.Second))
			if _, err := client.WriteTo(buf[:10], addr); err != nil {
				b.Fatal(err)
			}
			if _, _, err := client.ReadFrom(buf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkConnect opens a TCP connection from pod to pod, and ends it.
func BenchmarkConnect(b *testing.B) {
	benchPath(b, func(b *testing.B, s *station, from, to netip.Addr) {
		var l net.Listener
		addr := netip.AddrPortFrom(to, 80).String()
		s.must(s.pods[to].Do(func() (err error) { l, err = net.Listen("tcp", addr); return err }))
		defer l.Close()
		go func() {
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				conn.(*net.TCPConn).SetLinger(0) // no ports in TIME_WAIT
				conn.Close()
			}
		}()
		s.must(s.pods[from].Do(func() error {
			for b.Loop() {
				conn, err := net.DialTimeout("tcp", addr, 5*time.Second)
				if errors.Is(err, syscall.ECONNRESET) {
					continue // made, and ended by the other side at once
				}
				if err != nil {
					return err
				}
				conn.(*net.TCPConn).SetLinger(0)
				conn.Close()
			}
			return nil
		}))
	})
}
