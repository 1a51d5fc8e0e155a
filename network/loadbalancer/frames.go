package loadbalancer

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
)

const (
	ethernetLen = 14
	arpLen      = 28
	ipv6Len     = 40

	etherARP  = 0x0806
	etherIPv6 = 0x86DD

	arpRequest = 1
	arpReply   = 2

	protocolICMPv6 = 58
	solicitation   = 135
	advertisement  = 136

	flagSolicited = 0x40
	flagOverride  = 0x20

	optionSource = 1
	optionTarget = 2
)

var broadcast = net.HardwareAddr{0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF}

// allNodes is the multicast group of all IPv6 hosts on a link.
var allNodes = netip.MustParseAddr("ff02::1")

// request is an ARP request or a neighbour solicitation for an address.
type request struct {
	target netip.Addr
	sender netip.Addr       // unspecified for duplicate address detection
	mac    net.HardwareAddr // of the sender
}

func ethernet(to, from net.HardwareAddr, kind uint16) []byte {
	return binary.BigEndian.AppendUint16(slices.Concat([]byte(to), []byte(from)), kind)
}

// parseARP parses a frame; ok means that it is an ARP request.
func parseARP(f []byte) (q request, ok bool) {
	if len(f) < ethernetLen+arpLen || binary.BigEndian.Uint16(f[12:]) != etherARP {
		return q, false
	}
	a := f[ethernetLen:]
	// Ethernet, IPv4, with addresses of 6 and 4 bytes.
	if binary.BigEndian.Uint16(a) != 1 || binary.BigEndian.Uint16(a[2:]) != 0x0800 || a[4] != 6 || a[5] != 4 || binary.BigEndian.Uint16(a[6:]) != arpRequest {
		return q, false
	}
	q.mac = slices.Clone(net.HardwareAddr(a[8:14]))
	q.sender = netip.AddrFrom4([4]byte(a[14:18]))
	q.target = netip.AddrFrom4([4]byte(a[24:28]))
	return q, q.sender != q.target // otherwise it is an announcement
}

// arp returns an ARP frame: operation, sender and target.
func arp(operation uint16, mac net.HardwareAddr, addr netip.Addr, toMAC net.HardwareAddr, to netip.Addr) []byte {
	destination := toMAC
	target := toMAC
	if operation == arpRequest {
		destination, target = broadcast, make(net.HardwareAddr, 6)
	}
	f := ethernet(destination, mac, etherARP)
	f = binary.BigEndian.AppendUint16(f, 1)
	f = binary.BigEndian.AppendUint16(f, 0x0800)
	f = append(f, 6, 4)
	f = binary.BigEndian.AppendUint16(f, operation)
	f = append(append(f, mac...), addr.AsSlice()...)
	return append(append(f, target...), to.AsSlice()...)
}

// parseSolicitation parses a frame; ok means that it is a neighbour solicitation.
func parseSolicitation(f []byte) (q request, ok bool) {
	const icmp = ethernetLen + ipv6Len
	if len(f) < icmp+24 || binary.BigEndian.Uint16(f[12:]) != etherIPv6 {
		return q, false
	}
	ip := f[ethernetLen:]
	n := int(binary.BigEndian.Uint16(ip[4:]))
	// A hop limit of 255 means that no router has forwarded it (RFC 4861, 7.1.1).
	if ip[6] != protocolICMPv6 || ip[7] != 255 || n < 24 || len(f) < icmp+n || f[icmp] != solicitation || f[icmp+1] != 0 {
		return q, false
	}
	body := f[icmp : icmp+n]
	q.sender = netip.AddrFrom16([16]byte(ip[8:24]))
	q.target = netip.AddrFrom16([16]byte(body[8:24]))
	q.mac = slices.Clone(net.HardwareAddr(f[6:12]))
	if checksum(q.sender, netip.AddrFrom16([16]byte(ip[24:40])), body) != 0 {
		return q, false
	}
	for o := body[24:]; len(o) >= 8 && o[1] > 0 && int(o[1])*8 <= len(o); o = o[int(o[1])*8:] {
		if o[0] == optionSource && o[1] == 1 {
			q.mac = slices.Clone(net.HardwareAddr(o[2:8]))
		}
	}
	return q, true
}

// advertise returns a neighbour advertisement with the hardware address of an IPv6 address;
// source is the sender's address.
func advertise(mac net.HardwareAddr, addr, source netip.Addr, toMAC net.HardwareAddr, to netip.Addr, flags byte) []byte {
	body := []byte{advertisement, 0, 0, 0, flags, 0, 0, 0}
	body = append(body, addr.AsSlice()...)
	body = append(append(body, optionTarget, 1), mac...)
	binary.BigEndian.PutUint16(body[2:], checksum(source, to, body))
	f := ethernet(toMAC, mac, etherIPv6)
	f = append(f, 0x60, 0, 0, 0)
	f = binary.BigEndian.AppendUint16(f, uint16(len(body)))
	f = append(f, protocolICMPv6, 255)
	f = append(append(f, source.AsSlice()...), to.AsSlice()...)
	return append(f, body...)
}

// checksum returns the ICMPv6 checksum with its pseudo header (RFC 8200, 8.1); over a
// message with a checksum, it is 0 if the message is undamaged.
func checksum(from, to netip.Addr, body []byte) uint16 {
	var sum uint32
	add := func(b []byte) {
		for i := 0; i+1 < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		if len(b)%2 == 1 {
			sum += uint32(b[len(b)-1]) << 8
		}
	}
	add(from.AsSlice())
	add(to.AsSlice())
	add(body)
	sum += uint32(len(body)) + protocolICMPv6
	for sum>>16 != 0 {
		sum = sum&0xFFFF + sum>>16
	}
	return ^uint16(sum)
}

// solicitedNode returns the solicited-node group of an address.
func solicitedNode(a netip.Addr) netip.Addr {
	b := a.As16()
	g := netip.MustParseAddr("ff02::1:ff00:0").As16()
	copy(g[13:], b[13:])
	return netip.AddrFrom16(g)
}

// groupMAC returns the hardware address of an IPv6 multicast group.
func groupMAC(g netip.Addr) net.HardwareAddr {
	b := g.As16()
	return net.HardwareAddr{0x33, 0x33, b[12], b[13], b[14], b[15]}
}
