package network

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
	"kedge/network/nft/services"
)

// named answers connections to a pod with a name.
func (s *serviceWorld) named(p *pod, is6 bool, name string) {
	s.t.Helper()
	var l net.Listener
	s.must(p.ns.Do(func() (err error) { l, err = net.Listen("tcp", at(p.addr(is6), 8080)); return err }))
	s.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(conn, name)
			conn.Close()
		}
	}()
}

// who sends n requests and returns the endpoints that answered, in order.
func (s *serviceWorld) who(n int, do func(func() error) error, addr string) []string {
	s.t.Helper()
	var seen []string
	for range n {
		name, err := s.ask(do, "tcp", addr)
		if err != nil {
			s.t.Errorf("%s: %v", addr, err)
			return seen
		}
		seen = append(seen, name)
	}
	return seen
}

// count returns how often each name is in a list.
func count(names []string) map[string]int {
	n := map[string]int{}
	for _, name := range names {
		n[name]++
	}
	return n
}

// inTurn reports whether every name returns after the same number of others.
func inTurn(names []string, period int) bool {
	for i := period; i < len(names); i++ {
		if names[i] != names[i-period] {
			return false
		}
	}
	return true
}

func (s *serviceWorld) repaired(want int) {
	s.t.Helper()
	if n, err := s.table.Repair(); err != nil || n < want || (want == 0 && n != 0) {
		s.t.Errorf("Repair: %d differences, %v, want %d", n, err, want)
	}
}

func TestServiceSchedulers(t *testing.T) {
	const n = 60
	for _, c := range []struct {
		scheduler services.Scheduler
		good      func(names []string, seen map[string]int) bool
	}{
		{services.Random, func(names []string, seen map[string]int) bool {
			return min(seen["a"], seen["b"], seen["c"]) > 3 && !inTurn(names, 3)
		}},
		{services.RoundRobin, func(names []string, seen map[string]int) bool { return len(seen) == 3 && inTurn(names, 3) }},
		{services.SourceHash, func(_ []string, seen map[string]int) bool { return len(seen) == 1 }},
	} {
		t.Run(string(c.scheduler), func(t *testing.T) {
			both(t, func(t *testing.T, is6 bool) {
				s := newServices(t, func(cfg *services.Config) { cfg.Scheduler = c.scheduler })
				var servers []*pod
				for _, name := range []string{"a", "b", "c"} {
					p := s.pod()
					s.named(p, is6, name)
					servers = append(servers, p)
				}
				p := web(pick(is6, webV4, webV6), servers...)
				p.NodePort = 30080
				s.apply("default/web", p)
				if got := s.who(n, here, at(p.ClusterIP, 80)); !c.good(got, count(got)) {
					t.Errorf("connections to the cluster IP: %v", got)
				}
				if got := s.who(n, s.outside.Do, at(pick(is6, nodeV4, nodeV6).Addr(), 30080)); !c.good(got, count(got)) {
					t.Errorf("connections to the node port: %v", got)
				}
				s.repaired(0)
			})
		})
	}
}

func TestServiceRemembersClients(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client := s.pod()
		servers := map[string]*pod{}
		var list []*pod
		for _, name := range []string{"a", "b", "c", "d"} {
			servers[name] = s.pod()
			s.named(servers[name], is6, name)
			list = append(list, servers[name])
		}
		p := web(pick(is6, webV4, webV6), list...)
		p.StickyFor, p.NodePort = time.Hour, 30080
		p.LoadBalancerIPs = []netip.Addr{pick(is6, balancerV4, balancerV6)}
		s.apply("default/web", p)
		one := func(addrs ...string) string {
			t.Helper()
			seen := map[string]int{}
			for _, a := range addrs {
				for name, n := range count(s.who(8, client.ns.Do, a)) {
					seen[name] += n
				}
			}
			if len(seen) != 1 {
				t.Fatalf("a client was answered by %v", seen)
			}
			for name := range seen {
				return name
			}
			return ""
		}
		addrs := []string{at(p.ClusterIP, 80), at(p.LoadBalancerIPs[0], 80), at(pick(is6, nodeV4, nodeV6).Addr(), 30080)}
		first := one(addrs...)

		// A new process finds the clients of the one before it.
		s.table = services.NewTable(s.cfg.NodeName, s.serviceConfig())
		s.apply("default/web", p)
		if got := one(addrs...); got != first {
			t.Errorf("after a restart %s answers, before it %s did", got, first)
		}

		var rest []*pod
		for name, server := range servers {
			if name != first {
				rest = append(rest, server)
			}
		}
		q := web(p.ClusterIP, rest...)
		q.StickyFor, q.NodePort, q.LoadBalancerIPs = p.StickyFor, p.NodePort, p.LoadBalancerIPs
		s.apply("default/web", q)
		second := one(addrs...)
		if second == first {
			t.Errorf("an endpoint that is gone answers")
		}
		s.apply("default/web", p) // the first one is back: the client stays
		if got := one(addrs...); got != second {
			t.Errorf("%s answers, then %s", second, got)
		}
		s.repaired(0)

		// An entry expires after its timeout, and another endpoint is chosen.
		p.StickyFor = time.Second
		s.apply("default/web", p)
		seen := map[string]bool{}
		for tries := 0; len(seen) < 2 && tries < 12; tries++ {
			seen[one(addrs[0])] = true
			time.Sleep(1100 * time.Millisecond) // the kernel's clock cannot be set
		}
		if len(seen) < 2 {
			t.Error("a client keeps its endpoint longer than it should")
		}
	})
}

