package loadbalancer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	mdnetlink "github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	corelisters "k8s.io/client-go/listers/core/v1"
	discoverylisters "k8s.io/client-go/listers/discovery/v1"
	"k8s.io/client-go/tools/cache"

	"kedge/internal/addresspool"
	"kedge/internal/netwatch"
)

// settle is how long the announcer waits after an event: they come several at a time.
const settle = 20 * time.Millisecond

// Config is what the announcer is told once.
type Config struct {
	NodeName string
	Pools    []addresspool.Pool
	PodLinks string // how the names of the interfaces of all nodes' pods begin
}

// Announcer is the component that announces addresses of pools from this node. With one
// node it announces all of them; with several each address has one node, and moves when
// that one dies.
type Announcer struct {
	cfg     Config
	log     *slog.Logger
	client  kubernetes.Interface
	members *members

	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   discoverylisters.EndpointSliceLister
	leases   informers.SharedInformerFactory
	wake     chan struct{}

	// frozen says that this node cannot renew its lease. Then it does not see others renew
	// theirs either, and what it would conclude from that is wrong: it keeps what it has.
	frozen  atomic.Bool
	failure atomic.Pointer[error]
}

// New makes the announcer. It reads services, nodes and endpoint slices from the watches,
// which the caller runs, and reads and writes leases in kube-system with the client.
func New(cfg Config, watches informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Announcer, error) {
	a := &Announcer{
		cfg: cfg, log: log, client: client, members: newMembers(cfg.NodeName), wake: make(chan struct{}, 1),
		services: watches.Core().V1().Services().Lister(), nodes: watches.Core().V1().Nodes().Lister(),
		slices: watches.Discovery().V1().EndpointSlices().Lister(),
		leases: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithNamespace(metav1.NamespaceSystem),
			informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = LeaseLabel })),
	}
	for _, h := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{watches.Core().V1().Services().Informer(), a.on(func(o any) bool {
			s, ok := o.(*corev1.Service)
			return !ok || s.Spec.Type == corev1.ServiceTypeLoadBalancer
		})},
		{watches.Core().V1().Nodes().Informer(), cache.ResourceEventHandlerFuncs{AddFunc: func(any) { a.soon() }, DeleteFunc: func(any) { a.soon() }}},
		{watches.Discovery().V1().EndpointSlices().Informer(), a.on(a.sliceMatters)},
		{a.leases.Coordination().V1().Leases().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { a.members.set(o.(*coordinationv1.Lease)); a.soon() },
			UpdateFunc: func(_, o any) { a.members.set(o.(*coordinationv1.Lease)); a.soon() },
			DeleteFunc: func(o any) {
				if l, ok := o.(*coordinationv1.Lease); ok {
					a.members.forget(l)
				}
				a.soon()
			},
		}},
	} {
		if _, err := h.informer.AddEventHandler(h.handler); err != nil {
			return nil, fmt.Errorf("follow services: %w", err)
		}
	}
	return a, nil
}

// on asks for a round when an object matters.
func (a *Announcer) on(matters func(any) bool) cache.ResourceEventHandler {
	f := func(o any) {
		if matters(o) {
			a.soon()
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: f, DeleteFunc: f,
		// What something was before may matter as well.
		UpdateFunc: func(before, now any) {
			if matters(before) || matters(now) {
				a.soon()
			}
		},
	}
}

func (a *Announcer) sliceMatters(o any) bool {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		return true
	}
	service, err := a.services.Services(s.Namespace).Get(s.Labels[discoveryv1.LabelServiceName])
	return err == nil && len(a.addressesOf(service)) > 0 && isLocal(service)
}

func (a *Announcer) soon() {
	select {
	case a.wake <- struct{}{}:
	default:
	}
}

// Name implements lifecycle.Component.
func (a *Announcer) Name() string { return "loadbalancer" }

// Run implements lifecycle.Component. It is ready when what is this node's is announced.
// At the end it lets go of all, and other nodes take over at once.
func (a *Announcer) Run(ctx context.Context, ready func()) error {
	r, err := newResponder(a.cfg.PodLinks, a.log)
	if err != nil {
		return err
	}
	defer r.close()
	links, err := watchLinks()
	if err != nil {
		return err
	}
	defer links.Close()
	a.leases.StartWithContext(ctx)
	defer a.leases.Shutdown()
	if err := a.leases.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("read the leases of other nodes: %w", err)
	}
	inner, cancel := context.WithCancel(ctx)
	var parts sync.WaitGroup
	defer parts.Wait()
	defer cancel()
	parts.Go(func() { r.run(inner) })
	parts.Go(func() { a.followLinks(inner, links, r) })
	beats := &heart{announcer: a, responder: r}
	defer beats.stop()
	for first := true; ; first = false {
		used := a.addresses()
		several := len(used) > 0 && a.otherNodes()
		beats.beat(inner, several)
		if !a.frozen.Load() {
			r.set(inner, a.mine(used, several, r.networks()))
		}
		if first {
			ready()
		}
		var tick <-chan time.Time
		if several {
			tick = time.After(lookEvery) // nobody tells that a node is silent
		}
		select {
		case <-ctx.Done():
			r.set(inner, nil)
			return nil
		case <-tick:
		case <-a.wake:
			select {
			case <-ctx.Done():
			case <-time.After(settle):
			}
		}
	}
}

