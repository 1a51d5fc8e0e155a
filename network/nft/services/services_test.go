package services

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	testhost "kedge/internal/test/host"
	"kedge/network/nft"
)

func sampleConfig() Config {
	return Config{
		LinkPrefix: "kdgtest", ForeignPrefix: "kdg",
		ClusterRanges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd42::/56")},
		ServiceRanges: []netip.Prefix{netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd43::/112")},
		NodePortsOn:   []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("::/0")},
		Own:           []netip.Addr{netip.MustParseAddr("10.43.0.10")},
		Scheduler:     Random,
	}
}

func TestKeepPlaces(t *testing.T) {
	list := func(names string) (out []netip.AddrPort) {
		for _, c := range names {
			out = append(out, netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), uint16(c)))
		}
		return out
	}
	for _, c := range []struct{ old, next, want string }{
		{"", "abc", "abc"},
		{"abc", "abc", "abc"},
		{"abc", "bc", "cb"}, // c takes the place of a
		{"abc", "ac", "ac"},
		{"abc", "acd", "adc"},
		{"abc", "abcd", "abcd"},
		{"abc", "", ""},
		{"abc", "xyz", "xyz"},
		{"aa", "aa", "aa"},
	} {
		if got := keepIndexes(list(c.old), list(c.next)); !slices.Equal(got, list(c.want)) {
			t.Errorf("keepPlaces(%s, %s) = %v", c.old, c.next, got)
		}
	}
}

func TestOutermost(t *testing.T) {
	var in []netip.Prefix
	for s := range strings.FieldsSeq("10.1.2.3/24 10.0.0.0/8 10.0.0.0/8 192.0.2.7/32 fd00::/8") {
		in = append(in, netip.MustParsePrefix(s))
	}
	if got := fmt.Sprint(outermost(in, v4)); got != "[10.0.0.0/8 192.0.2.7/32]" {
		t.Errorf("IPv4: %s", got)
	}
	if got := fmt.Sprint(outermost(in, v6)); got != "[fd00::/8]" {
		t.Errorf("IPv6: %s", got)
	}
	for _, c := range []struct{ prefix, first, last string }{
		{"10.0.0.0/8", "10.0.0.0", "10.255.255.255"},
		{"192.0.2.7/32", "192.0.2.7", "192.0.2.7"},
		{"fd00::/120", "fd00::", "fd00::ff"},
	} {
		first, last := bounds(netip.MustParsePrefix(c.prefix))
		if first.String() != c.first || last.String() != c.last {
			t.Errorf("bounds(%s) = %s, %s", c.prefix, first, last)
		}
	}
}

// TestClasses has the table of the behaviour of upstream's proxies, by traffic policy and
// by the location of endpoints.
func TestClasses(t *testing.T) {
	a, b := netip.MustParseAddrPort("10.42.0.1:80"), netip.MustParseAddrPort("10.42.0.2:80")
	for _, c := range []struct {
		name                         string
		ready                        bool
		internalLocal, externalLocal bool
		cluster, local               []netip.AddrPort
		internal, external, nodePort string
	}{
		{name: "no endpoints", internal: "reject-4", external: "reject-4", nodePort: "reject-4"},
		{name: "no endpoints, local policies", internalLocal: true, externalLocal: true, internal: "reject-4", external: "reject-4", nodePort: "reject-4"},
		{name: "two", ready: true, cluster: []netip.AddrPort{a, b}, internal: "cluster.c2-4", external: "cluster.c2-4", nodePort: "node-port-cluster.c2-4"},
		{name: "external local, one here", ready: true, externalLocal: true, cluster: []netip.AddrPort{a, b}, local: []netip.AddrPort{a},
			internal: "cluster.c2-4", external: "external-local.c2.l1-4", nodePort: "node-port-external-local.c2.l1-4"},
		{name: "external local, none here", ready: true, externalLocal: true, cluster: []netip.AddrPort{a, b},
			internal: "cluster.c2-4", external: "external-local.c2-4", nodePort: "node-port-external-local.c2-4"},
		{name: "internal local, one here", ready: true, internalLocal: true, cluster: []netip.AddrPort{a, b}, local: []netip.AddrPort{a},
			internal: "local.l1-4", external: "cluster.c2-4", nodePort: "node-port-cluster.c2-4"},
		{name: "internal local, none here", ready: true, internalLocal: true, cluster: []netip.AddrPort{a, b},
			internal: "drop-4", external: "cluster.c2-4", nodePort: "node-port-cluster.c2-4"},
		{name: "both local, none anywhere usable", ready: true, internalLocal: true, externalLocal: true,
			internal: "drop-4", external: "drop-4", nodePort: "drop-4"},
	} {
		p := Port{ClusterIP: a.Addr(), Ready: c.ready, Cluster: c.cluster, Local: c.local, InternalLocal: c.internalLocal, ExternalLocal: c.externalLocal}
		internal, external := p.classes(Random)
		if internal.chain(v4, byAddress) != c.internal || external.chain(v4, byAddress) != c.external || external.chain(v4, byNodePort) != c.nodePort {
			t.Errorf("%s: %s, %s, %s", c.name, internal.chain(v4, byAddress), external.chain(v4, byAddress), external.chain(v4, byNodePort))
		}
	}
}

