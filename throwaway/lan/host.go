package lan

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/internal/namespaces"
)

// Host is a network namespace joined to a LAN: a machine as far as its network goes.
type Host struct {
	Name string

	lan    *LAN
	ns     *namespaces.Network
	nl     *netlink.Handle
	cable  string         // the switch's end of the uplink
	addrs  []netip.Prefix // of the uplink
	routes []route
}

type route struct {
	dst netip.Prefix
	via netip.Addr
}

func newHost(l *LAN, name string) (*Host, error) {
	ns, err := namespaces.NewNetwork()
	if err != nil {
		return nil, err
	}
	h := &Host{Name: name, lan: l, ns: ns}
	if h.nl, err = routeHandle(ns); err != nil {
		return nil, errors.Join(err, ns.Close())
	}
	lo, err := h.nl.LinkByName("lo")
	if err == nil {
		err = h.nl.LinkSetUp(lo)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("loopback: %w", err), h.release())
	}
	return h, nil
}

// hardwareAddr is the hardware address of a host's uplink. It depends only on the host's name,
// because a machine keeps its address over a reboot.
func hardwareAddr(name string) net.HardwareAddr {
	sum := sha256.Sum256([]byte(name))
	return append(net.HardwareAddr{0x02}, sum[:5]...) // locally administered
}

// join plugs the host into the switch. Caller holds lan.mu.
func (h *Host) join(addrs []netip.Prefix) error {
	var err error
	if h.cable, err = h.lan.freeCable(); err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = h.cable
	attrs.MasterIndex = h.lan.bridge.Attrs().Index
	cable := netlink.NewVeth(attrs)
	cable.PeerName = Uplink
	cable.PeerHardwareAddr = hardwareAddr(h.Name)
	cable.PeerNamespace = netlink.NsFd(h.ns.FD())
	if err := h.lan.nl.LinkAdd(cable); err != nil {
		return fmt.Errorf("add cable: %w", err)
	}
	if err := h.lan.nl.LinkSetUp(cable); err != nil {
		return err
	}
	uplink, err := h.nl.LinkByName(Uplink)
	if err != nil {
		return err
	}
	if err := h.nl.LinkSetUp(uplink); err != nil {
		return err
	}
	for _, p := range addrs {
		if err := h.AddAddr(p); err != nil {
			return err
		}
	}
	return kernelnet.WaitCarrier(h.lan.nl, cable.Attrs().Index) // the switch's end was set up before the uplink
}

// find fills in the fields of an adopted host that newHost and join would have set.
func (h *Host) find() error {
	uplink, err := h.nl.LinkByName(Uplink)
	if err != nil {
		return err
	}
	cable, err := h.lan.nl.LinkByIndex(uplink.Attrs().ParentIndex)
	if err != nil {
		return fmt.Errorf("its cable is not plugged into the switch: %w", err)
	}
	h.cable = cable.Attrs().Name
	addrs, err := kernelnet.List(func() ([]netlink.Addr, error) { return h.nl.AddrList(uplink, netlink.FAMILY_ALL) })
	if err != nil {
		return err
	}
	for _, a := range addrs {
		ip, ok := netip.AddrFromSlice(a.IP)
		if bits, _ := a.Mask.Size(); ok && !ip.Unmap().IsLinkLocalUnicast() {
			h.addrs = append(h.addrs, netip.PrefixFrom(ip.Unmap(), bits))
		}
	}
	routes, err := h.nl.RouteList(uplink, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, r := range routes {
		via, ok := netip.AddrFromSlice(r.Gw)
		if !ok || r.Dst == nil {
			continue
		}
		dst, ok := netip.AddrFromSlice(r.Dst.IP)
		if bits, _ := r.Dst.Mask.Size(); ok {
			h.routes = append(h.routes, route{netip.PrefixFrom(dst.Unmap(), bits), via.Unmap()})
		}
	}
	return nil
}

// Addrs returns the addresses of the uplink.
func (h *Host) Addrs() []netip.Prefix { return slices.Clone(h.addrs) }

// Renumber replaces all addresses of the uplink, as a move to another network does. Routes
// whose gateways are still on the link are kept.
func (h *Host) Renumber(addrs ...netip.Prefix) error {
	routes := h.routes
	h.routes = nil
	for _, p := range slices.Clone(h.addrs) {
		if err := h.DelAddr(p); err != nil {
			return err
		}
	}
	for _, p := range addrs {
		if err := h.AddAddr(p); err != nil {
			return err
		}
	}
	for _, r := range routes {
		if slices.ContainsFunc(addrs, func(p netip.Prefix) bool { return p.Contains(r.via) }) {
			if err := h.Route(r.dst, r.via); err != nil {
				return err
			}
		}
	}
	return nil
}

// AddAddr adds an address to the uplink, usable at once.
func (h *Host) AddAddr(p netip.Prefix) error {
	uplink, err := h.nl.LinkByName(Uplink)
	if err != nil {
		return err
	}
	if err := addAddr(h.nl, uplink, p); err != nil {
		return err
	}
	h.addrs = append(h.addrs, p)
	return nil
}

func addAddr(nl *netlink.Handle, link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p)}
	if p.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := nl.AddrAdd(link, addr); err != nil {
		return fmt.Errorf("add address %s: %w", p, err)
	}
	return nil
}