func TestServicePodReachesItself(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		pod := s.pod()
		s.serve(pod.ns.Do, "tcp", at(pod.addr(is6), 8080))
		p := web(pick(is6, webV4, webV6), pod)
		p.NodePort, p.LoadBalancerIPs = 30080, []netip.Addr{pick(is6, balancerV4, balancerV6)}
		s.apply("default/web", p)
		for _, a := range []string{at(p.ClusterIP, 80), at(p.LoadBalancerIPs[0], 80), at(pick(is6, nodeV4, nodeV6).Addr(), 30080)} {
			got, err := s.ask(pod.ns.Do, "tcp", a)
			if err != nil || got == pod.addr(is6).String() {
				t.Errorf("%s: seen from %q, %v", a, got, err)
			}
		}
	})
}

// remote is an endpoint elsewhere: the outside host plays it.
func (s *serviceWorld) remote(is6 bool) netip.AddrPort {
	a := netip.AddrPortFrom(pick(is6, outsideV4, outsideV6).Addr(), 8080)
	s.serve(s.outside.Do, "tcp", a.String())
	return a
}

func TestServiceEndpointElsewhere(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client := s.pod()
		p := web(pick(is6, webV4, webV6))
		p.Ready, p.Cluster, p.NodePort = true, []netip.AddrPort{s.remote(is6)}, 30080
		p.LoadBalancerIPs = []netip.Addr{pick(is6, balancerV4, balancerV6)}
		s.apply("default/web", p)
		node := pick(is6, nodeV4, nodeV6).Addr()
		for _, a := range []string{at(p.ClusterIP, 80), at(p.LoadBalancerIPs[0], 80), at(node, 30080)} {
			s.wantSeen("pod", client.ns.Do, "tcp", a, node.String())
			s.wantSeen("node", here, "tcp", a, node.String())
			s.wantSeen("outside", s.outside.Do, "tcp", a, node.String())
		}
	})
}

// TestServicePodOfAnotherNode: a pod of another node that comes through this one's node
// port to an endpoint elsewhere gets its answer through this node again, and one to an
// endpoint here is seen by its own address.
func TestServicePodOfAnotherNode(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		pod := netip.MustParseAddr(pick(is6, "10.42.9.9", "fd42:0:0:9::9"))
		s.must(s.outside.Do(func() error {
			link, err := netlink.LinkByName("uplink")
			if err != nil {
				return err
			}
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: pod.AsSlice(), Mask: net.CIDRMask(pod.BitLen(), pod.BitLen())}, Flags: unix.IFA_F_NODAD}
			return netlink.AddrAdd(link, addr)
		}))
		node := pick(is6, nodeV4, nodeV6).Addr()
		seen := func(what, want string) {
			t.Helper()
			var got []byte
			err := s.outside.Do(func() error {
				d := net.Dialer{LocalAddr: &net.TCPAddr{IP: pod.AsSlice()}, Timeout: 2 * time.Second}
				conn, err := d.Dial("tcp", at(node, 30080))
				if err != nil {
					return err
				}
				defer conn.Close()
				got, err = io.ReadAll(conn)
				return err
			})
			if err != nil || string(got) != want {
				t.Errorf("%s: seen from %q, %v; want %s", what, got, err, want)
			}
		}
		p := web(pick(is6, webV4, webV6))
		p.Ready, p.Cluster, p.NodePort = true, []netip.AddrPort{s.remote(is6)}, 30080
		s.apply("default/web", p)
		seen("endpoint elsewhere", node.String())

		server := s.pod()
		s.serve(server.ns.Do, "tcp", at(server.addr(is6), 8080))
		q := web(p.ClusterIP, server)
		q.NodePort = 30080
		s.apply("default/web", q)
		seen("endpoint here", pod.String())
		s.repaired(0)
	})
}

