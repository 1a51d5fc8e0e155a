package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"kedge/internal/kernelnet"
	"kedge/internal/lifecycle"
	"kedge/internal/nodeaddr"
)

const (
	// settle is the delay of a round after an event: events usually come in groups.
	settle = 20 * time.Millisecond
	// roundPause is the minimum time between two rounds. Changes of nodes and routes take
	// effect within two seconds.
	roundPause = 200 * time.Millisecond
	// repairEvery is the interval of rounds that no event has requested: the kernel sends
	// no events about replaced entries.
	repairEvery = 5 * time.Minute
	// retryAfter is the delay after a failed round.
	retryAfter = 5 * time.Second
)

// Backend is the component that keeps the routes to other nodes' pods.
type Backend struct {
	cfg          Config
	log          *slog.Logger
	nodes        corelisters.NodeLister
	registration cache.ResourceEventHandlerRegistration
	annotate     func(ctx context.Context, key, value string) error
	setPeers     func(addrs []netip.Addr, tunnels []string) error
	tunnel       *userTunnel // in mode UDP only
	wg           *wireGuard  // in mode WireGuard only

	wake lifecycle.Wakeup // requests a round

	mu       sync.Mutex // guards what follows
	failure  error      // of the last round
	unproven []error    // nodes without a proven address: permanent, and not an error of this node
}

// New returns the component; the caller runs the watches. annotate writes an annotation of
// this node's object. setPeers receives the addresses of other nodes that see the pods' own
// addresses, sorted, and the tunnel interfaces through which they are reached, if any.
func New(cfg Config, watches informers.SharedInformerFactory, annotate func(ctx context.Context, key, value string) error,
	setPeers func(addrs []netip.Addr, tunnels []string) error, log *slog.Logger) (*Backend, error) {
	b := &Backend{
		cfg: cfg, log: log, nodes: watches.Core().V1().Nodes().Lister(),
		annotate: annotate, setPeers: setPeers, wake: lifecycle.NewWakeup(),
	}
	if cfg.Mode == UDP {
		b.tunnel = newUserTunnel(cfg.UDPPort, log)
	}
	var err error
	if cfg.Mode == WireGuard {
		if b.wg, err = newWireGuard(cfg, b.wake.Wake, log); err != nil {
			return nil, err
		}
	}
	b.registration, err = watches.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { b.wake.Wake() },
		DeleteFunc: func(any) { b.wake.Wake() },
		UpdateFunc: func(before, now any) {
			if nodeChanged(before.(*corev1.Node), now.(*corev1.Node)) {
				b.wake.Wake()
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("follow nodes: %w", err)
	}
	return b, nil
}

// nodeChanged reports whether a change of a node affects the routes to its pods. Most
// updates are heartbeats.
func nodeChanged(before, now *corev1.Node) bool {
	return before.UID != now.UID || before.Annotations[Annotation] != now.Annotations[Annotation] ||
		before.Annotations[nodeaddr.Proven] != now.Annotations[nodeaddr.Proven] ||
		!slices.Equal(before.Spec.PodCIDRs, now.Spec.PodCIDRs) || !slices.Equal(before.Status.Addresses, now.Status.Addresses)
}

// Name implements lifecycle.Component.
func (b *Backend) Name() string { return "backend" }

// Run implements lifecycle.Component. It is ready after the first round with all known
// nodes. Unreachable nodes do not keep this node from starting: Check reports them.
func (b *Backend) Run(ctx context.Context, ready func()) error {
	select {
	case <-b.registration.HasSyncedChecker().Done():
	case <-ctx.Done():
		return nil
	}
	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := watchRoutes(inner, b.wake.Wake); err != nil {
			fail(err)
		}
	})
	if b.tunnel != nil {
		parts.Go(func() {
			if err := b.tunnel.run(inner, namesOf(b.cfg.NodeName).link4, b.wake.Wake); err != nil {
				fail(err)
			}
		})
	}
	b.loop(inner, ready)
	if b.wg != nil {
		b.wg.release()
	}
	parts.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

