package beacon

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

// maxLinks bounds the links in use. The kernel lets a socket be in 20 groups.
const maxLinks = 16

// groups are the multicast groups: one of site scope for IPv4 (RFC 2365), and one of link
// scope for IPv6.
func groups() (ip4, ip6 netip.Addr) {
	return netip.MustParseAddr("239.255.75.71"), netip.MustParseAddr("ff02::6b:6564:6765")
}

// Open makes a socket at a port, which other sockets of the machine can share. Port zero is
// any port, for a socket that only sends.
func Open(ctx context.Context, port uint16) (net.PacketConn, error) {
	lc := net.ListenConfig{Control: shareAddress}
	return lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", port))
}

// Join makes a socket receive datagrams that are sent on the links. Joining twice is
// harmless.
func Join(conn net.PacketConn, links []net.Interface) {
	ip4, ip6 := groups()
	c4, c6 := ipv4.NewPacketConn(conn), ipv6.NewPacketConn(conn)
	for _, link := range links {
		_ = c4.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip4, 0)))
		_ = c6.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(ip6, 0)))
	}
}

// Send sends a packet to a port of all machines on the links. A link without an address of
// a family is left out for that family.
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

// Links returns the links that other machines may be on: links whose address has a network,
// which the host's ends of links to pods have not. The oldest come first: the machine's own
// interfaces.
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

// shareAddress lets several sockets of one machine receive the same datagrams.
func shareAddress(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}