// DelAddr removes an address from the uplink.
func (h *Host) DelAddr(p netip.Prefix) error {
	uplink, err := h.nl.LinkByName(Uplink)
	if err != nil {
		return err
	}
	if err := h.nl.AddrDel(uplink, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
		return fmt.Errorf("remove address %s: %w", p, err)
	}
	h.addrs = slices.DeleteFunc(h.addrs, func(have netip.Prefix) bool { return have == p })
	return nil
}

// Route adds a route through a gateway, the default route for 0.0.0.0/0 or ::/0.
func (h *Host) Route(dst netip.Prefix, via netip.Addr) error {
	uplink, err := h.nl.LinkByName(Uplink)
	if err != nil {
		return err
	}
	r := &netlink.Route{LinkIndex: uplink.Attrs().Index, Dst: ipNet(dst), Gw: via.AsSlice()}
	if err := h.nl.RouteReplace(r); err != nil {
		return fmt.Errorf("add route to %s: %w", dst, err)
	}
	h.routes = append(slices.DeleteFunc(h.routes, func(r route) bool { return r.dst == dst }), route{dst, via})
	return nil
}

// Path names the host's namespace for other processes; see namespaces.Network.Path.
func (h *Host) Path() string { return h.ns.Path() }

// LAN is the switch that the host is joined to.
func (h *Host) LAN() *LAN { return h.lan }

// Port is the name of the switch's end of the host's cable.
func (h *Host) Port() string { return h.cable }

// Netlink returns a routing socket in the host, for operations without a method here.
func (h *Host) Netlink() *netlink.Handle { return h.nl }

// Do runs fn on a thread in the host. Sockets that fn opens stay there. net.Dial and net.Listen
// are safe in fn with literal addresses, but not with names: lookups run on other goroutines.
func (h *Host) Do(fn func() error) error { return h.ns.Do(fn) }

// Start starts a prepared command in the host. The caller waits for it, and ends it before it
// closes the LAN.
func (h *Host) Start(cmd *exec.Cmd) error { return h.Do(cmd.Start) }

// Output runs a program in the host and returns its output and standard error.
func (h *Host) Output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out []byte
	err := h.Do(func() (err error) {
		out, err = cmd.CombinedOutput()
		return err
	})
	if err != nil {
		return out, fmt.Errorf("%s on host %s: %w: %s", name, h.Name, err, out)
	}
	return out, nil
}

// Dial connects from inside the host to a literal address.
func (h *Host) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	var conn net.Conn
	err := h.Do(func() (err error) {
		var d net.Dialer
		conn, err = d.DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// Listen opens a listening socket inside the host on a literal address.
func (h *Host) Listen(network, addr string) (net.Listener, error) {
	var l net.Listener
	err := h.Do(func() (err error) {
		l, err = net.Listen(network, addr)
		return err
	})
	return l, err
}

// ListenPacket opens a datagram socket inside the host on a literal address.
func (h *Host) ListenPacket(network, addr string) (net.PacketConn, error) {
	var c net.PacketConn
	err := h.Do(func() (err error) {
		c, err = net.ListenPacket(network, addr)
		return err
	})
	return c, err
}

// Cut unplugs the host's cable: the switch's end goes down, and the host's end loses its
// carrier.
func (h *Host) Cut() error { return h.plug(false) }

// Restore undoes Cut.
func (h *Host) Restore() error { return h.plug(true) }

// Drop makes the host drop packets that it sends to a range, which must be smaller than its
// link's, such as one address. Packets then go in one direction only; the other direction and
// all other hosts are not affected.
func (h *Host) Drop(dst netip.Prefix) error {
	if err := h.nl.RouteReplace(blackhole(dst)); err != nil {
		return fmt.Errorf("drop packets to %s: %w", dst, err)
	}
	return nil
}

// Undrop undoes Drop.
func (h *Host) Undrop(dst netip.Prefix) error {
	if err := h.nl.RouteDel(blackhole(dst)); err != nil {
		return fmt.Errorf("let packets to %s pass: %w", dst, err)
	}
	return nil
}

func blackhole(dst netip.Prefix) *netlink.Route {
	return &netlink.Route{Dst: ipNet(dst.Masked()), Type: unix.RTN_BLACKHOLE}
}

func (h *Host) plug(in bool) error {
	cable, err := h.lan.nl.LinkByName(h.cable)
	if err != nil {
		return fmt.Errorf("cable of host %s: %w", h.Name, err)
	}
	if in {
		return h.lan.nl.LinkSetUp(cable)
	}
	return h.lan.nl.LinkSetDown(cable)
}

// Close removes the host from its LAN.
func (h *Host) Close() error {
	h.lan.mu.Lock()
	defer h.lan.mu.Unlock()
	if h.lan.hosts[h.Name] != h {
		return nil // closed before, alone or with the LAN
	}
	delete(h.lan.hosts, h.Name)
	return h.unplug()
}

// unplug removes the cable and releases the namespace. Caller holds lan.mu.
func (h *Host) unplug() error {
	cable, err := h.lan.nl.LinkByName(h.cable)
	if err == nil {
		err = h.lan.nl.LinkDel(cable)
	}
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) || errors.Is(err, unix.ENODEV) {
		err = nil // removed with the namespace at its other end
	}
	return errors.Join(err, h.release())
}

// release closes the host's files, after which the kernel removes the namespace.
func (h *Host) release() error {
	if h.nl != nil {
		h.nl.Close()
	}
	return h.ns.Close()
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