func TestServiceLocalPolicies(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client, server := s.pod(), s.pod()
		s.serve(server.ns.Do, "tcp", at(server.addr(is6), 8080))
		elsewhere := s.remote(is6)
		node, outside := pick(is6, nodeV4, nodeV6).Addr(), pick(is6, outsideV4, outsideV6).Addr().String()
		p := web(pick(is6, webV4, webV6), server)
		p.Cluster = []netip.AddrPort{elsewhere, elsewhere}
		p.ExternalLocal, p.NodePort, p.LoadBalancerIPs = true, 30080, []netip.Addr{pick(is6, balancerV4, balancerV6)}
		s.apply("default/web", p)
		external := []string{at(p.LoadBalancerIPs[0], 80), at(node, 30080)}
		for _, a := range external {
			// The endpoint here sees the client; those elsewhere see the node.
			s.wantSeen("outside, external policy Local", s.outside.Do, "tcp", a, outside)
			s.wantSeen("pod, external policy Local", client.ns.Do, "tcp", a, node.String())
			s.wantSeen("node, external policy Local", here, "tcp", a, node.String())
		}
		s.wantSeen("pod, internal policy Cluster", client.ns.Do, "tcp", at(p.ClusterIP, 80), node.String())

		p.Local, p.OnNode = nil, nil
		s.apply("default/web", p)
		for _, a := range external {
			s.dropped("outside, no endpoint here", s.outside.Do, a)
			s.wantSeen("pod, no endpoint here", client.ns.Do, "tcp", a, node.String())
			s.wantSeen("node, no endpoint here", here, "tcp", a, node.String())
		}

		p.InternalLocal = true
		s.apply("default/web", p)
		s.dropped("pod, internal policy Local", client.ns.Do, at(p.ClusterIP, 80))
		s.dropped("node, internal policy Local", here, at(p.ClusterIP, 80))
		q := web(p.ClusterIP, server)
		p.Local, p.OnNode = q.Local, q.OnNode
		s.apply("default/web", p)
		s.wantSeen("pod, internal policy Local", client.ns.Do, "tcp", at(p.ClusterIP, 80), client.addr(is6).String())
		s.repaired(0)
	})
}

func TestServiceSourceRanges(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client, server := s.pod(), s.pod()
		s.serve(server.ns.Do, "tcp", at(server.addr(is6), 8080))
		p := web(pick(is6, webV4, webV6), server)
		p.NodePort, p.LoadBalancerIPs = 30080, []netip.Addr{pick(is6, balancerV4, balancerV6)}
		outside := pick(is6, outsideV4, outsideV6)
		other := netip.MustParsePrefix(pick(is6, "198.51.100.0/24", "2001:db8:99::/48"))
		lb, nodePort := at(p.LoadBalancerIPs[0], 80), at(pick(is6, nodeV4, nodeV6).Addr(), 30080)

		// Ranges inside of others, repeated ranges and ranges of the other family
		// must not make the kernel refuse all of it.
		p.Sources = []netip.Prefix{other, outside.Masked(), hostPrefix(outside), hostPrefix(outside), pick(is6, outsideV6, outsideV4)}
		s.apply("default/web", p)
		s.wantSeen("allowed", s.outside.Do, "tcp", lb, outside.Addr().String())
		s.dropped("pod that is not in the ranges", client.ns.Do, lb)
		s.wantSeen("cluster IP", client.ns.Do, "tcp", at(p.ClusterIP, 80), client.addr(is6).String())

		p.Sources = []netip.Prefix{other}
		s.apply("default/web", p)
		s.dropped("not allowed", s.outside.Do, lb)
		s.wantSeen("node ports have no ranges", s.outside.Do, "tcp", nodePort, outside.Addr().String())
		s.repaired(0)

		p.Sources = nil
		s.apply("default/web", p)
		s.wantSeen("no ranges", s.outside.Do, "tcp", lb, outside.Addr().String())
		s.repaired(0)
	})
}

