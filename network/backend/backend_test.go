package backend_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"kedge/network/backend"
)

// patience is the time limit of a change on a busy machine. On an idle machine each change takes less
// than the five seconds after which WireGuard repeats a handshake that was not answered: go test -v
// shows the times.
const patience = 20 * time.Second

func (c *cluster) reaches(from, to *pod, ipv6 bool) error {
	seen, err := c.ask(from.ns.Do, "tcp", to.addr(ipv6), 80, 1)
	if err == nil && seen != from.addr(ipv6).String() {
		err = fmt.Errorf("seen from %s instead of %s", seen, from.addr(ipv6))
	}
	return err
}

func TestPodsOfTwoNodesMeet(t *testing.T) {
	tests := []struct {
		mode  backend.Mode
		f     families
		extra int // bytes that each packet grows by
	}{
		{backend.VXLAN, families{"4", "4"}, 50},
		{backend.VXLAN, families{"46", "46"}, 50},
		{backend.VXLAN, families{"6", "6"}, 70},
		{backend.VXLAN, families{"6", "46"}, 70},
		{backend.VXLAN, families{"4", "46"}, 50},
		{backend.HostGW, families{"4", "4"}, 0},
		{backend.HostGW, families{"46", "46"}, 0},
		{backend.HostGW, families{"6", "6"}, 0},
		{backend.UDP, families{"4", "4"}, 28},
		{backend.UDP, families{"46", "46"}, 28},
		{backend.UDP, families{"6", "6"}, 48},
		{backend.WireGuard, families{"4", "4"}, 60},
		{backend.WireGuard, families{"46", "46"}, 60},
		{backend.WireGuard, families{"6", "46"}, 80},
	}
	for _, test := range tests {
		t.Run(fmt.Sprintf("%s/nodes%s/pods%s", test.mode, test.f.nodes, test.f.pods), func(t *testing.T) {
			c := newCluster(t, test.mode)
			one, two := c.machine(1, test.f), c.machine(2, test.f)
			a, b := one.pod(), two.pod()
			c.serve(a.ns.Do, 80)
			c.serve(b.ns.Do, 80)
			c.serve(two.Do, 81)
			for _, ipv6 := range []bool{false, true} {
				if !has(test.f.pods, ipv6) {
					continue
				}
				c.within(patience, "pod to pod", func() error { return c.reaches(a, b, ipv6) })
				c.within(patience, "and back", func() error { return c.reaches(b, a, ipv6) })
				c.sizes(a, b, ipv6, 1500-test.extra)

				seen, err := c.ask(one.Do, "tcp", b.addr(ipv6), 80, 100_000)
				if err != nil {
					t.Errorf("node to pod: %v", err)
				}
				t.Logf("a node is seen by another's pod as %s", seen)
				if !has(test.f.nodes, ipv6) {
					continue
				}
				node := pick(two.cfg.Addrs, ipv6)
				for _, network := range []string{"tcp", "udp"} {
					if seen, err := c.ask(a.ns.Do, network, node, 81, 1000); err != nil || seen != a.addr(ipv6).String() {
						t.Errorf("pod to node by %s: seen from %q, want the pod's %s: %v", network, seen, a.addr(ipv6), err)
					}
				}
			}
		})
	}
}

// sizes checks that pods have the largest possible MTU, that packets of exactly that size
// pass without fragmentation, and that the sender of larger ones gets an error at once.
func (c *cluster) sizes(a, b *pod, ipv6 bool, mtu int) {
	c.t.Helper()
	c.must(a.ns.Do(func() error {
		link, err := net.InterfaceByName("eth0")
		if err == nil && link.MTU != mtu {
			err = fmt.Errorf("pod has MTU %d, want %d", link.MTU, mtu)
		}
		return err
	}))
	headers := 28
	if ipv6 {
		headers = 48
	}
	send := func(size int) error {
		var conn *net.UDPConn
		err := a.ns.Do(func() (err error) {
			conn, err = net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(b.addr(ipv6), 80)))
			return err
		})
		if err != nil {
			return err
		}
		defer conn.Close()
		raw, err := conn.SyscallConn()
		if err != nil {
			return err
		}
		raw.Control(func(fd uintptr) {
			if ipv6 {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IPV6, syscall.IPV6_MTU_DISCOVER, syscall.IPV6_PMTUDISC_DO)
			} else {
				err = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_IP, syscall.IP_MTU_DISCOVER, syscall.IP_PMTUDISC_DO)
			}
		})
		if err != nil {
			return err
		}
		conn.SetDeadline(time.Now().Add(time.Second))
		if _, err := conn.Write(make([]byte, size)); err != nil {
			return err
		}
		_, err = conn.Read(make([]byte, 128))
		return err
	}
	if err := send(mtu - headers); err != nil {
		c.t.Errorf("packet of the full %d bytes: %v", mtu, err)
	}
	if err := send(mtu - headers + 1); !errors.Is(err, syscall.EMSGSIZE) {
		c.t.Errorf("packet of %d bytes: %v, want to be told that it is too long", mtu+1, err)
	}
	if _, err := c.ask(a.ns.Do, "tcp", b.addr(ipv6), 80, 1<<20); err != nil {
		c.t.Errorf("a MiB by TCP: %v", err)
	}
}

