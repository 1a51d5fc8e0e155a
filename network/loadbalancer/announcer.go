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
	"kedge/internal/kernelnet"
	"kedge/internal/lifecycle"
)

// settle is the delay of a round after an event: events usually come in groups.
const settle = 20 * time.Millisecond

// Config is the configuration of the announcer.
type Config struct {
	NodeName string
	Pools    []addresspool.Pool
	PodLinks string // prefix of the names of all nodes' pod interfaces
}

// Announcer is the component that announces addresses of pools from this node. A single
// node announces all of them; with several nodes each address is assigned to one node, and
// moves when that node fails.
type Announcer struct {
	cfg     Config
	log     *slog.Logger
	client  kubernetes.Interface
	members *members

	services corelisters.ServiceLister
	nodes    corelisters.NodeLister
	slices   discoverylisters.EndpointSliceLister
	wake     lifecycle.Wakeup

	// frozen is set while this node cannot renew its lease. It then does not see other
	// nodes' renewals either, and would draw wrong conclusions: it keeps its addresses.
	frozen  atomic.Bool
	failure atomic.Pointer[error]
}

// New returns the announcer. It reads services, nodes and endpoint slices from the watches,
// which the caller runs, and uses the client for leases in kube-system.
func New(cfg Config, watches informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Announcer, error) {
	a := &Announcer{
		cfg: cfg, log: log, client: client, members: newMembers(cfg.NodeName), wake: lifecycle.NewWakeup(),
		services: watches.Core().V1().Services().Lister(), nodes: watches.Core().V1().Nodes().Lister(),
		slices: watches.Discovery().V1().EndpointSlices().Lister(),
	}
	for _, h := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{watches.Core().V1().Services().Informer(), a.handler(func(o any) bool {
			s, ok := o.(*corev1.Service)
			return !ok || s.Spec.Type == corev1.ServiceTypeLoadBalancer
		})},
		{watches.Core().V1().Nodes().Informer(), cache.ResourceEventHandlerFuncs{AddFunc: func(any) { a.wake.Wake() }, DeleteFunc: func(any) { a.wake.Wake() }}},
		{watches.Discovery().V1().EndpointSlices().Informer(), a.handler(a.sliceMatters)},
	} {
		if _, err := h.informer.AddEventHandler(h.handler); err != nil {
			return nil, fmt.Errorf("follow services: %w", err)
		}
	}
	return a, nil
}

