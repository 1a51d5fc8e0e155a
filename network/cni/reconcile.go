package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/netns"
	"kedge/network/ipam"
)

// Reconcile brings leases, namespaces and interfaces together:
//
//	namespace gone         the pod is gone: release everything it had
//	interface or route     somebody removed it: make it again
//	interface, no lease    left over; with adopt, the lease was lost: recover it
//
// It goes on after errors and returns all of them.
func (p *Plugin) Reconcile(ctx context.Context, adopt bool) error {
	node, err := routeSocket()
	if err != nil {
		return err
	}
	defer node.Close()
	// Interfaces first: one whose lease is missing afterwards never gets one,
	// because the lease is made before the interface and released after it.
	links, err := p.links(node)
	if err != nil {
		return err
	}
	var errs []error
	owned := map[string]bool{}
	for _, lease := range p.ledger.Leases() {
		owned[linkName(p.prefix, lease.Owner)] = true
	}
	for _, link := range links {
		if !owned[link.Attrs().Name] {
			errs = append(errs, p.stray(node, link, adopt))
		}
	}
	for _, lease := range p.ledger.Leases() {
		if ctx.Err() != nil {
			break
		}
		errs = append(errs, p.reconcileOne(lease.Owner))
	}
	return errors.Join(errs...)
}

// links returns the host interfaces of the node's pods.
func (p *Plugin) links(node *netlink.Handle) ([]netlink.Link, error) {
	all, err := node.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	return slices.DeleteFunc(all, func(link netlink.Link) bool {
		if !strings.HasPrefix(link.Attrs().Name, p.prefix) {
			return true
		}
		// One without an alias was being made when the process died. Another
		// alias is of a node whose name happens to give the same prefix.
		_, ours := parseAlias(p.node, link.Attrs().Alias)
		return !ours && link.Attrs().Alias != ""
	}), nil
}

// stray deals with an interface that nobody owns.
func (p *Plugin) stray(node *netlink.Handle, link netlink.Link, adopt bool) error {
	name := link.Attrs().Name
	own, named := parseAlias(p.node, link.Attrs().Alias)
	if !adopt || !named {
		p.log.Info("interface removed: no pod owns it", "interface", name, "attachment", own)
		return removeLink(node, name)
	}
	defer p.owners.lock(own)()
	lease := ipam.Lease{Owner: own}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		routes, err := node.RouteList(link, family)
		if err != nil {
			return fmt.Errorf("list routes of %s: %w", name, err)
		}
		for _, r := range routes {
			if r.Protocol != routeProtocol || r.Dst == nil {
				continue
			}
			if addr, ok := netip.AddrFromSlice(r.Dst.IP); ok {
				lease.Addrs = append(lease.Addrs, addr.Unmap())
			}
		}
	}
	p.log.Warn("lease recovered from the kernel", "interface", name, "attachment", own, "addresses", lease.Addrs)
	return p.ledger.Adopt(lease)
}

// reconcileOne repairs or releases one attachment.
func (p *Plugin) reconcileOne(own string) error {
	defer p.owners.lock(own)()
	lease, ok := p.ledger.Get(own)
	if !ok {
		return nil
	}
	n, err := readNote(lease)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // adopted: nothing is known but its addresses; DEL or GC will end it
	}
	if err != nil {
		return err
	}
	ns, err := netns.Open(n.Netns)
	gone := errors.Is(err, fs.ErrNotExist) || errors.Is(err, netns.ErrNotNetNS) || err == nil && ns.ID() != n.NetnsID
	if err == nil {
		defer ns.Close()
	}
	if gone {
		p.log.Info("attachment released: its pod is gone", "attachment", own, "pod", n.Pod)
		return p.remove(own)
	}
	if err != nil {
		return fmt.Errorf("look at the namespace of %s: %w", own, err)
	}
	p.mu.Lock()
	setup := p.setup
	p.mu.Unlock()
	if len(setup.Ranges) == 0 {
		return nil // gateways are not known yet; the next round repairs
	}
	a := p.attachment(lease, n, setup.MTU)
	damage := a.check(ns)
	if damage == nil {
		return nil
	}
	p.log.Warn("attachment repaired", "attachment", own, "pod", n.Pod, "cause", damage)
	return a.connect(ns)
}
