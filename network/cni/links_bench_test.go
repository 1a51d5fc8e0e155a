package cni

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/network/nft"
	"kedge/network/nft/pods"
)

// The benchmarks for docs/decisions/pod-links.md compare two ways to connect pods to their
// node, side by side in one run:
//
//	go test -run '^$' -bench PodLink ./network/cni

// wiring is a way to connect pods.
type wiring struct {
	name string
	// prepare makes the node ready and returns how to add and remove pod i.
	prepare func(b *testing.B) (add func(i int, ns *namespaces.Network) error, remove func(i int) error)
}

var wirings = []wiring{
	{"routed", prepareRouted},
	{"bridge", func(b *testing.B) (func(int, *namespaces.Network) error, func(int) error) {
		return prepareBridge(b, "0")
	}},
	// A bridge needs this as soon as there are services or policies: packets between pods
	// of one node must pass the rules.
	{"bridge-filtered", func(b *testing.B) (func(int, *namespaces.Network) error, func(int) error) {
		return prepareBridge(b, "1")
	}},
}

func podIP(i int) netip.Addr { return netip.AddrFrom4([4]byte{10, 42, 0, byte(2 + i)}) }

var benchGateway = netip.MustParseAddr("10.42.0.1")

func benchRules(b *testing.B, prefix string) {
	b.Helper()
	table := pods.NewTable("bench")
	err := table.Set(pods.Rules{
		LinkPrefix: prefix,
		PodRanges:  []netip.Prefix{netip.MustParsePrefix("10.42.0.0/24")},
		Inside:     []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")},
	})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { nft.RemoveTables("bench") })
}

func prepareRouted(b *testing.B) (func(int, *namespaces.Network) error, func(int) error) {
	prefix := LinkPrefix("bench")
	benchRules(b, prefix)
	attach := func(i int) *attachment {
		own := owner(fmt.Sprint(i), "eth0")
		return &attachment{
			host: linkName(prefix, own), pod: "eth0", alias: alias("bench", own), mtu: 1500,
			hostHW: hardwareAddr("n" + own), podHW: hardwareAddr("p" + own),
			addrs: []podAddr{{podIP(i), benchGateway}},
		}
	}
	return func(i int, ns *namespaces.Network) error { return attach(i).connect(ns) },
		func(i int) error {
			h, err := routeSocket()
			if err != nil {
				return err
			}
			defer h.Close()
			return removeLink(h, attach(i).host)
		}
}

func prepareBridge(b *testing.B, filtered string) (func(int, *namespaces.Network) error, func(int) error) {
	benchRules(b, "br0")
	if err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-iptables", []byte(filtered), 0); err != nil && filtered == "1" {
		b.Skipf("needs the kernel's bridge filter: %v", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "br0"
	attrs.HardwareAddr = hardwareAddr("br0")
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	must := func(err error) {
		if err != nil {
			b.Helper()
			b.Fatal(err)
		}
	}
	must(netlink.LinkAdd(bridge))
	b.Cleanup(func() { netlink.LinkDel(bridge) })
	must(netlink.AddrAdd(bridge, &netlink.Addr{IPNet: &net.IPNet{IP: benchGateway.AsSlice(), Mask: net.CIDRMask(24, 32)}}))
	must(netlink.LinkSetUp(bridge))
	name := func(i int) string { return fmt.Sprintf("brpod%d", i) }
	add := func(i int, ns *namespaces.Network) error {
		node, err := routeSocket()
		if err != nil {
			return err
		}
		defer node.Close()
		var pod *netlink.Handle
		if err := ns.Do(func() (err error) { pod, err = routeSocket(); return err }); err != nil {
			return err
		}
		defer pod.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name, attrs.MasterIndex, attrs.HardwareAddr = name(i), bridge.Attrs().Index, hardwareAddr(name(i))
		pair := netlink.NewVeth(attrs)
		pair.PeerName, pair.PeerNamespace, pair.PeerHardwareAddr = "eth0", netlink.NsFd(ns.FD()), hardwareAddr("p"+name(i))
		if err := node.LinkAdd(pair); err != nil {
			return err
		}
		if err := node.LinkSetHairpin(pair, true); err != nil { // as every bridge plugin for Kubernetes does
			return err
		}
		if err := node.LinkSetUp(pair); err != nil {
			return err
		}
		eth0, err := pod.LinkByName("eth0")
		if err != nil {
			return err
		}
		lo, err := pod.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := pod.LinkSetUp(lo); err != nil {
			return err
		}
		if err := pod.LinkSetUp(eth0); err != nil {
			return err
		}
		if err := pod.AddrAdd(eth0, &netlink.Addr{IPNet: &net.IPNet{IP: podIP(i).AsSlice(), Mask: net.CIDRMask(24, 32)}}); err != nil {
			return err
		}
		return pod.RouteReplace(defaultRoute(eth0.Attrs().Index, benchGateway))
	}
	return add, func(i int) error {
		h, err := routeSocket()
		if err != nil {
			return err
		}
		defer h.Close()
		return removeLink(h, name(i))
	}
}

func eachWiring(b *testing.B, run func(b *testing.B, w wiring)) {
	host.RequireIsolation(b)
	if err := os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0); err != nil {
		b.Fatal(err)
	}
	for _, w := range wirings {
		b.Run(w.name, func(b *testing.B) { run(b, w) })
	}
}

