package backend

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"kedge/internal/kernelnet"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// routeProtocol marks routes and rules: `ip route` prints it. Numbers above 192 are
	// unassigned. Metric and table identify the node, if a machine has several.
	routeProtocol = 213

	// rulePriority places the node's own table before the main one (32766).
	rulePriority = 30213
)

// apply makes the kernel have exactly the content of p for this node. Correct objects are
// not touched. It continues after errors and returns all of them.
func apply(m names, p plan) error {
	var errs []error
	index := map[string]int{}
	for _, d := range p.links {
		i, err := ensureDevice(d)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		index[d.name] = i
	}
	for _, name := range []string{m.link4, m.link6} {
		if !slices.ContainsFunc(p.links, func(d device) bool { return d.name == name }) {
			errs = append(errs, removeDevice(name))
		}
	}
	return errors.Join(append(errs, syncRules(m, p.rules), syncRoutes(m, p.routes, index))...)
}

// ensureDevice creates or corrects an interface and returns its index.
func ensureDevice(d device) (int, error) {
	link, err := netlink.LinkByName(d.name)
	if err = ignoreNotFound(err); err != nil {
		return 0, fmt.Errorf("look for interface %s: %w", d.name, err)
	}
	if link != nil && !d.matches(link) {
		if err := removeDevice(d.name); err != nil {
			return 0, err
		}
		link = nil
	}
	if link == nil {
		if link, err = d.create(); err != nil {
			return 0, err
		}
	}
	wrap := func(err error) error { return fmt.Errorf("interface %s: %w", d.name, err) }
	if link.Attrs().MTU != d.mtu {
		if err := netlink.LinkSetMTU(link, d.mtu); err != nil {
			return 0, wrap(fmt.Errorf("set MTU %d: %w", d.mtu, err))
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		// No machine on the tunnel may make itself the router of this node. Without IPv6
		// the parameter does not exist.
		err := os.WriteFile(filepath.Join("/proc/sys/net/ipv6/conf", d.name, "accept_ra"), []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return 0, wrap(err)
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return 0, wrap(fmt.Errorf("set up: %w", err))
		}
	}
	if err := errors.Join(d.syncAddrs(link), d.syncForward(link), d.syncNeighbours(link)); err != nil {
		return 0, wrap(err)
	}
	return link.Attrs().Index, nil
}

// matches reports whether the immutable properties of an interface are those of the plan.
func (d device) matches(link netlink.Link) bool {
	if d.vxlan == nil {
		return link.Type() == "tuntap" || link.Type() == "tun" || d.wireguard && link.Type() == wireGuardType
	}
	v, ok := link.(*netlink.Vxlan)
	return ok && v.VxlanId == d.vxlan.vni && v.Port == d.vxlan.port && v.HardwareAddr.String() == d.vxlan.mac && !v.Learning
}

func (d device) create() (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = d.name, d.mtu
	var link netlink.Link
	switch {
	case d.wireguard:
		if err := createWireGuard(attrs); err != nil {
			return nil, fmt.Errorf("add interface %s: %w", d.name, err)
		}
		return netlink.LinkByName(d.name)
	case d.vxlan == nil:
		link = tunDevice(attrs)
	default:
		mac, err := net.ParseMAC(d.vxlan.mac)
		if err != nil {
			return nil, err
		}
		attrs.HardwareAddr = mac
		v := &netlink.Vxlan{LinkAttrs: attrs, VxlanId: d.vxlan.vni, Port: d.vxlan.port, Learning: false}
		if d.vxlan.ipv6 {
			// Any IPv6 address of the node. For IPv4 the kernel needs no hint. The source
			// is chosen by route: it follows when the node gets another address.
			v.SrcAddr = net.IPv6zero
		}
		link = v
	}
	err := netlink.LinkAdd(link)
	switch {
	case errors.Is(err, unix.EEXIST) && d.vxlan != nil:
		return nil, fmt.Errorf("another VXLAN interface of this machine, for example of another cluster, has network identifier %d and port %d: remove it (`ip -d link show type vxlan` lists them)", d.vxlan.vni, d.vxlan.port)
	case errors.Is(err, unix.EOPNOTSUPP) && d.vxlan != nil:
		return nil, fmt.Errorf("this kernel has no VXLAN: load the module vxlan, or choose another backend for all nodes with --flannel-backend: %w", err)
	case err != nil:
		return nil, fmt.Errorf("add interface %s: %w", d.name, err)
	}
	return netlink.LinkByName(d.name)
}

func tunDevice(attrs netlink.LinkAttrs) netlink.Link {
	return &netlink.Tuntap{LinkAttrs: attrs, Mode: netlink.TUNTAP_MODE_TUN, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE}
}

func (d device) syncAddrs(link netlink.Link) error {
	have, err := kernelnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_ALL) })
	if err != nil {
		return fmt.Errorf("list addresses: %w", err)
	}
	missing := slices.Clone(d.addrs)
	var errs []error
	for _, h := range have {
		a, _ := netip.AddrFromSlice(h.IP)
		if a = a.Unmap(); a.IsLinkLocalUnicast() {
			continue // the kernel's own
		}
		if i := slices.Index(missing, a); i >= 0 {
			missing = slices.Delete(missing, i, i+1)
		} else if err := netlink.AddrDel(link, &h); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
			errs = append(errs, fmt.Errorf("remove address %s: %w", a, err))
		}
	}
	for _, a := range missing {
		addr := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(a, a.BitLen()))}
		if a.Is6() {
			addr.Flags = unix.IFA_F_NODAD // the same address is on every pod's link
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			errs = append(errs, fmt.Errorf("add address %s: %w", a, err))
		}
	}
	return errors.Join(errs...)
}

