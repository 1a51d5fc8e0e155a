package network

import (
	"fmt"
	"net/netip"
	"slices"

	"kedge/internal/kernelnet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fallbackMTU is the MTU on a machine without a default route.
const fallbackMTU = 1500

// mtu returns the MTU of pods: the configured one, or the largest that fits both the
// default route and the path to other nodes. Caller holds mu.
func (n *Network) mtu() (int, error) {
	if n.cfg.MTU != 0 {
		return n.cfg.MTU, nil
	}
	least := 0
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		mtu, err := defaultRouteMTU(family)
		if err != nil {
			return 0, err
		}
		if mtu != 0 && (least == 0 || mtu < least) {
			least = mtu
		}
	}
	if least == 0 {
		least = fallbackMTU
	}
	between, err := mtuOfAddr(n.nodeIPs)
	if err != nil {
		return 0, err
	}
	if between == 0 { // no interface has the node's address at the moment
		between = least
	}
	return max(min(least, between-n.cfg.Overhead), minMTU), nil
}

// mtuOfAddr returns the smallest MTU of the interfaces with one of the addresses, or 0 if
// there is no such interface.
func mtuOfAddr(addrs []netip.Addr) (int, error) {
	if len(addrs) == 0 {
		return 0, nil
	}
	have, err := kernelnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return 0, fmt.Errorf("list addresses: %w", err)
	}
	least := 0
	for _, h := range have {
		if a, ok := netip.AddrFromSlice(h.IP); !ok || !slices.Contains(addrs, a.Unmap()) {
			continue
		}
		link, err := netlink.LinkByIndex(h.LinkIndex)
		if err != nil {
			return 0, fmt.Errorf("read the interface of the node's address: %w", err)
		}
		if mtu := link.Attrs().MTU; least == 0 || mtu < least {
			least = mtu
		}
	}
	return least, nil
}

// defaultRouteMTU returns the MTU of the interface of the preferred default route, or 0
// without a default route.
func defaultRouteMTU(family int) (int, error) {
	routes, err := kernelnet.List(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return 0, fmt.Errorf("list routes: %w", err)
	}
	var best *netlink.Route
	for i, r := range routes {
		isDefault := r.Dst == nil
		if r.Dst != nil {
			ones, _ := r.Dst.Mask.Size()
			isDefault = ones == 0
		}
		if !isDefault || r.Type != unix.RTN_UNICAST || len(r.MultiPath) == 0 && r.LinkIndex == 0 {
			continue
		}
		if best == nil || r.Priority < best.Priority {
			best = &routes[i]
		}
	}
	if best == nil {
		return 0, nil
	}
	index := best.LinkIndex
	if index == 0 {
		index = best.MultiPath[0].LinkIndex
	}
	link, err := netlink.LinkByIndex(index)
	if err != nil {
		return 0, fmt.Errorf("read the interface of the default route: %w", err)
	}
	return max(link.Attrs().MTU, minMTU), nil
}