func TestServiceWithoutEndpointsRefuses(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client := s.pod()
		p := web(pick(is6, webV4, webV6))
		p.NodePort, p.LoadBalancerIPs = 30080, []netip.Addr{pick(is6, balancerV4, balancerV6)}
		u := p
		u.Protocol, u.NodePort = unix.IPPROTO_UDP, 30081
		s.apply("default/web", p, u)
		node := pick(is6, nodeV4, nodeV6).Addr()
		// Many at once: the kernel limits how many ICMP messages it sends.
		for range 20 {
			s.refused("pod", client.ns.Do, "tcp", at(p.ClusterIP, 80))
		}
		for name, do := range map[string]func(func() error) error{"pod": client.ns.Do, "node": here, "outside": s.outside.Do} {
			for _, a := range []string{at(p.ClusterIP, 80), at(p.LoadBalancerIPs[0], 80), at(node, 30080)} {
				s.refused(name, do, "tcp", a)
			}
		}
		s.refused("pod", client.ns.Do, "udp", at(p.ClusterIP, 80))
		s.refused("outside", s.outside.Do, "udp", at(node, 30081))
	})
}

func TestServiceOwnAddresses(t *testing.T) {
	s := newServices(t, func(cfg *services.Config) { cfg.Own = []netip.Addr{webV4} })
	client := s.pod()
	s.must(addLoopbackAddr(webV4))
	t.Cleanup(func() { delLoopbackAddr(webV4) })
	s.serve(here, "tcp", at(webV4, 80))
	s.apply("default/web", web(webV4)) // has no endpoints
	s.wantSeen("pod", client.ns.Do, "tcp", at(webV4, 80), client.addr(false).String())
	s.wantSeen("node", here, "tcp", at(webV4, 80), webV4.String())
}

func TestServiceClaims(t *testing.T) {
	s := newServices(t, nil)
	pods := map[string]*pod{}
	for _, name := range []string{"a", "b"} {
		pods[name] = s.pod()
		s.named(pods[name], false, name)
	}
	shared := at(balancerV4, 80)
	port := func(cluster string, name string) services.Port {
		p := web(netip.MustParseAddr(cluster), pods[name])
		p.ExternalIPs = []netip.Addr{balancerV4}
		return p
	}
	want := func(name string) {
		t.Helper()
		if got := count(s.who(3, s.outside.Do, shared)); got[name] != 3 {
			t.Errorf("%v answers, want %s", got, name)
		}
		s.repaired(0)
	}
	s.apply("default/b", port("10.43.0.2", "b"))
	want("b")
	s.apply("default/a", port("10.43.0.1", "a"))
	want("a")
	s.apply("default/b", port("10.43.0.2", "b"))
	want("a")
	s.apply("default/a")
	want("b")
	s.apply("default/a", port("10.43.0.1", "a"))
	s.apply("default/b")
	want("a")
}