// stream sends a datagram from one pod to another every 5 ms until the returned function is
// called, which returns the number of unanswered datagrams.
func (c *cluster) stream(from, to *pod) (lost func() int) {
	var conn net.Conn
	c.must(from.ns.Do(func() (err error) {
		conn, err = net.Dial("udp", netip.AddrPortFrom(to.addr(false), 80).String())
		return err
	}))
	stop := make(chan struct{})
	var done sync.WaitGroup
	sent, got := 0, 0
	done.Go(func() {
		for {
			select {
			case <-stop:
				time.Sleep(200 * time.Millisecond)
				conn.Close()
				return
			case <-time.After(5 * time.Millisecond):
				conn.Write([]byte("x"))
				sent++
			}
		}
	})
	done.Go(func() {
		buf := make([]byte, 128)
		for {
			_, err := conn.Read(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				got++
			}
		}
	})
	return func() int {
		close(stop)
		done.Wait()
		if sent < 50 {
			c.t.Errorf("only %d datagrams sent: the test proves nothing", sent)
		}
		return sent - got
	}
}

func eachMode(t *testing.T, f func(t *testing.T, mode backend.Mode)) {
	for _, mode := range []backend.Mode{backend.VXLAN, backend.HostGW, backend.WireGuard, backend.UDP} {
		t.Run(string(mode), func(t *testing.T) { f(t, mode) })
	}
}

func TestNodesComeAndGo(t *testing.T) {
	eachMode(t, func(t *testing.T, mode backend.Mode) {
		c := newCluster(t, mode)
		f := families{"4", "4"}
		one, two := c.machine(1, f), c.machine(2, f)
		a, b := one.pod(), two.pod()
		c.serve(b.ns.Do, 80)
		c.within(patience, "two nodes", func() error { return c.reaches(a, b, false) })
		lost := c.stream(a, b)

		three := c.machine(3, f)
		d := three.pod()
		c.serve(d.ns.Do, 80)
		c.within(patience, "a third comes", func() error { return c.reaches(a, d, false) })

		c.must(three.DelAddr(netip.MustParsePrefix("192.0.2.3/24")))
		c.must(three.AddAddr(netip.MustParsePrefix("192.0.2.33/24")))
		three.cfg.Addrs = []netip.Addr{netip.MustParseAddr("192.0.2.33")}
		c.set(three)
		c.within(patience, "it changes its address", func() error { return c.reaches(a, d, false) })

		object := c.objects[three.cfg.Name]
		c.remove(three)
		c.within(patience, "it leaves", func() error {
			if err := c.reaches(a, d, false); err == nil {
				return errors.New("it is still reached")
			}
			return nil
		})
		c.mu.Lock()
		c.objects[three.cfg.Name] = object
		c.push()
		c.mu.Unlock()
		c.within(patience, "it returns", func() error { return c.reaches(a, d, false) })
		if n := lost(); n > 0 {
			t.Errorf("%d datagrams between the other two were lost", n)
		}
	})
}

// With the process gone the kernel goes on, and the next process touches nothing.
func TestRestartLosesNothing(t *testing.T) {
	for _, mode := range []backend.Mode{backend.VXLAN, backend.HostGW} {
		t.Run(string(mode), func(t *testing.T) {
			c := newCluster(t, mode)
			one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
			a, b := one.pod(), two.pod()
			c.serve(b.ns.Do, 80)
			c.within(patience, "at first", func() error { return c.reaches(a, b, false) })
			lost := c.stream(a, b)
			for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
				one.end(sig)
				two.end(sig)
				one.start()
				two.start()
			}
			c.must(c.reaches(a, b, false))
			if n := lost(); n > 0 {
				t.Errorf("%d datagrams were lost", n)
			}
		})
	}
}