// handler requests a round when an object matters.
func (a *Announcer) handler(matters func(any) bool) cache.ResourceEventHandler {
	f := func(o any) {
		if matters(o) {
			a.wake.Wake()
		}
	}
	return cache.ResourceEventHandlerFuncs{
		AddFunc: f, DeleteFunc: f,
		// The previous version of the object may matter as well.
		UpdateFunc: func(before, now any) {
			if matters(before) || matters(now) {
				a.wake.Wake()
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

// Name implements lifecycle.Component.
func (a *Announcer) Name() string { return "loadbalancer" }

// Run implements lifecycle.Component. It is ready when the addresses of this node are
// announced. At the end it releases all addresses, and other nodes take over at once.
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
	leases, err := a.followLeases()
	if err != nil {
		return err
	}
	leases.StartWithContext(ctx)
	defer leases.Shutdown()
	if err := leases.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
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
	renewer := &leaseRenewer{announcer: a, responder: r}
	defer renewer.stop()
	for first := true; ; first = false {
		used := a.addresses()
		several := len(used) > 0 && a.otherNodes()
		renewer.setActive(inner, several)
		if !a.frozen.Load() {
			r.setAddresses(inner, a.assigned(used, several, r.networks()))
		}
		if first {
			ready()
		}
		var tick <-chan time.Time
		if several {
			tick = time.After(checkEvery) // a node that stops renewing causes no event
		}
		select {
		case <-ctx.Done():
			r.setAddresses(inner, nil)
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

// followLeases returns the watch of the nodes' leases, which can be run once.
func (a *Announcer) followLeases() (informers.SharedInformerFactory, error) {
	factory := informers.NewSharedInformerFactoryWithOptions(a.client, 0, informers.WithNamespace(metav1.NamespaceSystem),
		informers.WithTweakListOptions(func(o *metav1.ListOptions) { o.LabelSelector = LeaseLabel }))
	_, err := factory.Coordination().V1().Leases().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { a.members.set(o.(*coordinationv1.Lease)); a.wake.Wake() },
		UpdateFunc: func(_, o any) { a.members.set(o.(*coordinationv1.Lease)); a.wake.Wake() },
		DeleteFunc: func(o any) {
			if l, ok := o.(*coordinationv1.Lease); ok {
				a.members.forget(l)
			}
			a.wake.Wake()
		},
	})
	if err != nil {
		return nil, fmt.Errorf("follow the leases of other nodes: %w", err)
	}
	return factory, nil
}

// Check implements lifecycle.Checker.
func (a *Announcer) Check(context.Context) error {
	if err := a.failure.Load(); err != nil {
		return *err
	}
	return nil
}

// addresses returns the pool addresses of services, with the nodes that may announce them:
// nil for all nodes.
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
				continue // another service with the same address is reachable at every node
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

// addressesOf returns the pool addresses of a service.
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

// readyOn returns the nodes with a ready endpoint of a service.
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

// otherNodes reports whether other nodes might announce.
func (a *Announcer) otherNodes() bool {
	nodes, err := a.nodes.List(labels.Everything())
	return err == nil && slices.ContainsFunc(nodes, func(n *corev1.Node) bool { return n.Name != a.cfg.NodeName })
}

// assigned returns the addresses that this node announces.
func (a *Announcer) assigned(used map[netip.Addr]map[string]bool, several bool, networks []netip.Prefix) []netip.Addr {
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

// leaseRenewer renews this node's lease while there are other nodes.
type leaseRenewer struct {
	announcer *Announcer
	responder *responder
	cancel    context.CancelFunc // of the goroutine; nil without a goroutine
	done      chan struct{}
}

// setActive starts or stops renewing.
func (h *leaseRenewer) setActive(ctx context.Context, wanted bool) {
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
			h.renewOnce(ctx)
			select {
			case <-ctx.Done():
			case <-time.After(renewEvery):
			}
		}
	}()
}

func (h *leaseRenewer) renewOnce(ctx context.Context) {
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
			a.log.Info("API server is reachable again")
			a.wake.Wake()
		}
		return
	}
	err = fmt.Errorf("renew the announcer lease of this node: %w", err)
	a.failure.Store(&err)
	if !a.frozen.Swap(true) {
		a.log.Warn("API server unreachable: load balancer addresses do not move until it answers", "err", err)
	}
}

// stop stops renewing and releases the lease.
func (h *leaseRenewer) stop() {
	if h.cancel == nil {
		return
	}
	h.cancel()
	<-h.done
	h.cancel = nil
	ctx, cancel := context.WithTimeout(context.Background(), renewEvery)
	defer cancel()
	if err := renew(ctx, h.announcer.client, h.announcer.cfg.NodeName, nil, false); err != nil {
		h.announcer.log.Debug("announcer lease not released", "err", err) // it ends by itself
	}
}

// watchLinks opens a watch for changes of interfaces and addresses.
func watchLinks() (*kernelnet.Watch, error) {
	w, err := kernelnet.Open(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR)
	if err != nil {
		return nil, fmt.Errorf("watch interfaces: %w", err)
	}
	return w, nil
}

// followLinks requests a round whenever interfaces change.
func (a *Announcer) followLinks(ctx context.Context, links *kernelnet.Watch, r *responder) {
	all := func([]mdnetlink.Message) bool { return true }
	err := links.Follow(ctx, all, func() { r.invalidateLinks(); a.wake.Wake() })
	if err != nil {
		a.log.Warn("changes of network interfaces are no longer watched", "err", err)
	}
}
