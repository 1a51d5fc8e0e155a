package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
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
	for own, link := range links {
		if _, ok := p.ledger.Get(own); !ok {
			errs = append(errs, p.stray(node, own, link, adopt))
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

// links returns the host interfaces of the node's pods, by owner.
func (p *Plugin) links(node *netlink.Handle) (map[string]netlink.Link, error) {
	all, err := node.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list interfaces: %w", err)
	}
	found := map[string]netlink.Link{}
	for _, link := range all {
		if !strings.HasPrefix(link.Attrs().Name, p.prefix) {
			continue
		}
		own, ok := parseAlias(p.node, link.Attrs().Alias)
		if !ok {
			// The kernel sets name and alias together, so this one is not ours.
			continue
		}
		found[own] = link
	}
	return found, nil
}

// stray deals with an interface that nobody owns.
func (p *Plugin) stray(node *netlink.Handle, own string, link netlink.Link, adopt bool) error {
	defer p.owners.lock(own)()
	if _, ok := p.ledger.Get(own); ok {
		return nil
	}
	name := link.Attrs().Name
	if !adopt {
		p.log.Info("interface removed: no pod owns it", "interface", name, "attachment", own)
		return removeLink(node, name)
	}
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
