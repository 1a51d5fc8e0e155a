package cni

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/internal/namespaces"
)

// routeProtocol marks kedge's routes. No other program uses it.
const routeProtocol netlink.RouteProtocol = 75

// errLinkTaken is the error for a pod with a foreign interface of the same name.
var errLinkTaken = errors.New("pod has another interface of this name")

// attachment describes the connection of one pod: a veth pair, one end on the node and one
// in the pod. Pods share no link. The node's end has the gateway address and a route to
// each pod address; the pod's end has one default route for each family. Both ends know
// each other's hardware address in advance, so that ARP and neighbour discovery are not
// needed, and the kernel's neighbour table, which all pods of a machine share, cannot
// overflow.
type attachment struct {
	host   string // name of the node's end
	pod    string // name of the pod's end
	alias  string
	mtu    int
	v6     bool // the node's end has IPv6
	local  bool // connections from the node's 127.0.0.1 reach the pod
	addrs  []podAddr
	hostHW net.HardwareAddr
	podHW  net.HardwareAddr
}

// podAddr is an address of a pod and the node's address towards it.
type podAddr struct {
	addr, gateway netip.Addr
}

// connect creates all parts of the attachment that do not exist.
func (a *attachment) connect(ns *namespaces.Network) error {
	for _, p := range a.addrs {
		if !p.gateway.IsValid() {
			return fmt.Errorf("node no longer has a range for pod address %s", p.addr)
		}
	}
	node, pod, err := a.handles(ns)
	if err != nil {
		return err
	}
	defer node.Close()
	defer pod.Close()
	if err := a.ensurePair(node, pod, ns); err != nil {
		return err
	}
	outer, err := node.LinkByName(a.host)
	if err != nil {
		return fmt.Errorf("find %s: %w", a.host, err)
	}
	inner, err := pod.LinkByName(a.pod)
	if err != nil {
		return fmt.Errorf("find %s in the pod: %w", a.pod, err)
	}
	if err := a.hostSide(node, outer); err != nil {
		return err
	}
	if err := a.podSide(pod, inner, ns); err != nil {
		return err
	}
	return a.waitUntilReady(node, pod, outer.Attrs().Index)
}

// waitUntilReady returns when the link carries packets: otherwise the pod's first packet is
// lost.
func (a *attachment) waitUntilReady(node, pod *netlink.Handle, outer int) error {
	if err := kernelnet.WaitCarrier(node, outer); err != nil { // its end was set up before the pod's
		return err
	}
	for _, p := range a.addrs {
		if !p.addr.Is6() {
			continue
		}
		if err := kernelnet.WaitLocal(pod, p.addr); err != nil {
			return fmt.Errorf("in the pod: %w", err)
		}
		if err := kernelnet.WaitLocal(node, p.gateway); err != nil {
			return err
		}
	}
	return nil
}

func (a *attachment) handles(ns *namespaces.Network) (node, pod *netlink.Handle, err error) {
	if node, err = routeSocket(); err != nil {
		return nil, nil, err
	}
	// The socket is created inside the pod's namespace and used from outside: the thread is
	// in the namespace for one system call.
	err = ns.Do(func() (err error) {
		pod, err = routeSocket()
		return err
	})
	if err != nil {
		node.Close()
		return nil, nil, fmt.Errorf("in the pod: %w", err)
	}
	return node, pod, nil
}

// routeSocket opens a socket in the namespace of the calling thread, to which it stays
// bound.
func routeSocket() (*netlink.Handle, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("open netlink: %w", err)
	}
	return h, nil
}

// ensurePair creates both ends in one call, the pod's end directly in the pod.
func (a *attachment) ensurePair(node, pod *netlink.Handle, ns *namespaces.Network) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU, attrs.HardwareAddr = a.host, a.mtu, a.hostHW
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerHardwareAddr = a.pod, a.podHW
	pair.PeerNamespace = netlink.NsFd(ns.FD())
	err := node.LinkAdd(pair)
	if !errors.Is(err, unix.EEXIST) {
		if err != nil {
			return fmt.Errorf("add veth pair %s: %w", a.host, err)
		}
		return nil
	}
	whole, err := a.isPaired(node, pod)
	if whole || err != nil {
		return err
	}
	// The node's end is left over from an attempt with another namespace.
	if err := removeLink(node, a.host); err != nil {
		return err
	}
	err = node.LinkAdd(pair)
	if errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("add veth pair %s: %w: %s", a.host, errLinkTaken, a.pod)
	}
	if err != nil {
		return fmt.Errorf("add veth pair %s: %w", a.host, err)
	}
	return nil
}

