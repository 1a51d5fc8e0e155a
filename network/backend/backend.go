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
)

const (
	// settle is how long a round waits after an event: they come several at a time.
	settle = 20 * time.Millisecond
	// roundPause is the least time between two rounds. Nodes and routes that come and
	// go are followed within two seconds.
	roundPause = 200 * time.Millisecond
	// repairEvery is how often the kernel is looked at even though no event said that
	// something changed: of entries that somebody has replaced there are no events.
	repairEvery = 5 * time.Minute
	// retryAfter is how long a round that failed is left alone.
	retryAfter = 5 * time.Second
)

// Backend is the component that keeps the ways to other nodes' pods.
type Backend struct {
	cfg      Config
	log      *slog.Logger
	nodes    corelisters.NodeLister
	informed cache.ResourceEventHandlerRegistration
	annotate func(ctx context.Context, key, value string) error
	setPeers func(addrs []netip.Addr, tunnels []string) error
	tunnel   *userTunnel // in mode UDP only
	secret   *wireGuard  // in mode WireGuard only

	wake chan struct{} // asks for a round; holds one request

	mu      sync.Mutex // guards what follows
	failure error      // of the last round
}

// New makes the component; the caller runs the watches. annotate writes an annotation
// of this node's object. setPeers is told which addresses of other nodes see the pods'
// own addresses, sorted, and by which interfaces they are reached, if by any of ours.
func New(cfg Config, watches informers.SharedInformerFactory, annotate func(ctx context.Context, key, value string) error,
	setPeers func(addrs []netip.Addr, tunnels []string) error, log *slog.Logger) (*Backend, error) {
	b := &Backend{
		cfg: cfg, log: log, nodes: watches.Core().V1().Nodes().Lister(),
		annotate: annotate, setPeers: setPeers, wake: make(chan struct{}, 1),
	}
	if cfg.Mode == UDP {
		b.tunnel = newUserTunnel(cfg.UDPPort, log)
	}
	var err error
	if cfg.Mode == WireGuard {
		if b.secret, err = newWireGuard(cfg, b.soon, log); err != nil {
			return nil, err
		}
	}
	b.informed, err = watches.Core().V1().Nodes().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { b.soon() },
		DeleteFunc: func(any) { b.soon() },
		UpdateFunc: func(before, now any) {
			if relevant(before.(*corev1.Node), now.(*corev1.Node)) {
				b.soon()
			}
		},
	})
	if err != nil {
		return nil, fmt.Errorf("follow nodes: %w", err)
	}
	return b, nil
}

// relevant says whether a change of a node is about where its pods are. Most are
// heartbeats.
func relevant(before, now *corev1.Node) bool {
	return before.UID != now.UID || before.Annotations[Annotation] != now.Annotations[Annotation] ||
		!slices.Equal(before.Spec.PodCIDRs, now.Spec.PodCIDRs) || !slices.Equal(before.Status.Addresses, now.Status.Addresses)
}

func (b *Backend) soon() {
	select {
	case b.wake <- struct{}{}:
	default: // asked for already
	}
}

// Name implements lifecycle.Component.
func (b *Backend) Name() string { return "backend" }

// Run implements lifecycle.Component. It is ready when all nodes that are known have
// been looked at. One that cannot be reached does not keep this node from starting:
// Check says so.
func (b *Backend) Run(ctx context.Context, ready func()) error {
	select {
	case <-b.informed.HasSyncedChecker().Done():
	case <-ctx.Done():
		return nil
	}
	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var parts sync.WaitGroup
	parts.Go(func() {
		if err := watchRoutes(inner, b.soon); err != nil {
			fail(err)
		}
	})
	if b.tunnel != nil {
		parts.Go(func() {
			if err := b.tunnel.run(inner, marks(b.cfg.NodeName).link4, b.soon); err != nil {
				fail(err)
			}
		})
	}
	b.loop(inner, ready)
	if b.secret != nil {
		b.secret.drop()
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
		b.note(err)
		ready()
		var again <-chan time.Time
		if err != nil {
			again = time.After(retryAfter)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(roundPause):
		}
		var otherKey <-chan time.Time
		if b.secret != nil {
			otherKey = time.After(b.secret.due())
		}
		select {
		case <-ctx.Done():
			return
		case <-regular.C:
		case <-again:
		case <-otherKey:
		case <-b.wake:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
		}
	}
}