// randomService makes a service that uses some of everything.
func randomService(r *rand.Rand, i int) Service {
	var s Service
	for _, is6 := range []bool{false, true} {
		if r.IntN(3) == 0 {
			continue
		}
		addr := func(v4 string, v6 string, n int) netip.Addr {
			a := netip.MustParseAddr(v4)
			if is6 {
				a = netip.MustParseAddr(v6)
			}
			for range n {
				a = a.Next()
			}
			return a
		}
		p := Port{
			Name: "p", ClusterIP: addr("10.43.1.0", "fd43::100", i), Port: 80,
			Protocol:      []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP}[r.IntN(3)],
			InternalLocal: r.IntN(4) == 0, ExternalLocal: r.IntN(3) == 0,
		}
		for n := range r.IntN(5) {
			e := netip.AddrPortFrom(addr("10.42.0.0", "fd42::", r.IntN(12)), uint16(8000+n))
			p.Ready = true
			p.Cluster = append(p.Cluster, e)
			if r.IntN(2) == 0 {
				p.Local = append(p.Local, e)
				if !slices.Contains(p.OnNode, e.Addr()) {
					p.OnNode = append(p.OnNode, e.Addr())
				}
			}
		}
		if r.IntN(2) == 0 {
			p.NodePort = uint16(30000 + r.IntN(6)) // some of them collide
		}
		for range r.IntN(3) {
			p.LoadBalancerIPs = append(p.LoadBalancerIPs, addr("203.0.113.0", "2001:db8:7::", r.IntN(4)))
		}
		if r.IntN(3) == 0 {
			p.ExternalIPs = append(p.ExternalIPs, addr("203.0.113.0", "2001:db8:7::", r.IntN(4)))
		}
		for range r.IntN(3) {
			p.Sources = append(p.Sources, netip.PrefixFrom(addr("198.51.100.0", "2001:db8::", r.IntN(9)), 24+r.IntN(8)).Masked())
		}
		if r.IntN(3) == 0 {
			p.StickyFor = time.Duration(1+r.IntN(3)) * time.Hour
		}
		s.Ports = append(s.Ports, p)
	}
	return s
}

// TestServicesModel changes services at random. After every change the kernel has the
// wanted content of the table, and the wanted content equals that of a new table.
func TestServicesModel(t *testing.T) {
	for _, scheduler := range []Scheduler{Random, RoundRobin, SourceHash} {
		t.Run(string(scheduler), func(t *testing.T) {
			seed := uint64(time.Now().UnixNano())
			t.Logf("seed %d", seed)
			r := rand.New(rand.NewPCG(seed, 1))
			cfg := sampleConfig()
			cfg.Scheduler = scheduler
			table := newTable(t, cfg)
			clock := time.Now()
			table.now = func() time.Time { return clock }
			all := map[string]Service{}
			for step := range 60 {
				changes := map[string]Service{}
				for range 1 + r.IntN(4) {
					i := r.IntN(20)
					name := fmt.Sprintf("default/s%d", i)
					changes[name] = Service{}
					delete(all, name)
					if r.IntN(4) > 0 {
						changes[name] = randomService(r, i)
						all[name] = changes[name]
					}
				}
				if err := table.Apply(changes); err != nil {
					t.Fatalf("step %d: %v", step, err)
				}
				clock = clock.Add(time.Duration(r.IntN(3)) * time.Second)
				if n, err := table.Repair(); n != 0 || err != nil {
					t.Fatalf("step %d: the kernel has %d differences, %v", step, n, err)
				}
				fresh := NewTable("fresh", cfg)
				fresh.record(all)
				if a, b := withoutPlaces(table), withoutPlaces(fresh); !slices.Equal(a, b) {
					t.Fatalf("step %d: the table wants\n%q, a new one\n%q", step, a, b)
				}
			}
			clock = clock.Add(time.Hour)
			if err := table.Apply(map[string]Service{}); err != nil {
				t.Fatal(err)
			}
			for name := range all {
				all[name] = Service{}
			}
			if err := table.Apply(all); err != nil {
				t.Fatal(err)
			}
			for range 2 { // chains go after their elements
				clock = clock.Add(time.Hour)
				if err := table.Apply(nil); err != nil {
					t.Fatal(err)
				}
			}
			if len(table.want) > 0 || len(table.unused) > 0 || len(table.claims) > 0 || len(table.services) > 0 {
				t.Errorf("left without services: %v, %v, %v, %v", table.want, table.unused, table.claims, table.services)
			}
			have, err := nft.Comments(table.name)
			if err != nil {
				t.Fatal(err)
			}
			if len(have) != len(cfg.chains()) {
				t.Errorf("chains are left: %v", have)
			}
		})
	}
}

