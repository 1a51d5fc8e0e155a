package dns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks the routes that make the cluster's DNS addresses local as
// kedge's: `ip route show table local` prints it. Numbers above 192 are for anybody
// (rtnetlink(7) and iproute2's rt_protos leave them free).
const routeProtocol = 212

// claim makes addresses local to this machine. A route of type local does that without
// an interface: what is sent to the address is delivered here, from pods, from the node
// and from pods in the host's network, and no other machine learns of it.
func claim(addrs []netip.Addr) error {
	for _, a := range addrs {
		r, err := route(a)
		if err == nil {
			err = netlink.RouteReplace(r)
		}
		if err != nil {
			return fmt.Errorf("make the DNS address %s local: %w", a, err)
		}
	}
	return nil
}

// Cleanup removes the addresses of a resolver that has ended.
func Cleanup(addresses []netip.Addr) error {
	var errs []error
	for _, a := range addresses {
		r, err := route(a)
		if err == nil {
			err = netlink.RouteDel(r)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENODEV) && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, fmt.Errorf("remove the DNS address %s: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

func route(a netip.Addr) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find the loopback interface: %w", err)
	}
	r := &netlink.Route{
		Dst:       &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())},
		LinkIndex: lo.Attrs().Index, Table: unix.RT_TABLE_LOCAL, Type: unix.RTN_LOCAL, Protocol: routeProtocol,
	}
	if a.Is4() {
		r.Scope = netlink.SCOPE_HOST
	}
	return r, nil
}
