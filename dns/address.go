package dns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"

	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
)

// routeProtocol marks the routes that make the cluster DNS addresses local: `ip route show
// table local` prints it. Numbers above 192 are unassigned (see rtnetlink(7) and iproute2's
// rt_protos).
const routeProtocol = 212

// addRoutes makes addresses local to this machine. A route of type local does that without
// an interface: packets to the address are delivered on this machine, from pods, from the
// node and from pods in the host network, and no other machine learns of the address.
func addRoutes(addrs []netip.Addr) error {
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

// watchRoutes opens a watch of interfaces and routes.
func watchRoutes() (*kernelnet.Watch, error) {
	w, err := kernelnet.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("watch routes: %w", err)
	}
	return w, nil
}

// watchAddresses adds the routes again when another program has removed one, or an
// interface has changed: when loopback goes down, the kernel removes its routes without an
// event.
func (r *Resolver) watchAddresses(ctx context.Context, routes *kernelnet.Watch) {
	ours := func(msgs []mdnetlink.Message) bool { return slices.ContainsFunc(msgs, relevant) }
	err := routes.Follow(ctx, ours, func() {
		// While loopback is down this fails; the next event comes when it is up.
		if err := addRoutes(r.cfg.Addresses); err != nil {
			r.log.Warn("cannot make the cluster DNS addresses local", "err", err)
		}
	})
	if err != nil {
		r.log.Warn("routes are no longer watched", "err", err)
	}
}

// relevant reports whether a message may mean that a route of kedge was removed. Most
// messages are about pods' routes.
func relevant(m mdnetlink.Message) bool {
	switch {
	case m.Header.Type == unix.RTM_DELROUTE && len(m.Data) >= unix.SizeofRtMsg:
		return m.Data[5] == routeProtocol // rtm_protocol
	case m.Header.Type == unix.RTM_NEWLINK && len(m.Data) >= unix.SizeofIfInfomsg:
		return binary.NativeEndian.Uint32(m.Data[4:]) == loopbackIndex // ifi_index
	}
	return false
}

// loopbackIndex is the index of the loopback interface in every network namespace.
const loopbackIndex = 1

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
