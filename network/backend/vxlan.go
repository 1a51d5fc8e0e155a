package backend

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"kedge/network/nft/pods"
)

// planVXLAN returns one interface for each address family that is in use between nodes,
// usually one. Learning and flooding are off: for each peer there is the hardware address
// of its tunnel end, the node address behind it (forwarding entry), the peer's gateway
// address with it (neighbour), and a route to its pods through the gateway.
//
// Without peers there is no interface: a cluster of one machine needs no VXLAN.
//
// mtu is the MTU of the interface between the nodes.
func planVXLAN(cfg Config, own node, peers []node, mtu int) (plan, error) {
	var p plan
	var errs []error
	m := namesOf(own.name)
	devices := map[bool]*device{} // by whether the nodes speak IPv6
	for _, peer := range peers {
		at, err := between(own, peer)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d := devices[at.Is6()]
		if d == nil {
			d = &device{
				name: m.link4, mtu: mtu - cfg.overhead(at.Is6()),
				vxlan:      &vxlan{cfg.VNI, cfg.VXLANPort, tunnelAddr(own.name), at.Is6()},
				neighbours: map[netip.Addr]string{}, forward: map[string]netip.Addr{},
			}
			if at.Is6() {
				d.name = m.link6
			}
			devices[at.Is6()] = d
		}
		mac := tunnelAddr(peer.name)
		d.forward[mac] = at
		for _, r := range peer.ranges {
			ipv6 := r.Addr().Is6()
			src, ok := own.source(ipv6)
			if !ok {
				continue // no pod here has an address of this family
			}
			via, _ := peer.gateway(ipv6)
			d.neighbours[via] = mac
			p.routes = append(p.routes, route{dst: r, via: via, src: src, link: d.name, table: unix.RT_TABLE_MAIN})
			p.tunnelToNode(own, peer, ipv6, via, d.name, m.number)
		}
	}
	for _, ipv6 := range []bool{false, true} {
		if d := devices[ipv6]; d != nil {
			d.addrs = own.gateways()
			p.links = append(p.links, *d)
		}
	}
	return p, errors.Join(errs...)
}

// tunnelToNode routes packets from pods to a peer's own addresses through the tunnel. They
// could reach the peer outside the tunnel, but the replies could not: the peer sends
// packets for pods through the tunnel, and a packet from the tunnel with the peer's source
// address must belong to a connection through the tunnel. Only packets of pods may take it:
// the tunnel's own packets would loop. IPv4 packets are identified by a mark
// (pods.TunnelTOS), and IPv6 packets, for which the kernel does not use the mark in
// routing, by a rule for their source.
func (p *plan) tunnelToNode(own, peer node, ipv6 bool, via netip.Addr, link string, table int) {
	for _, a := range peer.addrs {
		if a.Is6() != ipv6 {
			continue
		}
		p.peers = append(p.peers, a)
		r := route{dst: netip.PrefixFrom(a, a.BitLen()), via: via, link: link, table: unix.RT_TABLE_MAIN, tos: pods.TunnelTOS}
		if ipv6 {
			r.table, r.tos = table, 0
		}
		p.routes = append(p.routes, r)
	}
	if !ipv6 {
		return
	}
	for _, r := range own.ranges {
		if r.Addr().Is6() && !slices.Contains(p.rules, r) {
			p.rules = append(p.rules, r)
		}
	}
}

// gateways returns the node's addresses in its own pod ranges.
func (n node) gateways() []netip.Addr {
	var out []netip.Addr
	for _, ipv6 := range []bool{false, true} {
		if a, ok := n.gateway(ipv6); ok {
			out = append(out, a)
		}
	}
	return out
}