// syncForward updates the forwarding table of a VXLAN interface: the node address behind
// each hardware address.
func (d device) syncForward(link netlink.Link) error {
	if d.vxlan == nil {
		return nil
	}
	index := link.Attrs().Index
	have, err := kernelnet.List(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, unix.AF_BRIDGE) })
	if err != nil {
		return fmt.Errorf("list forwarding entries: %w", err)
	}
	right := map[string]bool{}
	var errs []error
	for _, h := range have {
		mac := h.HardwareAddr.String()
		ip, _ := netip.AddrFromSlice(h.IP)
		switch want, ok := d.forward[mac]; {
		case ok && want == ip.Unmap():
			right[mac] = true
		case !ok:
			if err := netlink.NeighDel(&h); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove forwarding entry %s: %w", mac, err))
			}
		}
	}
	for mac, ip := range d.forward {
		if right[mac] {
			continue
		}
		hw, err := net.ParseMAC(mac)
		if err == nil {
			err = netlink.NeighSet(&netlink.Neigh{
				LinkIndex: index, Family: unix.AF_BRIDGE, State: netlink.NUD_PERMANENT, Flags: netlink.NTF_SELF,
				HardwareAddr: hw, IP: ip.AsSlice(),
			})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("forwarding entry to %s: %w", ip, err))
		}
	}
	return errors.Join(errs...)
}

func (d device) syncNeighbours(link netlink.Link) error {
	if d.vxlan == nil {
		return nil
	}
	index := link.Attrs().Index
	right := map[netip.Addr]bool{}
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, err := kernelnet.List(func() ([]netlink.Neigh, error) { return netlink.NeighList(index, family) })
		if err != nil {
			errs = append(errs, fmt.Errorf("list neighbours: %w", err))
			continue
		}
		for _, h := range have {
			if h.State&netlink.NUD_PERMANENT == 0 {
				continue // the kernel's: multicast
			}
			ip, _ := netip.AddrFromSlice(h.IP)
			ip = ip.Unmap()
			switch mac, ok := d.neighbours[ip]; {
			case ok && mac == h.HardwareAddr.String():
				right[ip] = true
			case !ok:
				if err := netlink.NeighDel(&h); err != nil && !errors.Is(err, unix.ENOENT) {
					errs = append(errs, fmt.Errorf("remove neighbour %s: %w", ip, err))
				}
			}
		}
	}
	for ip, mac := range d.neighbours {
		if right[ip] {
			continue
		}
		hw, err := net.ParseMAC(mac)
		if err == nil {
			err = netlink.NeighSet(&netlink.Neigh{
				LinkIndex: index, Family: familyOf(ip), State: netlink.NUD_PERMANENT, IP: ip.AsSlice(), HardwareAddr: hw,
			})
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("neighbour %s: %w", ip, err))
		}
	}
	return errors.Join(errs...)
}

// ourRoutes returns the node's routes in all tables, each with the library's form for
// removal.
func ourRoutes(m names) (map[route]netlink.Route, error) {
	out := map[route]netlink.Route{}
	linkNames := map[int]string{}
	links, err := kernelnet.List(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		linkNames[l.Attrs().Index] = l.Attrs().Name
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		list, err := kernelnet.List(func() ([]netlink.Route, error) {
			return netlink.RouteListFiltered(family, &netlink.Route{Protocol: routeProtocol, Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_PROTOCOL|netlink.RT_FILTER_TABLE)
		})
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			if r.Priority != m.number || r.Dst == nil {
				continue
			}
			dst, _ := netip.AddrFromSlice(r.Dst.IP)
			bits, _ := r.Dst.Mask.Size()
			k := route{dst: netip.PrefixFrom(dst.Unmap(), bits), link: linkNames[r.LinkIndex], table: r.Table, tos: r.Tos}
			if r.Type == unix.RTN_UNREACHABLE {
				k.link, k.unreachable = "", true // for IPv6 the kernel reports lo
			}
			if via, ok := netip.AddrFromSlice(r.Gw); ok {
				k.via = via.Unmap()
			}
			if src, ok := netip.AddrFromSlice(r.Src); ok {
				k.src = src.Unmap()
			}
			out[k] = r
		}
	}
	return out, nil
}