func (b *Backend) loop(ctx context.Context, ready func()) {
	regular := time.NewTicker(repairEvery)
	defer regular.Stop()
	for {
		err := b.round(ctx)
		if ctx.Err() != nil {
			return
		}
		b.recordResult(err)
		ready()
		var retry <-chan time.Time
		if err != nil {
			retry = time.After(retryAfter)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(roundPause):
		}
		var rotation <-chan time.Time
		if b.wg != nil {
			rotation = time.After(b.wg.untilRotation())
		}
		select {
		case <-ctx.Done():
			return
		case <-regular.C:
		case <-retry:
		case <-rotation:
		case <-b.wake:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
		}
	}
}

// recordResult stores the error for Check, and logs changes.
func (b *Backend) recordResult(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err != nil && (b.failure == nil || b.failure.Error() != err.Error()):
		b.log.Warn("some pods of other nodes cannot be reached", "err", err)
	case err == nil && b.failure != nil:
		b.log.Info("pods of all nodes can be reached again")
	}
	b.failure = err
}

// Check returns why pods of other nodes cannot be reached, or nil.
func (b *Backend) Check(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failure
}

// round compares the API's nodes with the kernel, and writes the difference.
func (b *Backend) round(ctx context.Context) error {
	own, peers, err := b.read()
	if own == nil {
		// Registration is in progress, or the object was deleted and returns with the
		// kubelet's next heartbeat: the kernel keeps its current content.
		return err
	}
	errs := []error{err, b.announce(ctx, own)}
	p, err := b.plan(*own, peers)
	errs = append(errs, err)
	if p == nil {
		return errors.Join(errs...) // without a plan nothing is removed
	}
	slices.SortFunc(p.peers, netip.Addr.Compare)
	p.peers = slices.Compact(p.peers)
	var tunnels []string
	for _, l := range p.links {
		tunnels = append(tunnels, l.name)
	}
	// Rules before routes: a packet that leaves untranslated without a route is lost
	// anyway, but a connection that was translated once stays translated.
	errs = append(errs, b.setPeers(p.peers, tunnels), apply(namesOf(b.cfg.NodeName), *p))
	if b.tunnel != nil {
		b.tunnel.set(*own, peers, len(p.links) > 0)
	}
	if b.wg != nil {
		link := ""
		if len(p.links) > 0 {
			link = p.links[0].name
		}
		errs = append(errs, b.wg.set(ctx, link, *own, peers))
	}
	return errors.Join(errs...)
}

// read returns this node, nil if it is unknown, and the other nodes with pods that are
// reached through this backend.
func (b *Backend) read() (*node, []node, error) {
	all, err := b.nodes.List(labels.Everything())
	if err != nil {
		return nil, nil, fmt.Errorf("list nodes: %w", err)
	}
	var own *node
	var others []node
	ranges, errs := nodeaddr.PodRanges(all, b.cfg.Ranges)
	owners := nodeaddr.Owners(all)
	for _, o := range all {
		owns := func(a netip.Addr) bool { return owners[a].Node == o.Name }
		if o.Name == b.cfg.NodeName {
			// This node's own annotations are written, not read.
			mine := *o
			mine.Annotations = nil
			o, owns = &mine, func(netip.Addr) bool { return true }
		}
		n, err := readNode(o, ranges[o.Name], owns)
		switch {
		case err != nil:
			errs = append(errs, err)
		case n.name == b.cfg.NodeName:
			own = &n
		default:
			others = append(others, n)
		}
	}
	if own == nil {
		return nil, nil, errors.Join(errs...)
	}
	if own.ranges, err = ownRanges(all, own.name); err != nil {
		return nil, nil, errors.Join(append(errs, err)...)
	}
	if len(own.addrs) == 0 {
		own.addrs = b.cfg.NodeIPs
	}
	own.tunnel = own.addrs
	if b.cfg.Interface != "" {
		addrs, err := AddressesOf(b.cfg.Interface)
		if err != nil {
			return nil, nil, errors.Join(append(errs, fmt.Errorf("--flannel-iface: %w", err))...)
		}
		own.tunnel = addrs
	}
	var peers []node
	var unproven []error
	for _, n := range byName(others) {
		switch {
		case len(n.ranges) == 0 || n.mode == "":
			// The node is being created.
		case len(n.tunnel) == 0 && len(n.unproven) > 0 && n.mode == b.cfg.Mode:
			unproven = append(unproven, n.errUnproven())
		case len(n.tunnel) == 0:
			// The node has no address yet.
		case overlap(n.ranges, own.ranges):
			errs = append(errs, fmt.Errorf("node %s claims pod ranges of this node, %v: if that node is gone, remove it with \"kedge node remove %s\"", n.name, own.ranges, n.name))
		case slices.ContainsFunc(n.tunnel, func(a netip.Addr) bool { return slices.Contains(own.tunnel, a) }):
			// A node on this machine: the routes to its pods are in this kernel already.
		case n.mode != b.cfg.Mode:
			errs = append(errs, fmt.Errorf("node %s has --flannel-backend=%s and this node %s: use the same on all nodes", n.name, n.mode, b.cfg.Mode))
		default:
			peers = append(peers, n)
		}
	}
	b.recordUnproven(unproven)
	return own, peers, errors.Join(errs...)
}