// BenchmarkPodLinkSetup measures making and removing the link of one pod beside
// 50 others, and the time until the first answer from the node.
func BenchmarkPodLinkSetup(b *testing.B) {
	eachWiring(b, func(b *testing.B, w wiring) {
		add, remove := w.prepare(b)
		for i := range 50 {
			ns, err := namespaces.NewNetwork()
			if err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { ns.Close() })
			if err := add(i, ns); err != nil {
				b.Fatal(err)
			}
			b.Cleanup(func() { remove(i) })
		}
		var adds, firsts, removes []time.Duration
		for b.Loop() {
			ns, err := namespaces.NewNetwork()
			if err != nil {
				b.Fatal(err)
			}
			start := time.Now()
			if err := add(50, ns); err != nil {
				b.Fatal(err)
			}
			adds = append(adds, time.Since(start))
			// A refused connection is an answer.
			conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(podIP(50), 80).String(), 5*time.Second)
			if err == nil {
				conn.Close()
			}
			firsts = append(firsts, time.Since(start))
			start = time.Now()
			if err := remove(50); err != nil {
				b.Fatal(err)
			}
			removes = append(removes, time.Since(start))
			ns.Close()
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(float64(median(adds).Microseconds()), "µs-add")
		b.ReportMetric(float64(median(firsts).Microseconds()), "µs-first-answer")
		b.ReportMetric(float64(median(removes).Microseconds()), "µs-remove")
	})
}

// twoPods joins two pods and returns their namespaces.
func twoPods(b *testing.B, w wiring) [2]*namespaces.Network {
	add, remove := w.prepare(b)
	var pods [2]*namespaces.Network
	for i := range pods {
		ns, err := namespaces.NewNetwork()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { ns.Close() })
		if err := add(i, ns); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { remove(i) })
		pods[i] = ns
	}
	return pods
}

// BenchmarkPodLinkThroughput sends one TCP stream from pod to pod.
func BenchmarkPodLinkThroughput(b *testing.B) {
	eachWiring(b, func(b *testing.B, w wiring) {
		pods := twoPods(b, w)
		in, out := connect(b, pods)
		const chunk = 1 << 20
		b.SetBytes(chunk)
		go io.Copy(io.Discard, struct{ io.Reader }{in})
		buf := make([]byte, chunk)
		for b.Loop() {
			if _, err := out.Write(buf); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkPodLinkLatency bounces one byte between two pods over TCP.
func BenchmarkPodLinkLatency(b *testing.B) {
	eachWiring(b, func(b *testing.B, w wiring) {
		pods := twoPods(b, w)
		in, out := connect(b, pods)
		go io.Copy(struct{ io.Writer }{in}, struct{ io.Reader }{in})
		buf := make([]byte, 1)
		var times []time.Duration
		for b.Loop() {
			start := time.Now()
			if _, err := out.Write(buf); err != nil {
				b.Fatal(err)
			}
			if _, err := io.ReadFull(out, buf); err != nil {
				b.Fatal(err)
			}
			times = append(times, time.Since(start))
		}
		b.ReportMetric(float64(median(times).Nanoseconds())/1000, "µs-p50")
		b.ReportMetric(float64(times[len(times)*99/100].Nanoseconds())/1000, "µs-p99")
	})
}

func connect(b *testing.B, pods [2]*namespaces.Network) (server, client net.Conn) {
	b.Helper()
	place := netip.AddrPortFrom(podIP(1), 80).String()
	var l net.Listener
	err := pods[1].Do(func() (err error) { l, err = net.Listen("tcp", place); return err })
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := l.Accept()
		accepted <- conn
	}()
	err = pods[0].Do(func() (err error) { client, err = net.DialTimeout("tcp", place, 5*time.Second); return err })
	if err != nil {
		b.Fatal(err)
	}
	server = <-accepted
	b.Cleanup(func() { client.Close(); server.Close() })
	return server, client
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
