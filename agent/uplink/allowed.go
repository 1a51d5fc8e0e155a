package uplink

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/tunnel"
)

// allowed returns nil when servers may have a connection to an address besides the
// kubelet: one of the cluster's pods and services, and none that own says is this
// machine's. The range of its pods begins with one, and the cluster's DNS is another.
func allowed(a netip.Addr, ranges []netip.Prefix, own func(netip.Addr) (bool, error)) error {
	cluster := slices.ContainsFunc(ranges, func(p netip.Prefix) bool { return p.Contains(a) })
	if !cluster || a.IsLoopback() || a.IsUnspecified() || a.IsMulticast() || a.IsLinkLocalUnicast() {
		return fmt.Errorf("%w: %s is neither a pod's nor a service's address", tunnel.ErrForbidden, a)
	}
	switch is, err := own(a); {
	case err != nil:
		return fmt.Errorf("look up the way to %s: %w", a, err)
	case is:
		return fmt.Errorf("%w: %s is the node's own", tunnel.ErrForbidden, a)
	}
	return nil
}

// isOwn asks the kernel whether packets to an address would stay on this machine.
func isOwn(a netip.Addr) (bool, error) {
	routes, err := netlink.RouteGet(a.AsSlice())
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool { return r.Type == unix.RTN_LOCAL }), nil
}