// withoutPlaces lists the wanted content of a table without the indexes of endpoints, since
// they depend on earlier changes. The order of endpoints distinguishes chains of services
// with session affinity.
func withoutPlaces(t *Table) []string {
	var out []string
	for r, w := range t.want {
		key := r.key
		if r.set.kind == kindEndpoints || r.set.kind == kindNodeEndpoints || r.set.kind == kindStickyEndpoints {
			end := len(key) - 4
			key = key[:end] + fmt.Sprint(parseNumber(key[end:]) >= localIndexes)
		}
		val := w.val
		if r.set.kind == kindChains {
			val = ""
		}
		out = append(out, fmt.Sprintf("%v %x %x", r.set, key, val))
	}
	slices.Sort(out)
	return out
}

func newTable(t testing.TB, cfg Config) *Table {
	t.Helper()
	testhost.RequireIsolation(t)
	t.Cleanup(func() {
		if err := nft.RemoveTables("node1"); err != nil {
			t.Error(err)
		}
	})
	return NewTable("node1", cfg)
}

// TestOneChangeIsFewElements: the cost of a change must not depend on the number of
// services and endpoints.
func TestOneChangeIsFewElements(t *testing.T) {
	table := NewTable("node1", sampleConfig())
	port := func(i, endpoints int) Port {
		p := Port{ClusterIP: netip.AddrFrom4([4]byte{10, 43, byte(i >> 8), byte(i)}), Protocol: unix.IPPROTO_TCP, Port: 80, Ready: true}
		for n := range endpoints {
			p.Cluster = append(p.Cluster, netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 42, byte(n >> 8), byte(n)}), 8080))
		}
		return p
	}
	changes := map[string]Service{}
	for i := range 1000 {
		changes[fmt.Sprint(i)] = Service{Ports: []Port{port(i, 300)}}
	}
	table.record(changes)
	p := port(7, 300)
	p.Cluster = slices.Delete(p.Cluster, 100, 101)
	d := table.difference(table.record(map[string]Service{"7": {Ports: []Port{p}}}))
	// One endpoint moves, its old place goes, another chain chooses.
	if len(d.remove) > 4 || len(d.add) > 4 || len(d.chains) > 1 {
		t.Errorf("one endpoint less removes %d elements, adds %d, writes %d chains", len(d.remove), len(d.add), len(d.chains))
	}
}

// TestServicesAreListed: the nft program, where there is one, can print the rules.
// Firewalls of hosts list all tables, and its older versions abort on rules that
// the kernel takes.
func TestServicesAreListed(t *testing.T) {
	program, err := exec.LookPath("nft")
	if err != nil {
		t.Skip("needs the program nft")
	}
	for _, scheduler := range []Scheduler{Random, RoundRobin, SourceHash} {
		cfg := sampleConfig()
		cfg.Scheduler = scheduler
		table := newTable(t, cfg)
		changes := map[string]Service{}
		r := rand.New(rand.NewPCG(1, 2))
		for i := range 60 {
			changes[fmt.Sprint("default/s", i)] = randomService(r, i)
		}
		if err := table.Apply(changes); err != nil {
			t.Fatal(err)
		}
		for _, format := range [][]string{{"list", "ruleset"}, {"-j", "list", "ruleset"}} {
			out, err := exec.Command(program, format...).CombinedOutput()
			if err != nil || !bytes.Contains(out, []byte("endpoints-6")) {
				t.Errorf("%s, nft %v: %v: %.500s", scheduler, format, err, out)
			}
		}
		table.Close()
	}
}