func TestServiceRulesSurviveOthers(t *testing.T) {
	s := newServices(t, nil)
	server := s.pod()
	s.serve(server.ns.Do, "tcp", at(server.addr(false), 8080))
	p := web(webV4, server)
	s.apply("default/web", p)
	works := func(what string) {
		t.Helper()
		s.wantSeen(what, here, "tcp", at(webV4, 80), nodeV4.Addr().String())
		s.repaired(0)
	}
	works("at first")
	table := &nftables.Table{Name: s.table.Name(), Family: nftables.TableFamilyINet}
	for what, damage := range map[string]func(*nftables.Conn){
		"ruleset flushed": func(c *nftables.Conn) { c.FlushRuleset() },
		"rules flushed":   func(c *nftables.Conn) { c.FlushTable(table) },
		"set emptied": func(c *nftables.Conn) {
			c.FlushSet(&nftables.Set{Table: table, Name: "endpoints-4", IsMap: true})
		},
		"services emptied": func(c *nftables.Conn) {
			c.FlushSet(&nftables.Set{Table: table, Name: "services-4", IsMap: true})
		},
		"strange element": func(c *nftables.Conn) {
			c.SetAddElements(&nftables.Set{Table: table, Name: "cluster-ips-4", KeyType: nftables.TypeIPAddr}, []nftables.SetElement{{Key: []byte{10, 43, 9, 9}}})
		},
	} {
		conn, err := nftables.New()
		s.must(err)
		damage(conn)
		if err := conn.Flush(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		s.repaired(1)
		works(what)
	}
	// A change notices by itself that the table is gone.
	conn, err := nftables.New()
	s.must(err)
	conn.FlushRuleset()
	s.must(conn.Flush())
	p.NodePort = 30080
	s.apply("default/web", p)
	works("changed")

	// A new process adopts the existing table, and removes the services that it does not
	// have.
	s.table = services.NewTable(s.cfg.NodeName, s.serviceConfig())
	q := web(netip.MustParseAddr("10.43.0.81"), server)
	s.apply("default/other", q)
	s.wantSeen("another service", here, "tcp", at(q.ClusterIP, 80), nodeV4.Addr().String())
	s.dropped("a service that is gone", here, at(webV4, 80))
	s.repaired(0)
}

// TestServiceUDP: datagrams continue to another endpoint when theirs is gone: the component
// deletes the tracked flows, which the test does here.
func TestServiceUDP(t *testing.T) {
	both(t, func(t *testing.T, is6 bool) {
		s := newServices(t, nil)
		client, server := s.pod(), s.pod()
		s.serve(server.ns.Do, "udp", at(server.addr(is6), 8080))
		p := web(pick(is6, webV4, webV6), server)
		p.Protocol = unix.IPPROTO_UDP
		s.apply("default/web", p)
		s.wantSeen("pod", client.ns.Do, "udp", at(p.ClusterIP, 80), client.addr(is6).String())
	})
}

// TestServiceSCTP sends the first packet of an association by hand: the kernels
// of small machines track and translate SCTP although they do not speak it.
func TestServiceSCTP(t *testing.T) {
	s := newServices(t, nil)
	client, server := s.pod(), s.pod()
	p := web(webV4, server)
	p.Protocol = unix.IPPROTO_SCTP
	s.apply("default/web", p)

	var hears *net.IPConn
	s.must(server.ns.Do(func() (err error) {
		hears, err = net.ListenIP("ip4:132", &net.IPAddr{IP: server.addr(false).AsSlice()})
		return err
	}))
	defer hears.Close()
	var sends *net.IPConn
	s.must(client.ns.Do(func() (err error) {
		sends, err = net.DialIP("ip4:132", nil, &net.IPAddr{IP: webV4.AsSlice()})
		return err
	}))
	defer sends.Close()
	// Common header and an INIT chunk, RFC 9260 3.1 and 3.3.2.
	packet := binary.BigEndian.AppendUint16(nil, 40000)
	packet = binary.BigEndian.AppendUint16(packet, 80)
	packet = append(packet, 0, 0, 0, 0, 0, 0, 0, 0)
	packet = append(packet, 1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1)
	binary.LittleEndian.PutUint32(packet[8:], crc32.Checksum(packet, crc32.MakeTable(crc32.Castagnoli)))
	buf := make([]byte, 100)
	var n int
	var from net.Addr
	err := errors.New("nothing was sent")
	for range 10 { // as an association does until it is answered (T1-init)
		if _, err := sends.Write(packet); err != nil {
			t.Fatal(err)
		}
		hears.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
		if n, from, err = hears.ReadFrom(buf); err == nil {
			break
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if n != len(packet) || binary.BigEndian.Uint16(buf[2:]) != 8080 || from.String() != client.addr(false).String() {
		t.Errorf("%d bytes to port %d from %v", n, binary.BigEndian.Uint16(buf[2:]), from)
	}
}

// TestServicesOfTwoNodes: rules of one node leave the pods of another on the same
// machine alone, although both have the same ranges.
func TestServicesOfTwoNodes(t *testing.T) {
	s := newServices(t, nil)
	client, server := s.pod(), s.pod()
	s.serve(server.ns.Do, "tcp", at(server.addr(false), 8080))
	cfg := s.serviceConfig()
	cfg.LinkPrefix = "kdgzzzz"
	other := services.NewTable("node2", cfg)
	t.Cleanup(func() { nft.RemoveTables("node2") })
	s.apply("default/web", web(webV4, server))
	// Of hooks with the same priority, the kernel calls the newest first.
	s.must(other.Apply(map[string]services.Service{"default/web": {Ports: []services.Port{web(webV4)}}}))
	s.wantSeen("pod", client.ns.Do, "tcp", at(webV4, 80), client.addr(false).String())
	if _, err := s.ask(here, "tcp", at(webV4, 80)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("node: %v, want the newest of the two to decide", err)
	}
}