// Another program removes kedge's objects.
func TestRepair(t *testing.T) {
	eachMode(t, func(t *testing.T, mode backend.Mode) {
		c := newCluster(t, mode)
		one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
		a, b := one.pod(), two.pod()
		c.serve(b.ns.Do, 80)
		whole := func() error { return c.reaches(a, b, false) }
		c.within(patience, "at first", whole)
		routes, err := one.Netlink().RouteListFiltered(syscall.AF_INET, &netlink.Route{Protocol: 213}, netlink.RT_FILTER_PROTOCOL)
		c.must(err)
		if len(routes) == 0 {
			t.Fatal("there are no routes of ours")
		}
		for _, r := range routes {
			c.must(one.Netlink().RouteDel(&r))
		}
		c.within(patience, "routes removed", whole)
		links, err := one.Netlink().LinkList()
		c.must(err)
		for _, l := range links {
			if tp := l.Type(); tp == "vxlan" || tp == "tuntap" {
				c.must(one.Netlink().LinkDel(l))
				c.within(patience, "interface removed", whole)
			}
		}
		uplink, err := one.Netlink().LinkByName("eth0")
		c.must(err)
		c.must(one.Netlink().LinkSetDown(uplink))
		c.must(one.Netlink().LinkSetUp(uplink))
		c.within(patience, "link went down and up", whole)
	})
}

// TestNobodysAddress: packets for a pod address without a node do not leave through the
// default route, and the sender gets an error at once. (A pod's connection over IPv6 does
// not end by that: for the kernel the error may be temporary.)
func TestNobodysAddress(t *testing.T) {
	for _, mode := range []backend.Mode{backend.VXLAN, backend.HostGW} {
		t.Run(string(mode), func(t *testing.T) {
			c := newCluster(t, mode)
			f := families{"46", "46"}
			one, two := c.machine(1, f), c.machine(2, f)
			a, b := one.pod(), two.pod()
			c.serve(b.ns.Do, 80)
			c.within(patience, "two nodes", func() error { return c.reaches(a, b, false) })
			c.must(one.Route(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("192.0.2.254")))
			c.must(one.Route(netip.MustParsePrefix("::/0"), netip.MustParseAddr("2001:db8::254")))
			for _, to := range []string{"10.42.200.1", "fd42:0:0:200::1"} {
				for who, from := range map[string]place{"a pod": a.ns.Do, "a node": one.Do} {
					if who == "a pod" && to != "10.42.200.1" {
						continue
					}
					c.within(4*patience, who+" that calls "+to+" hears it", func() error {
						_, err := c.ask(from, "tcp", netip.MustParseAddr(to), 80, 1)
						if errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) {
							return nil
						}
						// The kernel sends the error twice, and then at most every two
						// seconds: it counts the error and the message about it.
						time.Sleep(2500 * time.Millisecond)
						return fmt.Errorf("it gets %v", err)
					})
				}
			}
		})
	}
}

// TestForwardingIsMended: another program removes entries of the tunnel, and the backend
// gets the events.
func TestForwardingIsMended(t *testing.T) {
	c := newCluster(t, backend.VXLAN)
	f := families{"4", "4"}
	one, two := c.machine(1, f), c.machine(2, f)
	a, b := one.pod(), two.pod()
	c.serve(b.ns.Do, 80)
	c.within(patience, "two nodes", func() error { return c.reaches(a, b, false) })
	for _, family := range []int{syscall.AF_INET, syscall.AF_BRIDGE} {
		links, err := one.Netlink().LinkList()
		c.must(err)
		removed := 0
		for _, l := range links {
			if l.Type() != "vxlan" {
				continue
			}
			entries, err := one.Netlink().NeighList(l.Attrs().Index, family)
			c.must(err)
			for _, e := range entries {
				if e.State&netlink.NUD_PERMANENT != 0 {
					c.must(one.Netlink().NeighDel(&e))
					removed++
				}
			}
		}
		if removed == 0 {
			t.Fatalf("there are no entries of family %d", family)
		}
		c.within(patience, "entries removed", func() error { return c.reaches(a, b, false) })
	}
}