// note keeps the error for Check, and logs what is new.
func (b *Backend) note(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err != nil && (b.failure == nil || b.failure.Error() != err.Error()):
		b.log.Warn("some pods of other nodes cannot be reached", "error", err)
	case err == nil && b.failure != nil:
		b.log.Info("pods of all nodes can be reached again")
	}
	b.failure = err
}

// Check says why pods of other nodes cannot be reached, or nil.
func (b *Backend) Check(context.Context) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.failure
}

// round compares what the API says with the kernel, and writes what differs.
func (b *Backend) round(ctx context.Context) error {
	own, peers, err := b.read()
	if own == nil {
		// Registration is under way, or the object was deleted and comes back with
		// the kubelet's next heartbeat: what is in the kernel goes on serving.
		return err
	}
	errs := []error{err, b.announce(ctx, own)}
	p, err := b.plan(*own, peers)
	errs = append(errs, err)
	if p == nil {
		return errors.Join(errs...) // without a plan nothing is taken away
	}
	slices.SortFunc(p.peers, netip.Addr.Compare)
	p.peers = slices.Compact(p.peers)
	var tunnels []string
	for _, l := range p.links {
		tunnels = append(tunnels, l.name)
	}
	// Rules before routes: what goes out untranslated without a route comes nowhere
	// anyway, and a connection that was translated once stays so.
	errs = append(errs, b.setPeers(p.peers, tunnels), apply(marks(b.cfg.NodeName), *p))
	if b.tunnel != nil {
		b.tunnel.set(*own, peers, len(p.links) > 0)
	}
	if b.secret != nil {
		link := ""
		if len(p.links) > 0 {
			link = p.links[0].name
		}
		errs = append(errs, b.secret.set(ctx, link, *own, peers))
	}
	return errors.Join(errs...)
}

// read returns this node, nil if it is not known, and the others that have pods which
// are reached from here.
func (b *Backend) read() (*node, []node, error) {
	all, err := b.nodes.List(labels.Everything())
	if err != nil {
		return nil, nil, fmt.Errorf("list nodes: %w", err)
	}
	var own *node
	var others []node
	var errs []error
	for _, o := range all {
		if o.Name == b.cfg.NodeName {
			// What it says of itself is not read but written.
			mine := *o
			mine.Annotations = nil
			o = &mine
		}
		n, err := readNode(o)
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
	for _, n := range byName(others) {
		switch {
		case len(n.ranges) == 0 || len(n.tunnel) == 0 || n.mode == "":
			// It is just being made.
		case slices.ContainsFunc(n.tunnel, func(a netip.Addr) bool { return slices.Contains(own.tunnel, a) }):
			// On this machine: the routes to its pods are in this kernel already.
		case n.mode != b.cfg.Mode:
			errs = append(errs, fmt.Errorf("node %s has --flannel-backend=%s and this node %s: start all nodes with the same", n.name, n.mode, b.cfg.Mode))
		default:
			peers = append(peers, n)
		}
	}
	return own, peers, errors.Join(errs...)
}

// announce writes how this node is reached, unless its object says so already.
func (b *Backend) announce(ctx context.Context, own *node) error {
	said := announcement{Mode: b.cfg.Mode}
	switch {
	case len(b.cfg.External) > 0:
		said.Addresses = b.cfg.External
	case b.cfg.Interface != "":
		said.Addresses = own.tunnel
	}
	if b.secret != nil {
		key, err := b.secret.publish()
		if err != nil {
			return err
		}
		said.Key = key
	}
	o, err := b.nodes.Get(b.cfg.NodeName)
	if err != nil {
		return fmt.Errorf("read this node: %w", err)
	}
	if o.Annotations[Annotation] != said.String() {
		if err := b.annotate(ctx, Annotation, said.String()); err != nil {
			return fmt.Errorf("tell the other nodes how this one is reached: %w", err)
		}
	}
	if b.secret != nil {
		return b.secret.published()
	}
	return nil
}

// plan returns nil when it cannot even be said what should be.
func (b *Backend) plan(own node, peers []node) (*plan, error) {
	var p plan
	have, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	for _, h := range have {
		if a, _ := netip.AddrFromSlice(h.IP); slices.Contains(own.addrs, a.Unmap()) {
			own.here = append(own.here, a.Unmap())
		}
	}
	switch b.cfg.Mode {
	case HostGW:
		p, err = planHostGW(own, peers, onLink)
	case VXLAN, UDP, WireGuard:
		if len(peers) == 0 {
			break
		}
		link, lost := holder(own.tunnel)
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
			p.routes = append(p.routes, route{dst: r, table: unix.RT_TABLE_MAIN, nowhere: true})
		}
	}
	return &p, err
}