// isPaired reports whether both ends exist and belong to each other.
func (a *attachment) isPaired(node, pod *netlink.Handle) (bool, error) {
	outer, err := node.LinkByName(a.host)
	if err != nil {
		return false, ignoreNotFound(err)
	}
	inner, err := pod.LinkByName(a.pod)
	if err != nil {
		return false, ignoreNotFound(err)
	}
	o, i := outer.Attrs(), inner.Attrs()
	return outer.Type() == "veth" && inner.Type() == "veth" &&
		o.ParentIndex == i.Index && i.ParentIndex == o.Index &&
		i.HardwareAddr.String() == a.podHW.String(), nil
}

func (a *attachment) hostSide(node *netlink.Handle, link netlink.Link) error {
	// The kernel ignores an alias given at creation.
	if err := node.LinkSetAlias(link, a.alias); err != nil {
		return fmt.Errorf("set alias of %s: %w", a.host, err)
	}
	// Before the link is up, so that it never accepts a pod's router advertisements, and
	// has no IPv6 if the cluster has none.
	for _, p := range a.parameters() {
		if err := p.set(); err != nil {
			return err
		}
	}
	if err := node.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", a.host, err)
	}
	index := link.Attrs().Index
	for _, p := range a.addrs {
		if err := node.AddrReplace(link, linkAddr(p.gateway)); err != nil {
			return fmt.Errorf("address %s of %s: %w", p.gateway, a.host, err)
		}
		if err := node.NeighSet(neighbour(index, p.addr, a.podHW)); err != nil {
			return fmt.Errorf("neighbour %s of %s: %w", p.addr, a.host, err)
		}
		if err := node.RouteReplace(linkRoute(index, p.addr, p.gateway)); err != nil {
			return fmt.Errorf("route to pod %s: %w", p.addr, err)
		}
	}
	return nil
}

// parameter is a kernel parameter that an interface of the node must have.
type parameter struct {
	name, value string
	optional    bool // it may be missing
}

// parameters returns the parameters of the node's end.
func (a *attachment) parameters() []parameter {
	list := []parameter{{"net/ipv4/conf/" + a.host + "/forwarding", "1", false}}
	if a.v6 {
		list = append(list, parameter{"net/ipv6/conf/" + a.host + "/accept_ra", "0", false})
	} else {
		list = append(list, parameter{"net/ipv6/conf/" + a.host + "/disable_ipv6", "1", true})
	}
	if a.local {
		list = append(list, parameter{"net/ipv4/conf/" + a.host + "/route_localnet", "1", false})
	}
	return list
}

// set writes the parameter unless it has the value already.
func (p parameter) set() error {
	if p.check() == nil {
		return nil
	}
	err := writeSysctl(p.name, p.value)
	if p.optional && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// check returns an error if the parameter has another value.
func (p parameter) check() error {
	now, err := os.ReadFile(filepath.Join("/proc/sys", p.name))
	if p.optional && errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if got := string(bytes.TrimSpace(now)); got != p.value {
		return fmt.Errorf("kernel parameter %s is %s and not %s", strings.ReplaceAll(p.name, "/", "."), got, p.value)
	}
	return nil
}

func (a *attachment) podSide(pod *netlink.Handle, link netlink.Link, ns *namespaces.Network) error {
	if lo, err := pod.LinkByName("lo"); err != nil {
		return fmt.Errorf("find lo in the pod: %w", err)
	} else if err := pod.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up in the pod: %w", err)
	}
	if err := pod.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up in the pod: %w", a.pod, err)
	}
	index := link.Attrs().Index
	for _, p := range a.addrs {
		err := pod.AddrReplace(link, linkAddr(p.addr))
		if p.addr.Is6() && (errors.Is(err, unix.EACCES) || errors.Is(err, unix.EPERM)) {
			// A machine may disable IPv6 for new interfaces; the cluster's configuration
			// takes precedence.
			err = ns.Do(func() error { return writeSysctl("net/ipv6/conf/"+a.pod+"/disable_ipv6", "0") })
			if err == nil {
				err = pod.AddrReplace(link, linkAddr(p.addr))
			}
		}
		if err != nil {
			return fmt.Errorf("address %s of the pod: %w", p.addr, err)
		}
		if err := pod.NeighSet(neighbour(index, p.gateway, a.hostHW)); err != nil {
			return fmt.Errorf("gateway neighbour of the pod: %w", err)
		}
		if err := pod.RouteReplace(linkRoute(index, p.gateway, netip.Addr{})); err != nil {
			return fmt.Errorf("route of the pod to its gateway: %w", err)
		}
		if err := pod.RouteReplace(defaultRoute(index, p.gateway)); err != nil {
			return fmt.Errorf("default route of the pod: %w", err)
		}
	}
	return nil
}