// syncRoutes writes the routes that differ. index has the existing interfaces of the plan;
// routes through missing ones have to wait.
func syncRoutes(m names, want []route, index map[string]int) error {
	have, err := ourRoutes(m)
	if err != nil {
		return err
	}
	var errs []error
	wanted := map[route]bool{}
	for _, r := range want {
		wanted[r] = true
	}
	// New routes first, so that a route that moves is replaced and never missing.
	for r := range wanted {
		if _, ok := have[r]; ok {
			continue
		}
		if r.unreachable {
			n := &netlink.Route{Type: unix.RTN_UNREACHABLE, Dst: ipNet(r.dst), Table: r.table, Protocol: routeProtocol, Priority: m.number}
			if err := netlink.RouteReplace(n); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
				errs = append(errs, fmt.Errorf("unreachable route for the pod range %s: %w", r.dst, err))
			}
			continue
		}
		i, ok := index[r.link]
		if !ok {
			link, err := netlink.LinkByName(r.link)
			if err != nil {
				if ignoreNotFound(err) != nil {
					errs = append(errs, fmt.Errorf("route to %s: %w", r.dst, err))
				}
				continue // the interface's own error says why
			}
			i = link.Attrs().Index
		}
		n := &netlink.Route{LinkIndex: i, Dst: ipNet(r.dst), Table: r.table, Tos: r.tos, Protocol: routeProtocol, Priority: m.number}
		if r.via.IsValid() {
			n.Gw, n.Flags = r.via.AsSlice(), int(netlink.FLAG_ONLINK)
		} else {
			n.Scope = netlink.SCOPE_LINK
		}
		if r.src.IsValid() {
			n.Src = r.src.AsSlice()
		}
		if err := netlink.RouteReplace(n); err != nil {
			errs = append(errs, fmt.Errorf("route to %s: %w", r.dst, err))
		}
	}
	if have, err = ourRoutes(m); err != nil { // some routes were replaced
		return errors.Join(append(errs, err)...)
	}
	for r, n := range have {
		if wanted[r] {
			continue
		}
		if err := netlink.RouteDel(&n); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("remove route to %s: %w", r.dst, err))
		}
	}
	return errors.Join(errs...)
}

// syncRules keeps one rule for each source.
func syncRules(m names, want []netip.Prefix) error {
	missing := slices.Clone(want)
	var errs []error
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, err := kernelnet.List(func() ([]netlink.Rule, error) {
			return netlink.RuleListFiltered(family, &netlink.Rule{Table: m.number}, netlink.RT_FILTER_TABLE)
		})
		if errors.Is(err, unix.EAFNOSUPPORT) {
			continue // a kernel without IPv6
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("list routing rules: %w", err))
			continue
		}
		for _, h := range have {
			if h.Src != nil {
				a, _ := netip.AddrFromSlice(h.Src.IP)
				bits, _ := h.Src.Mask.Size()
				if i := slices.Index(missing, netip.PrefixFrom(a.Unmap(), bits)); i >= 0 && h.Priority == rulePriority {
					missing = slices.Delete(missing, i, i+1)
					continue
				}
			}
			h.Family = family
			if err := netlink.RuleDel(&h); err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("remove routing rule: %w", err))
			}
		}
	}
	for _, p := range missing {
		r := netlink.NewRule()
		r.Src, r.Table, r.Priority, r.Family, r.Protocol = ipNet(p), m.number, rulePriority, familyOf(p.Addr()), routeProtocol
		if err := netlink.RuleAdd(r); err != nil {
			errs = append(errs, fmt.Errorf("routing rule for %s: %w", p, err))
		}
	}
	return errors.Join(errs...)
}

// Cleanup removes all that the backend of a node has left in the kernel. The node's
// processes must have ended.
func Cleanup(nodeName string) error {
	if err := apply(namesOf(nodeName), plan{}); err != nil {
		return fmt.Errorf("remove the routes to other nodes: %w", err)
	}
	return nil
}

func removeDevice(name string) error {
	link, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkDel(link)
	}
	if err = ignoreNotFound(err); err != nil {
		return fmt.Errorf("remove interface %s: %w", name, err)
	}
	return nil
}

// ignoreNotFound returns nil for the error about an interface that does not exist.
func ignoreNotFound(err error) error {
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// interfaceOf returns the interface with one of the addresses.
func interfaceOf(addrs []netip.Addr) (netlink.Link, error) {
	have, err := kernelnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, want := range addrs {
		for _, h := range have {
			if a, ok := netip.AddrFromSlice(h.IP); ok && a.Unmap() == want {
				return netlink.LinkByIndex(h.LinkIndex)
			}
		}
	}
	return nil, fmt.Errorf("no interface of this machine has one of the node's addresses %v", addrs)
}

// AddressesOf returns the addresses of an interface at which other nodes can reach it, at
// most one of each family, IPv4 first.
func AddressesOf(name string) ([]netip.Addr, error) {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("interface %q: %w", name, err)
	}
	var out []netip.Addr
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		have, err := kernelnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(link, family) })
		if err != nil {
			return nil, fmt.Errorf("list addresses of %s: %w", name, err)
		}
		for _, h := range have {
			if a, ok := netip.AddrFromSlice(h.IP); ok && a.Unmap().IsGlobalUnicast() {
				out = append(out, a.Unmap())
				break
			}
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("interface %q has no address that other nodes can reach", name)
	}
	return out, nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
