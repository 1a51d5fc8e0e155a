package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/internal/namespaces"
	"kedge/network/ipam"
	"kedge/network/nft/pods"
)

// Reconcile brings leases, namespaces and interfaces into a consistent state:
//
//	namespace gone         the pod is gone: release the attachment
//	interface or route     removed by another program: create it again
//	interface, no lease    left over: remove it
//
// It continues after errors and returns all of them.
func (p *Plugin) Reconcile(ctx context.Context) error {
	node, err := routeSocket()
	if err != nil {
		return err
	}
	defer node.Close()
	// Interfaces first: an interface without a lease at this point never gets one, because
	// the lease is made before the interface and released after it.
	strays, err := p.strays(node)
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range strays {
		own, _ := parseAlias(p.node, link.Attrs().Alias)
		p.log.Info("interface removed: no pod owns it", "interface", link.Attrs().Name, "attachment", own)
		errs = append(errs, removeLink(node, link.Attrs().Name))
	}
	for _, lease := range p.ledger.Leases() {
		if ctx.Err() != nil {
			break
		}
		errs = append(errs, p.reconcileOne(lease.Owner))
	}
	return errors.Join(errs...)
}

// Adopt creates leases for the interfaces that no lease owns, from the kernel's data. These
// interfaces belong to living pods whose leases the journal has lost, because an interface
// disappears with the pod's namespace. published are the host ports of the previous
// process. Adopt is to be called once, before interfaces or rules change.
func (p *Plugin) Adopt(published []pods.HostPort) error {
	node, err := routeSocket()
	if err != nil {
		return err
	}
	defer node.Close()
	strays, err := p.strays(node)
	if err != nil {
		return err
	}
	var errs []error
	for _, link := range strays {
		if own, ok := parseAlias(p.node, link.Attrs().Alias); ok {
			errs = append(errs, p.adopt(node, link, own, published))
		}
	}
	return errors.Join(errs...)
}

func (p *Plugin) adopt(node *netlink.Handle, link netlink.Link, own string, published []pods.HostPort) error {
	defer p.owners.lock(own)()
	addrs, err := routedAddrs(node, link)
	if err != nil {
		return err
	}
	if len(addrs) == 0 {
		return nil // the process died while it created the interface
	}
	for _, other := range p.ledger.Leases() {
		if slices.ContainsFunc(other.Addrs, func(a netip.Addr) bool { return slices.Contains(addrs, a) }) {
			if err := p.releaseIfGone(other); err != nil {
				return err
			}
		}
	}
	n := note{Ports: portsOf(published, addrs)}
	// Without the namespace, only the data for creating the interface again is missing.
	if ns, path := podNamespaceOf(node, link); ns != nil {
		n.Netns, n.NetnsID = path, ns.ID()
		defer ns.Close()
	}
	raw, err := json.Marshal(n)
	if err != nil {
		return err
	}
	if err := p.ledger.Adopt(ipam.Lease{Owner: own, Addrs: addrs, Note: raw}); err != nil {
		return err
	}
	p.mu.Lock()
	p.ports[own] = translations(n.Ports, addrs)
	p.mu.Unlock()
	p.log.Warn("lease recovered from the kernel", "interface", link.Attrs().Name, "attachment", own, "addresses", addrs)
	return nil
}

// releaseIfGone releases a lease whose pod is gone and whose release the journal has lost.
func (p *Plugin) releaseIfGone(lease ipam.Lease) error {
	n, err := readNote(lease)
	if err != nil {
		return err
	}
	if id, err := namespaces.ProbeNetwork(n.Netns); err == nil && id == n.NetnsID {
		return nil // two living pods have the same address; Ledger.Adopt returns the error
	}
	p.mu.Lock()
	delete(p.ports, lease.Owner)
	p.mu.Unlock()
	return p.ledger.Release(lease.Owner)
}

// routedAddrs returns the pod addresses that are routed through an interface.
func routedAddrs(node *netlink.Handle, link netlink.Link) ([]netip.Addr, error) {
	var addrs []netip.Addr
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := node.RouteList(link, family)
		if err != nil {
			return nil, fmt.Errorf("list routes of %s: %w", link.Attrs().Name, err)
		}
		for _, r := range routes {
			if r.Protocol != routeProtocol || r.Dst == nil {
				continue
			}
			if addr, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				addrs = append(addrs, addr.Unmap())
			}
		}
	}
	return addrs, nil
}

