package kernelnet

import (
	"errors"
	"net"
	"net/netip"
	"slices"
)

// ErrNoAddress means that the machine has no address that another machine could use.
var ErrNoAddress = errors.New("this machine has no network address besides loopback; connect it, or give it an address and name it with --node-ip")

// FindAddresses returns the address that the default route would use, for each of the
// wanted families, or where there is no such route the first global address of
// an interface that is up. Addresses in the ranges of except are the cluster's own, on
// interfaces that kedge has made, and not the machine's.
func FindAddresses(ipv4, ipv6 bool, except []netip.Prefix) ([]netip.Addr, error) {
	var out []netip.Addr
	if ipv4 {
		if a, ok := find(true, except); ok {
			out = append(out, a)
		}
	}
	if ipv6 {
		if a, ok := find(false, except); ok {
			out = append(out, a)
		}
	}
	if len(out) == 0 {
		return nil, ErrNoAddress
	}
	return out, nil
}

func find(ipv4 bool, except []netip.Prefix) (netip.Addr, bool) {
	usable := func(a netip.Addr) bool {
		return usable(a) && !slices.ContainsFunc(except, func(r netip.Prefix) bool { return r.Contains(a) })
	}
	// Connecting a datagram socket only asks the routing table. The addresses
	// are from the ranges for documentation.
	network, far := "udp6", "[2001:db8::1]:9"
	if ipv4 {
		network, far = "udp4", "192.0.2.1:9"
	}
	if c, err := net.Dial(network, far); err == nil {
		defer c.Close()
		if u, ok := c.LocalAddr().(*net.UDPAddr); ok {
			if a := u.AddrPort().Addr().Unmap(); usable(a) {
				return a, true
			}
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		return netip.Addr{}, false
	}
	// The order of indexes is the order in which links were made: the machine's
	// own come before those of containers.
	slices.SortFunc(links, func(a, b net.Interface) int { return a.Index - b.Index })
	for _, l := range links {
		if l.Flags&net.FlagUp == 0 || l.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := l.Addrs()
		if err != nil {
			continue
		}
		for _, addr := range addrs {
			n, ok := addr.(*net.IPNet)
			if !ok {
				continue
			}
			if a, ok := netip.AddrFromSlice(n.IP); ok && a.Unmap().Is4() == ipv4 && usable(a.Unmap()) {
				return a.Unmap(), true
			}
		}
	}
	return netip.Addr{}, false
}

// AddressTowards returns the address from which this machine sends to another one; false where
// it has no way there.
func AddressTowards(far netip.Addr) (netip.Addr, bool) {
	c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(far, 9)))
	if err != nil {
		return netip.Addr{}, false
	}
	defer c.Close()
	u, ok := c.LocalAddr().(*net.UDPAddr)
	if !ok {
		return netip.Addr{}, false
	}
	a := u.AddrPort().Addr().Unmap().WithZone("")
	return a, usable(a)
}

// HasAddress reports whether an interface of this machine has the address.
func HasAddress(a netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	return err == nil && slices.ContainsFunc(addrs, func(addr net.Addr) bool {
		n, ok := addr.(*net.IPNet)
		if !ok {
			return false
		}
		have, ok := netip.AddrFromSlice(n.IP)
		return ok && have.Unmap() == a
	})
}

func usable(a netip.Addr) bool { return a.IsGlobalUnicast() && !a.IsLoopback() }