// Check implements lifecycle.Checker.
func (a *Announcer) Check(context.Context) error {
	if err := a.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// addresses are those of pools that services have, with the nodes that may announce them:
// nil for all.
func (a *Announcer) addresses() map[netip.Addr]map[string]bool {
	services, err := a.services.List(labels.Everything())
	if err != nil {
		return nil // a lister of a cache has no errors
	}
	out := map[netip.Addr]map[string]bool{}
	for _, s := range services {
		for _, addr := range a.addressesOf(s) {
			if !isLocal(s) {
				out[addr] = nil
				continue
			}
			on, known := out[addr]
			if known && on == nil {
				continue // another service that shares it is reached at every node
			}
			if on == nil {
				on = map[string]bool{}
			}
			for name := range a.readyOn(s) {
				on[name] = true
			}
			out[addr] = on
		}
	}
	return out
}

// addressesOf are the addresses of pools that a service has.
func (a *Announcer) addressesOf(s *corev1.Service) []netip.Addr {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return nil
	}
	var out []netip.Addr
	for _, i := range s.Status.LoadBalancer.Ingress {
		if addr, err := netip.ParseAddr(i.IP); err == nil {
			if _, ok := addresspool.In(a.cfg.Pools, addr); ok {
				out = append(out, addr)
			}
		}
	}
	return out
}

func isLocal(s *corev1.Service) bool {
	return s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// readyOn are the nodes with a ready endpoint of a service.
func (a *Announcer) readyOn(s *corev1.Service) map[string]bool {
	found, err := a.slices.EndpointSlices(s.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name}))
	if err != nil {
		return nil
	}
	out := map[string]bool{}
	for _, sl := range found {
		for _, e := range sl.Endpoints {
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				out[*e.NodeName] = true
			}
		}
	}
	return out
}

// otherNodes says whether there are other nodes that might announce.
func (a *Announcer) otherNodes() bool {
	nodes, err := a.nodes.List(labels.Everything())
	return err == nil && slices.ContainsFunc(nodes, func(n *corev1.Node) bool { return n.Name != a.cfg.NodeName })
}

// mine are the addresses that this node announces.
func (a *Announcer) mine(used map[netip.Addr]map[string]bool, several bool, networks []netip.Prefix) []netip.Addr {
	nodes := []member{{name: a.cfg.NodeName, networks: networks}}
	if several {
		nodes = append(nodes, a.members.alive()...)
	}
	var out []netip.Addr
	for addr, on := range used {
		may := nodes
		if on != nil {
			may = slices.DeleteFunc(slices.Clone(nodes), func(m member) bool { return !on[m.name] })
		}
		if owner(addr, may) == a.cfg.NodeName {
			out = append(out, addr)
		}
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

// heart renews this node's lease, as long as there is somebody to see it.
type heart struct {
	announcer *Announcer
	responder *responder
	cancel    context.CancelFunc // of the goroutine; nil when there is none
	done      chan struct{}
}

// beat begins or ends renewing.
func (h *heart) beat(ctx context.Context, wanted bool) {
	if wanted == (h.cancel != nil) {
		return
	}
	if !wanted {
		h.stop()
		return
	}
	ctx, h.cancel = context.WithCancel(ctx)
	h.done = make(chan struct{})
	go func() {
		defer close(h.done)
		for ctx.Err() == nil {
			h.once(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(renewEvery):
			}
		}
	}()
}

func (h *heart) once(ctx context.Context) {
	a := h.announcer
	ctx, cancel := context.WithTimeout(ctx, renewEvery)
	defer cancel()
	err := renew(ctx, a.client, a.cfg.NodeName, h.responder.networks(), true)
	if errors.Is(err, context.Canceled) {
		return
	}
	if err == nil {
		a.failure.Store(nil)
		if a.frozen.Swap(false) {
			a.log.Info("the API answers again")
			a.soon()
		}
		return
	}
	err = fmt.Errorf("renew the lease by which other nodes know this one: %w", err)
	a.failure.Store(&err)
	if !a.frozen.Swap(true) {
		a.log.Warn("addresses stay where they are until the API answers", "cause", err)
	}
}

// stop ends renewing and lets go of the lease.
func (h *heart) stop() {
	if h.cancel == nil {
		return
	}
	h.cancel()
	<-h.done
	h.cancel = nil
	ctx, cancel := context.WithTimeout(context.Background(), renewEvery)
	defer cancel()
	if err := renew(ctx, h.announcer.client, h.announcer.cfg.NodeName, nil, false); err != nil {
		h.announcer.log.Debug("the lease was not let go", "cause", err) // it ends by itself
	}
}

// watchLinks opens a watch of changes of interfaces and addresses.
func watchLinks() (*netwatch.Watch, error) {
	w, err := netwatch.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return nil, fmt.Errorf("watch interfaces: %w", err)
	}
	return w, nil
}

// followLinks asks for a round whenever interfaces change.
func (a *Announcer) followLinks(ctx context.Context, links *netwatch.Watch, r *responder) {
	all := func([]mdnetlink.Message) bool { return true }
	err := links.Follow(ctx, all, func() { r.changed(); a.soon() })
	if err != nil {
		a.log.Warn("changes of interfaces are not noticed any more", "cause", err)
	}
}