// podNamespaceOf returns the mounted network namespace with the other end of a veth pair,
// or nil.
func podNamespaceOf(node *netlink.Handle, link netlink.Link) (*namespaces.Network, string) {
	paths, err := namespaces.MountedNetworks()
	if err != nil {
		return nil, ""
	}
	for _, path := range paths {
		ns, err := namespaces.OpenNetwork(path)
		if err != nil {
			continue
		}
		// The kernel numbers the namespaces that a namespace refers to, from 0.
		if id, err := node.GetNetNsIdByFd(ns.FD()); err == nil && id >= 0 && id == link.Attrs().NetNsID {
			return ns, path
		}
		ns.Close()
	}
	return nil, ""
}

// portsOf is the inverse of translations, for a pod with the given addresses.
func portsOf(published []pods.HostPort, addrs []netip.Addr) []hostPort {
	var ports []hostPort
	for _, h := range published {
		if !slices.Contains(addrs, h.Pod.Addr()) {
			continue
		}
		port := hostPort{HostIP: h.HostIP, Host: h.Port, Pod: h.Pod.Port(), Protocol: h.Protocol}
		if !slices.Contains(ports, port) {
			ports = append(ports, port)
		}
	}
	return ports
}

// inUse reports whether an address belongs to the node, or is routed to an interface of a
// pod.
func (p *Plugin) inUse(addr netip.Addr) bool {
	node, err := routeSocket()
	if err != nil {
		return false
	}
	defer node.Close()
	routes, err := node.RouteGet(addr.AsSlice())
	if err != nil {
		return false // unreachable, as pod addresses without a pod are
	}
	return slices.ContainsFunc(routes, func(r netlink.Route) bool {
		if r.Type == unix.RTN_LOCAL {
			return true
		}
		link, err := node.LinkByIndex(r.LinkIndex)
		return err == nil && strings.HasPrefix(link.Attrs().Name, LinkTag)
	})
}

// links returns the host interfaces of the node's pods.
func (p *Plugin) links(node *netlink.Handle) ([]netlink.Link, error) {
	all, err := kernelnet.List(node.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return slices.DeleteFunc(all, func(link netlink.Link) bool {
		if !strings.HasPrefix(link.Attrs().Name, p.prefix) {
			return true
		}
		// An interface without an alias was being created when the process died. Another
		// alias belongs to a node whose name happens to have the same prefix.
		_, ours := parseAlias(p.node, link.Attrs().Alias)
		return !ours && link.Attrs().Alias != ""
	}), nil
}

// strays returns the interfaces that no lease owns.
func (p *Plugin) strays(node *netlink.Handle) ([]netlink.Link, error) {
	links, err := p.links(node)
	if err != nil {
		return nil, err
	}
	owned := map[string]bool{}
	for _, lease := range p.ledger.Leases() {
		owned[linkName(p.prefix, lease.Owner)] = true
	}
	return slices.DeleteFunc(links, func(l netlink.Link) bool { return owned[l.Attrs().Name] }), nil
}

// reconcileOne repairs or releases one attachment.
func (p *Plugin) reconcileOne(own string) error {
	defer p.owners.lock(own)()
	lease, ok := p.ledger.Get(own)
	if !ok {
		return nil
	}
	n, err := readNote(lease)
	if errors.Is(err, fs.ErrNotExist) || err == nil && n.Netns == "" {
		return nil // adopted, and only its addresses are known; DEL or GC will release it
	}
	if err != nil {
		return err
	}
	ns, err := namespaces.OpenNetwork(n.Netns)
	gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, namespaces.ErrNotNetwork) || err == nil && ns.ID() != n.NetnsID
	if err == nil {
		defer ns.Close()
	}
	if gone {
		p.log.Info("attachment released: its pod is gone", "attachment", own, "pod", n.Pod)
		return p.remove(own)
	}
	if err != nil {
		return fmt.Errorf("open the network namespace of %s: %w", own, err)
	}
	p.mu.Lock()
	setup := p.setup
	p.mu.Unlock()
	if len(setup.Ranges) == 0 {
		return nil // the gateways are not known yet; the next round repairs it
	}
	a := p.attachment(lease, n, setup.MTU)
	damage := a.check(ns)
	if damage == nil {
		return nil
	}
	p.log.Warn("attachment repaired", "attachment", own, "pod", n.Pod, "err", damage)
	return a.connect(ns)
}
