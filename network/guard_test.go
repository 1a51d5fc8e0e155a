package network

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// send sends a datagram on the pod's interface as a container with raw sockets can: with
// any source and destination.
func (p *pod) send(src, dst netip.AddrPort) error {
	return p.ns.Do(func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		neighs, err := netlink.NeighList(link.Attrs().Index, unix.AF_INET)
		if err != nil {
			return err
		}
		if len(neighs) == 0 {
			return errors.New("pod does not know its gateway")
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		to := &unix.SockaddrLinklayer{Ifindex: link.Attrs().Index, Halen: 6, Protocol: 0x0008} // IPv4 in network order
		copy(to.Addr[:], neighs[0].HardwareAddr)
		return unix.Sendto(fd, datagram(src, dst), 0, to)
	})
}

// datagram is an IPv4 packet with an empty UDP datagram that has no checksum.
func datagram(src, dst netip.AddrPort) []byte {
	b := make([]byte, 28)
	b[0], b[8], b[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(b[2:], uint16(len(b)))
	copy(b[12:], src.Addr().AsSlice())
	copy(b[16:], dst.Addr().AsSlice())
	var sum uint32
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	binary.BigEndian.PutUint16(b[10:], ^uint16(sum))
	binary.BigEndian.PutUint16(b[20:], src.Port())
	binary.BigEndian.PutUint16(b[22:], dst.Port())
	binary.BigEndian.PutUint16(b[24:], 8)
	return b
}

// arrives reports whether a datagram arrives within a short time.
func arrives(t *testing.T, conn net.PacketConn) bool {
	t.Helper()
	if err := conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, _, err := conn.ReadFrom(make([]byte, 64))
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return err == nil
}

func TestPodsCannotForgeAddresses(t *testing.T) {
	w := newWorld(t, podsV4)
	p, victim := w.pod(port{8000, 80, "TCP", ""}), w.pod()
	var outside, neighbour, loopback net.PacketConn
	listen := func(conn *net.PacketConn, do func(func() error) error, addr string) netip.AddrPort {
		w.must(do(func() (err error) { *conn, err = net.ListenPacket("udp4", addr); return err }))
		t.Cleanup(func() { (*conn).Close() })
		return netip.MustParseAddrPort(addr)
	}
	far := listen(&outside, w.outside.Do, "192.0.2.9:7")
	near := listen(&neighbour, victim.ns.Do, at(victim.addrs[0], 80))
	local := listen(&loopback, here, "127.0.0.1:99")

	own := netip.AddrPortFrom(p.addrs[0], 1000)
	forged := netip.AddrPortFrom(victim.addrs[0], 1000)
	for _, c := range []struct {
		what     string
		src, dst netip.AddrPort
		at       net.PacketConn
		want     bool
	}{
		{"own address to the outside", own, far, outside, true},
		{"own address to another pod", own, near, neighbour, true},
		{"another pod's address to the outside", forged, far, outside, false},
		{"another pod's address to that pod", forged, near, neighbour, false},
		{"an outside address to another pod", netip.MustParseAddrPort("192.0.2.77:1"), near, neighbour, false},
		{"own address to the node's loopback", own, local, loopback, false},
	} {
		w.must(p.send(c.src, c.dst))
		if got := arrives(t, c.at); got != c.want {
			t.Errorf("%s: arrives: %v, want %v", c.what, got, c.want)
		}
	}
}
