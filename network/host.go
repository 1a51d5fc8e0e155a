package network

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fallbackMTU is used on a machine without a default route.
const fallbackMTU = 1500

// mtu returns what pods get: as configured, or the most that fits the way out and the
// way to other nodes. Caller holds mu.
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
	if between == 0 { // the node's address is not there now
		between = least
	}
	return max(min(least, between-n.cfg.Overhead), minMTU), nil
}

// mtuOfAddr returns the least MTU of the interfaces that have one of the addresses, or
// 0 where none has.
func mtuOfAddr(addrs []netip.Addr) (int, error) {
	if len(addrs) == 0 {
		return 0, nil
	}
	have, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
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
			return 0, fmt.Errorf("look at the interface of the node's address: %w", err)
		}
		if mtu := link.Attrs().MTU; least == 0 || mtu < least {
			least = mtu
		}
	}
	return least, nil
}

// defaultRouteMTU returns the MTU of the interface of the preferred default
// route, or 0 where there is none.
func defaultRouteMTU(family int) (int, error) {
	routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_MAIN}, netlink.RT_FILTER_TABLE)
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
		return 0, fmt.Errorf("look at the interface of the default route: %w", err)
	}
	return max(link.Attrs().MTU, minMTU), nil
}

// enableForwarding makes the machine a router between its pods and the world.
func enableForwarding(ipv6 bool) error {
	if err := setSysctl("net/ipv4/ip_forward", "1"); err != nil {
		return fmt.Errorf("enable IPv4 forwarding: %w", err)
	}
	if !ipv6 {
		return nil
	}
	if err := keepRouterAdvertisements(); err != nil {
		return err
	}
	err := setSysctl("net/ipv6/conf/all/forwarding", "1")
	if errors.Is(err, fs.ErrNotExist) {
		return errors.New("the pod ranges have IPv6, which this kernel lacks or has disabled; boot without ipv6.disable=1, or use IPv4 ranges only")
	}
	if err != nil {
		return fmt.Errorf("enable IPv6 forwarding: %w", err)
	}
	return nil
}

// keepRouterAdvertisements lets hardware interfaces that learn their addresses
// and default route from a router go on doing so: the kernel stops that on a
// machine that forwards, unless accept_ra is 2. Virtual interfaces are left
// alone, because whatever is behind them could make itself our router.
func keepRouterAdvertisements() error {
	const dir = "/proc/sys/net/ipv6/conf"
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at IPv6 interfaces: %w", err)
	}
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join("/sys/class/net", e.Name(), "device")); err != nil {
			continue
		}
		name := filepath.Join("net/ipv6/conf", e.Name(), "accept_ra")
		now, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil || string(bytes.TrimSpace(now)) != "1" {
			continue
		}
		if err := setSysctl(name, "2"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("keep router advertisements on %s: %w", e.Name(), err)
		}
	}
	return nil
}

// setSysctl writes a kernel parameter unless it has the value already: writing
// forwarding again would reset other parameters.
func setSysctl(name, value string) error {
	path := filepath.Join("/proc/sys", name)
	now, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if string(bytes.TrimSpace(now)) == value {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0)
}
