// Package linkcast sends datagrams to, and hears them from, machines on the same links
// whose addresses are not known: by multicast.
//
// Anybody on a link can send such datagrams, with any source: what is heard is a hint
// where to look, and never proof of anything. The package does not know what is said.
// It may be imported by datastore and internal/calls.
package linkcast

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// maxLinks bounds the links that are used. The kernel lets a socket be in 20 groups.
const maxLinks = 16

// groups are where datagrams are sent to: that of sites for IPv4 (RFC 2365), and one of
// the link for IPv6.
func groups() (ip4, ip6 netip.Addr) {
	return netip.MustParseAddr("239.255.75.71"), netip.MustParseAddr("ff02::6b:6564:6765")
}

// Open makes a socket at a port, which other sockets of the machine can share. Zero is any
// port, for those who only send.
func Open(ctx context.Context, port uint16) (net.PacketConn, error) {
	lc := net.ListenConfig{Control: shareAddress}
	return lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", port))
}

// Join makes a socket hear what is sent on the links. To join again is an error that does
// not matter.
func Join(conn net.PacketConn, links []net.Interface) {
	ip4, ip6 := groups()
	c4, c6 := ipv4.NewPacketConn(conn), ipv6.NewPacketConn(conn)
	for _, link := range links {
		_ = c4.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip4, 0)))
		_ = c6.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip6, 0)))
	}
}

// Send sends a packet to a port of all machines on the links. A link may have no address
// of a family; then there is nobody to be reached on it.
func Send(conn net.PacketConn, links []net.Interface, packet []byte, port uint16) {
	ip4, ip6 := groups()
	c4, c6 := ipv4.NewPacketConn(conn), ipv6.NewPacketConn(conn)
	for _, link := range links {
		if err := c4.SetMulticastInterface(&link); err == nil {
			_, _ = conn.WriteTo(packet, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip4, port)))
		}
		if err := c6.SetMulticastInterface(&link); err == nil {
			_, _ = conn.WriteTo(packet, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip6.WithZone(link.Name), port)))
		}
	}
}

// Links are those on which other machines may be: with an address out of a network, and
// not just of their own, as the links to pods have. The oldest come first, which are the
// machine's own.
func Links() []net.Interface {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	slices.SortFunc(all, func(a, b net.Interface) int { return a.Index - b.Index })
	links := slices.DeleteFunc(all, func(l net.Interface) bool {
		return l.Flags&net.FlagUp == 0 || l.Flags&net.FlagMulticast == 0 || l.Flags&net.FlagLoopback != 0 || !hasNetwork(l)
	})
	return links[:min(len(links), maxLinks)]
}

func hasNetwork(l net.Interface) bool {
	addrs, err := l.Addrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		if !ok {
			return false
		}
		ones, bits := n.Mask.Size()
		return ones < bits && n.IP.IsGlobalUnicast()
	})
}

// shareAddress lets several sockets of one machine hear the same datagrams.
func shareAddress(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}
