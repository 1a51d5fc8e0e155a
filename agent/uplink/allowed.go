package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/tunnel"
)

// allowed returns nil if servers may connect to an address besides the kubelet: a pod or service of the cluster
// that is not an address of this machine according to own. The first address of the node's pod range and the
// cluster's DNS address are addresses of this machine.
func allowed(a netip.Addr, ranges []netip.Prefix, own func(netip.Addr) (bool, error)) error {
	cluster := slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
	if !cluster || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return fmt.Errorf("%w: %s is neither a pod address nor a service address", tunnel.ErrForbidden, a)
	}
	switch is, err := own(a); {
	case err != nil:
		return fmt.Errorf("look up the route to %s: %w", a, err)
	case is:
		return fmt.Errorf("%w: %s is an address of the node itself", tunnel.ErrForbidden, a)
	}
	return nil
}

// isOwn reports whether the kernel would deliver packets to an address on this machine.
func isOwn(a netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Type == unix.RTN_LOCAL }), nil
}