// check compares the kernel with the result of connect.
func (a *attachment) check(ns *namespaces.Network) error {
	node, pod, err := a.handles(ns)
	if err != nil {
		return err
	}
	defer node.Close()
	defer pod.Close()
	whole, err := a.isPaired(node, pod)
	if err != nil {
		return err
	}
	if !whole {
		return fmt.Errorf("veth pair %s is missing or not the pod's", a.host)
	}
	for _, p := range a.parameters() {
		if err := p.check(); err != nil {
			return err
		}
	}
	inner, err := pod.LinkByName(a.pod)
	if err != nil {
		return err
	}
	outer, err := node.LinkByName(a.host)
	if err != nil {
		return err
	}
	for _, p := range a.addrs {
		family := familyOf(p.addr)
		have, err := kernelnet.List(func() ([]netlink.Addr, error) { return pod.AddrList(inner, family) })
		if err != nil {
			return err
		}
		if !hasAddr(have, p.addr) {
			return fmt.Errorf("pod has lost its address %s", p.addr)
		}
		if err := hasRoute(pod, inner, defaultRoute(0, p.gateway), family); err != nil {
			return fmt.Errorf("pod has lost its default route: %w", err)
		}
		if err := hasRoute(node, outer, linkRoute(0, p.addr, p.gateway), family); err != nil {
			return fmt.Errorf("node has lost its route to %s: %w", p.addr, err)
		}
	}
	return nil
}

func hasAddr(list []netlink.Addr, want netip.Addr) bool {
	for _, a := range list {
		if got, ok := netip.AddrFromSlice(a.IP); ok && got.Unmap() == want {
			return true
		}
	}
	return false
}

var errNoRoute = errors.New("no such route")

func hasRoute(h *netlink.Handle, link netlink.Link, want *netlink.Route, family int) error {
	routes, err := h.RouteList(link, family)
	if err != nil {
		return err
	}
	for _, r := range routes {
		if r.Dst != nil && r.Dst.String() == want.Dst.String() && r.Gw.Equal(want.Gw) {
			return nil
		}
	}
	return errNoRoute
}

// removeLink removes the node's end, and with it the pod's. A missing link is not an error.
func removeLink(node *netlink.Handle, name string) error {
	link, err := node.LinkByName(name)
	if err == nil {
		err = node.LinkDel(link)
	}
	if err := ignoreNotFound(err); err != nil {
		return fmt.Errorf("remove %s: %w", name, err)
	}
	return nil
}

// ignoreNotFound returns nil for the error about a link that does not exist.
func ignoreNotFound(err error) error {
	var notFound netlink.LinkNotFoundError
	if errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

func linkAddr(a netip.Addr) *netlink.Addr {
	addr := &netlink.Addr{IPNet: hostNet(a)}
	if a.Is6() {
		// Duplicate detection would keep the address unusable for a second, and no other
		// host is on the link.
		addr.Flags = unix.IFA_F_NODAD
	}
	return addr
}

func neighbour(index int, ip netip.Addr, hw net.HardwareAddr) *netlink.Neigh {
	return &netlink.Neigh{
		LinkIndex: index, Family: familyOf(ip), State: netlink.NUD_PERMANENT,
		IP: ip.AsSlice(), HardwareAddr: hw,
	}
}

// linkRoute returns a direct route to one address; src, if given, is the source address of
// the node's own packets.
func linkRoute(index int, dst, src netip.Addr) *netlink.Route {
	r := &netlink.Route{LinkIndex: index, Dst: hostNet(dst), Scope: netlink.SCOPE_LINK, Protocol: routeProtocol}
	if src.IsValid() {
		r.Src = src.AsSlice()
	}
	return r
}

func defaultRoute(index int, gateway netip.Addr) *netlink.Route {
	zero := netip.IPv4Unspecified()
	if gateway.Is6() {
		zero = netip.IPv6Unspecified()
	}
	return &netlink.Route{
		LinkIndex: index, Gw: gateway.AsSlice(), Protocol: routeProtocol,
		Dst: &net.IPNet{IP: zero.AsSlice(), Mask: net.CIDRMask(0, zero.BitLen())},
	}
}

func hostNet(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

func familyOf(a netip.Addr) int {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// writeSysctl sets a kernel parameter in the calling thread's namespace.
func writeSysctl(name, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys", name), []byte(value), 0)
}
