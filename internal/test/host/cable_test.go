package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"kedge/throwaway/lan"
)

const (
	patient   = 10 * time.Second       // for packets that must arrive
	impatient = 300 * time.Millisecond // for packets that must not
)

// twoHosts makes a LAN with the hosts a and b, and returns the cable of a. Cable and LAN are
// closed after the test.
func twoHosts(t *testing.T) (a, b *lan.Host, cable *Cable) {
	t.Helper()
	RequireRoot(t)
	before := links(t)
	l, err := lan.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		if after := links(t); !slices.Equal(before, after) {
			t.Errorf("the machine's interfaces: %v, before %v", after, before)
		}
	})
	if a, err = l.Host("a", netip.MustParsePrefix("192.0.2.1/24"), netip.MustParsePrefix("2001:db8::1/64")); err != nil {
		t.Fatal(err)
	}
	if b, err = l.Host("b", netip.MustParsePrefix("192.0.2.2/24"), netip.MustParsePrefix("2001:db8::2/64")); err != nil {
		t.Fatal(err)
	}
	cable = CableOf(a)
	t.Cleanup(func() {
		if err := cable.Repair(); err != nil {
			t.Error(err)
		}
	})
	return a, b, cable
}

// links lists interfaces of the machine's own network with names as the switch and the relay
// give. Others may come and go meanwhile.
func links(t *testing.T) []string {
	t.Helper()
	all, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range all {
		if l.Name == lan.Bridge || strings.HasPrefix(l.Name, "fp") {
			names = append(names, l.Name)
		}
	}
	return names
}

// sockets gives a datagram socket to each of two hosts.
func sockets(t *testing.T, a, b *lan.Host) (pa, pb net.PacketConn) {
	t.Helper()
	open := func(h *lan.Host, addr string) net.PacketConn {
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

func impair(t *testing.T, c *Cable, out, in Fault) {
	t.Helper()
	if err := c.Impair(out, in); err != nil {
		t.Fatal(err)
	}
}

func TestOneDirectionIsCut(t *testing.T) {
	a, b, cable := twoHosts(t)
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
		impair(t, cable, c.out, c.in)
		send(t, c.from, c.to, 3)
		if got := received(c.to, 1, impatient); len(got) > 0 {
			t.Errorf("%s: packets arrive", c.name)
		}
		send(t, c.to, c.from, 3)
		if got := received(c.from, 3, patient); len(got) != 3 {
			t.Errorf("%s: the other direction loses packets: %v", c.name, got)
		}
	}
	if err := cable.Repair(); err != nil {
		t.Fatal(err)
	}
	send(t, pb, pa, 3)
	if got := received(pa, 3, patient); len(got) != 3 {
		t.Errorf("after Repair: %v", got)
	}
}

func TestLossAndDuplicates(t *testing.T) {
	a, b, cable := twoHosts(t)
	pa, pb := sockets(t, a, b)
	send(t, pa, pb, 1)
	received(pb, 1, patient)
	impair(t, cable, Fault{Loss: 0.5}, Fault{})
	send(t, pa, pb, 200)
	if got := received(pb, 200, impatient); len(got) < 50 || len(got) > 150 {
		t.Errorf("of 200 packets, of which half get lost, %d arrive", len(got))
	}
	impair(t, cable, Fault{Duplicate: 1}, Fault{})
	send(t, pa, pb, 20)
	if got := received(pb, 40, patient); len(got) != 40 {
		t.Errorf("20 doubled packets arrive as %d", len(got))
	}
}

func TestDelayAndOrder(t *testing.T) {
	a, b, cable := twoHosts(t)
	pa, pb := sockets(t, a, b)
	const delay = 50 * time.Millisecond
	impair(t, cable, Fault{Delay: delay, Jitter: delay / 2}, Fault{})
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
	impair(t, cable, Fault{Delay: delay, Reorder: 0.5}, Fault{})
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
	a, b, cable := twoHosts(t)
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
			impair(t, cable, c.f, c.f)
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
	_, _, cable := twoHosts(t)
	for _, f := range []Fault{{Loss: 1.1}, {Duplicate: -1}, {Delay: 1, Jitter: 2}, {Reorder: 1}, {Rate: -1}, {Delay: -1}} {
		if err := cable.Impair(f, Fault{}); err == nil {
			t.Errorf("%+v is accepted", f)
		}
	}
}
