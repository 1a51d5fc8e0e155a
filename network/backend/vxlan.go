package backend

import (
	"errors"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// planVXLAN is one interface for each family between nodes that is in use, usually
// one. Nothing is learned and nothing is broadcast: for each peer there is the
// hardware address of its end, where that is (forwarding entry), the peer's gateway
// address with it (neighbour), and a route to its pods over the gateway.
//
// With no peer there is no interface: a cluster of one machine needs no VXLAN.
//
// mtu is that of the interface between the nodes.
func planVXLAN(cfg Config, own node, peers []node, mtu int) (plan, error) {
	var p plan
	var errs []error
	m := marks(own.name)
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

// tunnelToNode sends what pods send to a peer's own addresses through the tunnel. It
// would find its way outside of the tunnel too, but not the answers: the peer sends
// what is for pods through the tunnel, and what comes from there with the peer's
// address must be what went there. Only pods' packets are concerned: the tunnel's own
// would go round in circles. IPv4 packets are known by a mark (nft.TunnelTOS), and IPv6
// packets, for which the kernel finds no routes by that, by a rule for their source.
func (p *plan) tunnelToNode(own, peer node, ipv6 bool, via netip.Addr, link string, table int) {
	for _, a := range peer.addrs {
		if a.Is6() != ipv6 {
			continue
		}
		p.peers = append(p.peers, a)
		r := route{dst: netip.PrefixFrom(a, a.BitLen()), via: via, link: link, table: unix.RT_TABLE_MAIN, tos: nft.TunnelTOS}
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

// gateways are the node's addresses in its own pod ranges.
func (n node) gateways() []netip.Addr {
	var out []netip.Addr
	for _, ipv6 := range []bool{false, true} {
		if a, ok := n.gateway(ipv6); ok {
			out = append(out, a)
		}
	}
	return out
}
