package backend

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// onLink returns the interface on whose link an address is, or an error with the router
// through which it is reached.
func onLink(a netip.Addr) (string, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return "", fmt.Errorf("there is no route to %s: %w", a, err)
	}
	for _, r := range routes {
		if len(r.Gw) > 0 {
			return "", fmt.Errorf("%s is not on a link of this node but behind the router %s", a, r.Gw)
		}
		link, err := netlink.LinkByIndex(r.LinkIndex)
		if err != nil {
			return "", fmt.Errorf("read the interface towards %s: %w", a, err)
		}
		return link.Attrs().Name, nil
	}
	return "", fmt.Errorf("there is no route to %s", a)
}

// planHostGW returns a route for each range of each peer, with the peer as the next hop.
// find returns the interface of an address.
func planHostGW(own node, peers []node, find func(netip.Addr) (string, error)) (plan, error) {
	var p plan
	var errs []error
	for _, peer := range peers {
		for _, r := range peer.ranges {
			ipv6 := r.Addr().Is6()
			if _, ok := own.gateway(ipv6); !ok {
				continue // no pod here has an address of this family
			}
			via, ok := first(peer.tunnel, ipv6)
			if !ok {
				errs = append(errs, fmt.Errorf("node %s has pods in %s but no address of that family: give it one with --node-ip", peer.name, r))
				continue
			}
			link, err := find(via)
			if err != nil {
				errs = append(errs, fmt.Errorf("pods of node %s cannot be reached with --flannel-backend=host-gw: %w; use vxlan", peer.name, err))
				continue
			}
			p.routes = append(p.routes, route{dst: r, via: via, link: link, table: unix.RT_TABLE_MAIN})
			for _, a := range peer.addrs {
				if a.Is6() == ipv6 {
					p.peers = append(p.peers, a)
				}
			}
		}
	}
	return p, errors.Join(errs...)
}