// recordUnproven stores the nodes without a proven address for Describe, and logs changes.
// A node behind a router stays without one, and works except for its pods' packets.
func (b *Backend) recordUnproven(now []error) {
	b.mu.Lock()
	before := b.unproven
	b.unproven = now
	b.mu.Unlock()
	if text := errors.Join(now...); text != nil && (errors.Join(before...) == nil || errors.Join(before...).Error() != text.Error()) {
		b.log.Warn("pods of some nodes are unreachable from this node", "err", text)
	}
}

// Describe implements lifecycle.Describer.
func (b *Backend) Describe() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.unproven) == 0 {
		return ""
	}
	return "unreachable pods: " + errors.Join(b.unproven...).Error()
}

// ownRanges returns this node's pod ranges as its network uses them, regardless of other
// nodes' claims.
func ownRanges(all []*corev1.Node, name string) ([]netip.Prefix, error) {
	var out []netip.Prefix
	for _, o := range all {
		if o.Name != name {
			continue
		}
		for _, s := range o.Spec.PodCIDRs {
			r, err := netip.ParsePrefix(s)
			if err != nil {
				return nil, fmt.Errorf("node %s: pod range: %w", name, err)
			}
			out = append(out, r.Masked())
		}
	}
	return out, nil
}

func overlap(a, b []netip.Prefix) bool {
	return slices.ContainsFunc(a, func(r netip.Prefix) bool { return slices.ContainsFunc(b, r.Overlaps) })
}

// announce publishes how this node is reached, unless its object has it already.
func (b *Backend) announce(ctx context.Context, own *node) error {
	a := announcement{Mode: b.cfg.Mode}
	switch {
	case len(b.cfg.External) > 0:
		a.Addresses = b.cfg.External
	case b.cfg.Interface != "":
		a.Addresses = own.tunnel
	}
	if b.wg != nil {
		key, err := b.wg.publish()
		if err != nil {
			return err
		}
		a.Key = key
	}
	o, err := b.nodes.Get(b.cfg.NodeName)
	if err != nil {
		return fmt.Errorf("read this node: %w", err)
	}
	if o.Annotations[Annotation] != a.String() {
		if err := b.annotate(ctx, Annotation, a.String()); err != nil {
			return fmt.Errorf("publish this node's backend annotation: %w", err)
		}
	}
	if b.wg != nil {
		return b.wg.published()
	}
	return nil
}

// plan returns nil if the wanted content cannot be determined.
func (b *Backend) plan(own node, peers []node) (*plan, error) {
	var p plan
	have, err := kernelnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_ALL) })
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, h := range have {
		if a, _ := netip.AddrFromSlice(h.IP); slices.Contains(own.addrs, a.Unmap()) {
			own.present = append(own.present, a.Unmap())
		}
	}
	switch b.cfg.Mode {
	case HostGW:
		p, err = planHostGW(own, peers, onLink)
	case VXLAN, UDP, WireGuard:
		if len(peers) == 0 {
			break
		}
		link, lost := interfaceOf(own.tunnel)
		if lost != nil {
			return nil, lost
		}
		switch b.cfg.Mode {
		case VXLAN:
			p, err = planVXLAN(b.cfg, own, peers, link.Attrs().MTU)
		case WireGuard:
			p, err = planWireGuard(b.cfg, own, peers, link.Attrs().MTU)
		default:
			p, err = planUDP(b.cfg, own, peers, link.Attrs().MTU)
		}
	}
	if b.cfg.Mode != None {
		for _, r := range b.cfg.Ranges {
			p.routes = append(p.routes, route{dst: r, table: unix.RT_TABLE_MAIN, unreachable: true})
		}
	}
	return &p, err
}
