package lan

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
)

// sockets gives a datagram socket to each of two hosts.
func sockets(t *testing.T, a, b *Host) (pa, pb net.PacketConn) {
	t.Helper()
	open := func(h *Host, addr string) net.PacketConn {
		c, err := h.ListenPacket("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	return open(a, "192.0.2.1:9"), open(b, "192.0.2.2:9")
}

// send sends numbered packets.
func send(t *testing.T, from, to net.PacketConn, n int) {
	t.Helper()
	for i := range n {
		if _, err := from.WriteTo([]byte{byte(i)}, to.LocalAddr()); err != nil {
			t.Fatal(err)
		}
	}
}

// received are the numbers of up to n packets, until none comes for a while.
func received(c net.PacketConn, n int, patience time.Duration) []byte {
	var got []byte
	buf := make([]byte, 16)
	for len(got) < n {
		c.SetReadDeadline(time.Now().Add(patience))
		if _, _, err := c.ReadFrom(buf); err != nil {
			break
		}
		got = append(got, buf[0])
	}
	return got
}

func impair(t *testing.T, h *Host, out, in Fault) {
	t.Helper()
	if err := h.Impair(out, in); err != nil {
		t.Fatal(err)
	}
}

func TestOneDirectionIsCut(t *testing.T) {
	_, a, b := twoHosts(t)
	pa, pb := sockets(t, a, b)
	// So that neither asks for the other's hardware address when one cannot answer.
	send(t, pa, pb, 1)
	if len(received(pb, 1, patient)) != 1 {
		t.Fatal("the good link loses packets")
	}
	for _, c := range []struct {
		name     string
		out, in  Fault
		from, to net.PacketConn // where packets are lost
	}{{"out", Fault{Loss: 1}, Fault{}, pa, pb}, {"in", Fault{}, Fault{Loss: 1}, pb, pa}} {
		impair(t, a, c.out, c.in)
		send(t, c.from, c.to, 3)
		if got := received(c.to, 1, impatient); len(got) > 0 {
			t.Errorf("%s: packets arrive", c.name)
		}
		send(t, c.to, c.from, 3)
		if got := received(c.from, 3, patient); len(got) != 3 {
			t.Errorf("%s: the other direction loses packets: %v", c.name, got)
		}
	}
	if err := a.Repair(); err != nil {
		t.Fatal(err)
	}
	send(t, pb, pa, 3)
	if got := received(pa, 3, patient); len(got) != 3 {
		t.Errorf("after Repair: %v", got)
	}
}

func TestLossAndDuplicates(t *testing.T) {
	_, a, b := twoHosts(t)
	pa, pb := sockets(t, a, b)
	send(t, pa, pb, 1)
	received(pb, 1, patient)
	impair(t, a, Fault{Loss: 0.5}, Fault{})
	send(t, pa, pb, 200)
	if got := received(pb, 200, impatient); len(got) < 50 || len(got) > 150 {
		t.Errorf("of 200 packets, of which half get lost, %d arrive", len(got))
	}
	impair(t, a, Fault{Duplicate: 1}, Fault{})
	send(t, pa, pb, 20)
	if got := received(pb, 40, patient); len(got) != 40 {
		t.Errorf("20 doubled packets arrive as %d", len(got))
	}
}

func TestDelayAndOrder(t *testing.T) {
	_, a, b := twoHosts(t)
	pa, pb := sockets(t, a, b)
	const delay = 50 * time.Millisecond
	impair(t, a, Fault{Delay: delay, Jitter: delay / 2}, Fault{})
	begin := time.Now()
	send(t, pa, pb, 100)
	got := received(pb, 100, patient)
	if took := time.Since(begin); took < delay/2 {
		t.Errorf("packets arrive after %s", took)
	}
	if len(got) != 100 {
		t.Fatalf("%d of 100 packets arrive", len(got))
	}
	for i := range got {
		if got[i] != byte(i) {
			t.Fatalf("jitter changes the order: %v", got)
		}
	}
	impair(t, a, Fault{Delay: delay, Reorder: 0.5}, Fault{})
	send(t, pa, pb, 100)
	if got = received(pb, 100, patient); len(got) != 100 {
		t.Fatalf("%d of 100 packets arrive", len(got))
	}
	inOrder := true
	for i := range got {
		inOrder = inOrder && got[i] == byte(i)
	}
	if inOrder {
		t.Error("no packet overtakes another")
	}
}

// TestDataThroughFaults: what TCP carries over a bad link is whole, although the
// kernel leaves sums and segments undone on a good one.
func TestDataThroughFaults(t *testing.T) {
	_, a, b := twoHosts(t)
	data := make([]byte, 2<<20)
	rand.Read(data)
	for name, c := range map[string]struct {
		f     Fault
		least time.Duration
	}{
		"nothing": {},
		"slow":    {Fault{Rate: 8 << 20}, 200 * time.Millisecond},
		"bad":     {Fault{Delay: 2 * time.Millisecond, Jitter: time.Millisecond, Loss: 0.005, Duplicate: 0.01, Reorder: 0.01}, 0},
	} {
		for _, addr := range []string{"192.0.2.2:0", "[2001:db8::2]:0"} {
			impair(t, a, c.f, c.f)
			l, err := b.Listen("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			go func() {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				defer conn.Close()
				io.Copy(conn, conn)
			}()
			begin := time.Now()
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			conn, err := a.Dial(ctx, "tcp", l.Addr().String())
			if err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			conn.SetDeadline(time.Now().Add(time.Minute))
			go func() {
				conn.Write(data)
				conn.(*net.TCPConn).CloseWrite()
			}()
			got, err := io.ReadAll(conn)
			if err != nil || !bytes.Equal(got, data) {
				t.Errorf("%s, %s: %d of %d bytes return, %v", name, addr, len(got), len(data), err)
			}
			if took := time.Since(begin); took < c.least {
				t.Errorf("%s: %d bytes took %s", name, len(data), took)
			}
			conn.Close()
			l.Close()
			cancel()
		}
	}
}

func TestFaultsThatMakeNoSense(t *testing.T) {
	_, a, _ := twoHosts(t)
	for _, f := range []Fault{{Loss: 1.1}, {Duplicate: -1}, {Delay: 1, Jitter: 2}, {Reorder: 1}, {Rate: -1}, {Delay: -1}} {
		if err := a.Impair(f, Fault{}); err == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
}

func TestRenumber(t *testing.T) {
	_, a, b := twoHosts(t)
	for _, via := range []netip.Addr{addrA4.Addr(), netip.MustParseAddr("192.0.2.9")} {
		if err := b.Route(netip.MustParsePrefix("198.51.100.0/24"), via); err != nil {
			t.Fatal(err)
		}
	}
	if err := b.Renumber(netip.MustParsePrefix("192.0.2.50/24")); err != nil {
		t.Fatal(err)
	}
	serve(t, b, "0.0.0.0:80")
	if err := ask(a, "192.0.2.50:80", patient); err != nil {
		t.Error(err)
	}
	if err := ask(a, "192.0.2.2:80", impatient); err == nil {
		t.Error("the old address still answers")
	}
	routes, err := b.Netlink().RouteList(nil, netlink.FAMILY_V4)
	if err != nil || len(routes) != 2 {
		t.Errorf("routes %v, %v; want the link's and the one added", routes, err)
	}
}

// TestAnotherProcess opens what exists by paths, as another process does.
func TestAnotherProcess(t *testing.T) {
	l, a, b := twoHosts(t)
	again, err := Open(l.Path())
	if err != nil {
		t.Fatal(err)
	}
	b2, err := again.Adopt("b", b.Path())
	if err != nil {
		t.Fatal(err)
	}
	if got := b2.Addrs(); len(got) != 2 || got[0] != addrB4 || got[1] != addrB6 {
		t.Errorf("addresses of the adopted host: %v", got)
	}
	serve(t, b, "192.0.2.2:80")
	if err := b2.Cut(); err != nil {
		t.Fatal(err)
	}
	if err := ask(a, "192.0.2.2:80", impatient); err == nil {
		t.Error("the adopted host is not cut")
	}
	if err := b2.Restore(); err != nil {
		t.Fatal(err)
	}
	c, err := again.Host("c", netip.MustParsePrefix("192.0.2.3/24"))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, c, "192.0.2.3:80")
	for _, addr := range []string{"192.0.2.2:80", "192.0.2.3:80"} {
		if err := ask(a, addr, patient); err != nil {
			t.Error(err)
		}
	}
	if err := again.Disown(); err != nil {
		t.Fatal(err)
	}
	if err := ask(a, "192.0.2.2:80", patient); err != nil {
		t.Errorf("after Disown: %v", err)
	}
	if _, err := again.Host("d"); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a host on a disowned LAN: %v", err)
	}
}

func TestAttach(t *testing.T) {
	l, _, b := twoHosts(t)
	// The machine that runs the tests has addresses too.
	if err := b.Renumber(netip.MustParsePrefix("10.213.99.2/24")); err != nil {
		t.Fatal(err)
	}
	const name = "kdgtest0"
	t.Cleanup(func() {
		for range 2 { // the second time it is gone
			if err := Detach(name); err != nil {
				t.Error(err)
			}
		}
	})
	if err := l.Attach(name, netip.MustParsePrefix("10.213.99.1/24")); err != nil {
		t.Fatal(err)
	}
	serve(t, b, "10.213.99.2:80")
	conn, err := net.DialTimeout("tcp", "10.213.99.2:80", patient)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
