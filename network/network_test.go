package network

import (
	"errors"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func listTables(t testing.TB) []string {
	t.Helper()
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	tables, err := conn.ListTables()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, table := range tables {
		names = append(names, table.Name)
	}
	return names
}

func TestPodsReachEachOtherTheNodeAndTheOutside(t *testing.T) {
	w := newWorld(t, dualStack()...)
	a, b := w.pod(), w.pod()
	for i, outside := range []string{outsideV4.Addr().String(), outsideV6.Addr().String()} {
		for _, network := range []string{"tcp", "udp"} {
			w.serve(b.ns.Do, network, at(b.addrs[i], 8080))
			w.wantSeen("pod to pod", a.ns.Do, network, at(b.addrs[i], 8080), a.addrs[i].String())

			gateway := []string{"10.42.0.1", "fd42::1"}[i]
			w.wantSeen("node to pod", here, network, at(b.addrs[i], 8080), gateway)

			node := []string{"192.0.2.1:9", "[2001:db8:1::1]:9"}[i]
			w.serve(here, network, node)
			w.wantSeen("pod to node", a.ns.Do, network, node, a.addrs[i].String())

			far := []string{outside + ":7", "[" + outside + "]:7"}[i]
			w.serve(w.outside.Do, network, far)
			seen := []string{"192.0.2.1", "2001:db8:1::1"}[i]
			w.wantSeen("pod to outside", a.ns.Do, network, far, seen)
		}
	}
}

func TestHostPorts(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod(port{8000, 80, "TCP", ""}, port{8053, 53, "UDP", ""}, port{8443, 443, "tcp", "192.0.2.1"})
	other := w.pod()
	for i, addr := range p.addrs {
		w.serve(p.ns.Do, "tcp", at(addr, 80))
		w.serve(p.ns.Do, "udp", at(addr, 53))
		if i == 0 {
			w.serve(p.ns.Do, "tcp", at(addr, 443))
		}
	}
	// A host port is reachable at every address of the node, from every client.
	w.wantSeen("outside", w.outside.Do, "tcp", "192.0.2.1:8000", "192.0.2.9")
	w.wantSeen("outside", w.outside.Do, "udp", "192.0.2.1:8053", "192.0.2.9")
	w.wantSeen("outside", w.outside.Do, "tcp", "[2001:db8:1::1]:8000", "2001:db8:1::9")
	w.wantSeen("outside", w.outside.Do, "udp", "[2001:db8:1::1]:8053", "2001:db8:1::9")
	w.wantSeen("outside, one address", w.outside.Do, "tcp", "192.0.2.1:8443", "192.0.2.9")
	w.wantSeen("node", here, "tcp", "192.0.2.1:8000", "192.0.2.1")
	w.wantSeen("node's loopback", here, "tcp", "127.0.0.1:8000", "10.42.0.1")
	w.wantSeen("node's loopback", here, "udp", "127.0.0.1:8053", "10.42.0.1")
	w.wantSeen("another pod", other.ns.Do, "tcp", "192.0.2.1:8000", other.addrs[0].String())
	w.wantSeen("the pod itself", p.ns.Do, "tcp", "192.0.2.1:8000", "10.42.0.1")
	w.wantSeen("the pod itself", p.ns.Do, "tcp", "[2001:db8:1::1]:8000", "fd42::1")
	if _, err := w.ask(here, "tcp", "[::1]:8000"); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("host port on ::1: %v, want a refusal", err)
	}
	if _, err := w.ask(here, "tcp", "127.0.0.1:8443"); err == nil {
		t.Error("host port of one address answers on another")
	}
	// It ends with the pod, and can be had by the next.
	if _, err := p.call("DEL"); err != nil {
		t.Fatal(err)
	}
	if _, err := w.ask(w.outside.Do, "tcp", "192.0.2.1:8000"); err == nil {
		t.Error("host port answers after its pod is gone")
	}
}

// TestDatagramsFollowTheirHostPort: a client that never stops sending from one
// port keeps its tracked flow alive, and must still reach the pod of the moment.
func TestDatagramsFollowTheirHostPort(t *testing.T) {
	w := newWorld(t, podsV4)
	var client net.Conn
	w.must(w.outside.Do(func() (err error) {
		client, err = net.Dial("udp4", "192.0.2.1:8053")
		return err
	}))
	defer client.Close()
	answered := func(patience time.Duration) bool {
		for end := time.Now().Add(patience); time.Now().Before(end); {
			client.Write([]byte("?")) // refused while there is no pod
			client.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
			if _, err := client.Read(make([]byte, 64)); err == nil {
				return true
			}
		}
		return false
	}
	if answered(100 * time.Millisecond) {
		t.Fatal("an answer arrives before there is a pod")
	}
	for range 2 {
		p := w.pod(port{8053, 53, "UDP", ""})
		w.serve(p.ns.Do, "udp", at(p.addrs[0], 53))
		if !answered(5 * time.Second) {
			t.Fatal("the pod is not reached")
		}
		if _, err := p.call("DEL"); err != nil {
			t.Fatal(err)
		}
		if answered(100 * time.Millisecond) {
			t.Error("a pod that is gone answers")
		}
	}
}

// TestFirstPacket: an attached pod's link sends and its addresses are its own, although the
// kernel has other work on links. A packet sent before is lost, and retransmitted after a
// second.
func TestFirstPacket(t *testing.T) {
	w := newWorld(t, dualStack()...)
	stop := make(chan struct{})
	var busy sync.WaitGroup
	defer busy.Wait()
	defer close(stop)
	for range 4 {
		ns := w.namespace()
		busy.Go(func() {
			err := ns.Do(func() error {
				for {
					select {
					case <-stop:
						return nil
					default:
					}
					attrs := netlink.NewLinkAttrs()
					attrs.Name = "busy"
					link := netlink.NewVeth(attrs)
					link.PeerName = "peer"
					if err := errors.Join(netlink.LinkAdd(link), netlink.LinkDel(link)); err != nil {
						return err
					}
				}
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	for range 30 {
		p := w.pod()
		links, err := netlink.LinkList() // says what is: to ask for one link makes the kernel hurry
		w.must(err)
		for _, l := range links {
			if a := l.Attrs(); strings.HasSuffix(a.Alias, " "+p.id+"/eth0") && a.OperState != netlink.OperUp {
				t.Errorf("the node's end of %s is %s", p.id, a.OperState)
			}
		}
		w.must(p.ns.Do(func() error {
			routes, err := netlink.RouteGet(p.addr(true).AsSlice())
			if err == nil && routes[0].Type != unix.RTN_LOCAL {
				t.Errorf("%s has no route to itself: %v", p.id, routes)
			}
			return err
		}))
	}
}
