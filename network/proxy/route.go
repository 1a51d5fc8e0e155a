package proxy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// routeProtocol marks kedge's routes: `ip route` prints it. Numbers above 192 are
// unassigned.
const routeProtocol = 212

// ensureRoutes lets the node's own processes connect to services on a machine without a
// default route. The kernel looks for a route before it translates the destination; the
// target of that route does not matter, but without one the connection fails. Machines with
// a route are left unchanged.
func ensureRoutes(ranges []netip.Prefix, nodeIPs []netip.Addr) error {
	for _, r := range ranges {
		var unreachable bool
		if _, err := netlink.RouteGet(r.Addr().Next().AsSlice()); err != nil {
			if !errors.Is(err, unix.ENETUNREACH) {
				return fmt.Errorf("look for a route to services: %w", err)
			}
			unreachable = true
		}
		for _, a := range nodeIPs {
			if !unreachable || a.Is6() != r.Addr().Is6() {
				continue
			}
			route, err := serviceRoute(r)
			if err != nil {
				return err
			}
			route.Src = a.AsSlice()
			if err := netlink.RouteReplace(route); err != nil {
				return fmt.Errorf("add a route to services: %w", err)
			}
		}
	}
	return nil
}

// Cleanup removes the routes that a node's proxy has left; its rules are removed with the
// network's. The node's processes must have ended.
func Cleanup(cfg Config) error {
	var errs []error
	for _, r := range cfg.ServiceRanges {
		route, err := serviceRoute(r)
		if err == nil {
			err = netlink.RouteDel(route)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.EAFNOSUPPORT) {
			errs = append(errs, fmt.Errorf("remove the route to services: %w", err))
		}
	}
	return errors.Join(errs...)
}

func serviceRoute(r netip.Prefix) (*netlink.Route, error) {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return nil, fmt.Errorf("find the loopback interface: %w", err)
	}
	return &netlink.Route{
		LinkIndex: lo.Attrs().Index, Protocol: routeProtocol, Scope: netlink.SCOPE_LINK,
		Dst: &net.IPNet{IP: r.Addr().AsSlice(), Mask: net.CIDRMask(r.Bits(), r.Addr().BitLen())},
	}, nil
}