// TestHostGWNeedsOneLink: a node behind a router cannot be a next hop; the others are not
// affected, and the log and Check name it.
func TestHostGWNeedsOneLink(t *testing.T) {
	c := newCluster(t, backend.HostGW)
	one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
	c.must(one.Route(netip.MustParsePrefix("198.51.100.0/24"), netip.MustParseAddr("192.0.2.2")))
	far := &corev1.Node{}
	far.Name = "far"
	far.Annotations = map[string]string{backend.Annotation: `{"mode":"host-gw"}`}
	far.Spec.PodCIDRs = []string{"10.42.9.0/24"}
	far.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "198.51.100.9"}}
	other := far.DeepCopy()
	other.Name, other.Status.Addresses[0].Address = "other", "192.0.2.77"
	other.Annotations[backend.Annotation] = `{"mode":"vxlan"}`
	other.Spec.PodCIDRs = []string{"10.42.10.0/24"}
	c.mu.Lock()
	c.objects["far"], c.objects["other"] = far, other
	c.push()
	c.mu.Unlock()
	a, b := one.pod(), two.pod()
	c.serve(b.ns.Do, 80)
	c.within(patience, "the others", func() error { return c.reaches(a, b, false) })
	c.within(patience, "it is said", func() error {
		said := one.log.String()
		for _, want := range []string{
			"pods of node far cannot be reached with --flannel-backend=host-gw: 198.51.100.9 is not on a link of this node but behind the router 192.0.2.2",
			"node other has --flannel-backend=vxlan and this node host-gw",
		} {
			if !strings.Contains(said, want) {
				return fmt.Errorf("the log lacks %q", want)
			}
		}
		return nil
	})
}

// A node repairs its annotation after another client has damaged it.
func TestOwnAnnotationIsMended(t *testing.T) {
	c := newCluster(t, backend.VXLAN)
	one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
	a, b := one.pod(), two.pod()
	c.serve(b.ns.Do, 80)
	c.within(patience, "at first", func() error { return c.reaches(a, b, false) })
	c.mu.Lock()
	c.objects[two.cfg.Name].Annotations[backend.Annotation] = "nonsense"
	c.push()
	c.mu.Unlock()
	c.within(patience, "it is mended", func() error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if said := c.objects[two.cfg.Name].Annotations[backend.Annotation]; said != `{"mode":"vxlan"}` {
			return fmt.Errorf("it is %s", said)
		}
		return nil
	})
	c.within(patience, "and they meet again", func() error { return c.reaches(a, b, false) })
}

// TestTunnelCostsNoRule: a routing rule costs every packet of the machine; IPv4 works
// without one of kedge's. The type of service that pods set reaches other pods.
func TestTunnelCostsNoRule(t *testing.T) {
	c := newCluster(t, backend.VXLAN)
	one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
	a, b := one.pod(), two.pod()
	c.serve(b.ns.Do, 80)
	c.within(patience, "pod to pod", func() error { return c.reaches(a, b, false) })
	rules, err := one.Netlink().RuleList(syscall.AF_INET)
	c.must(err)
	for _, r := range rules {
		if r.Protocol == 213 {
			t.Errorf("there is a routing rule: %s", r)
		}
	}

	const want = 0xb8 // expedited forwarding
	var to *net.UDPConn
	c.must(b.ns.Do(func() (err error) { to, err = net.ListenUDP("udp4", &net.UDPAddr{Port: 90}); return err }))
	defer to.Close()
	option := func(conn *net.UDPConn, name, value int) {
		raw, err := conn.SyscallConn()
		c.must(err)
		var set error
		c.must(raw.Control(func(fd uintptr) { set = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, name, value) }))
		c.must(set)
	}
	option(to, unix.IP_RECVTOS, 1)
	var from net.Conn
	c.must(a.ns.Do(func() (err error) {
		from, err = net.Dial("udp4", netip.AddrPortFrom(b.addr(false), 90).String())
		return err
	}))
	defer from.Close()
	option(from.(*net.UDPConn), unix.IP_TOS, want)
	_, err = from.Write([]byte("x"))
	c.must(err)
	c.must(to.SetReadDeadline(time.Now().Add(patience)))
	data, control := make([]byte, 10), make([]byte, 64)
	_, n, _, _, err := to.ReadMsgUDP(data, control)
	c.must(err)
	messages, err := unix.ParseSocketControlMessage(control[:n])
	c.must(err)
	if len(messages) != 1 || len(messages[0].Data) < 1 || messages[0].Data[0] != want {
		t.Errorf("the type of service arrives as %v, want %#x", messages, want)
	}
}
