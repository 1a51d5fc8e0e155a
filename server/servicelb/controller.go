package servicelb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"

	"kedge/internal/addresspool"
	"kedge/internal/lifecycle"
	"kedge/internal/nodeaddr"
)

const (
	// settle is the delay after an event, because events of services, endpoints and nodes come in bursts.
	batchDelay = 50 * time.Millisecond
	// retry is the delay after a failure.
	retryDelay = 2 * time.Second

	// cleanupFinalizer is a finalizer that cloud controller managers leave on services. kedge has nothing to
	// clean up, but must remove it, because no other controller would.
	cleanupFinalizer = "service.kubernetes.io/load-balancer-cleanup"
)

// Config is the configuration of the controller.
type Config struct {
	Pools    []addresspool.Pool
	Reserved []uint16 // TCP ports of the nodes that kedge itself uses
}

// Controller is the component that assigns addresses to services of type LoadBalancer. It runs on one server.
type Controller struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface

	services informers.SharedInformerFactory // only services of type LoadBalancer
	others   informers.SharedInformerFactory

	wake lifecycle.Wakeup // requests a round

	mu      sync.Mutex // guards failure and left
	failure error
	// Only rounds use the fields below.
	recorder   record.EventRecorder   // of Run
	lastEvents map[types.UID]decision // the last event of each service
	left       map[types.NamespacedName]bool
}

// New returns the controller. client acts as the user system:kedge:servicelb.
func New(cfg Config, client *rest.Config, log *slog.Logger) (*Controller, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the load balancer's client: %w", err)
	}
	return newController(cfg, c, log), nil
}

func newController(cfg Config, client kubernetes.Interface, log *slog.Logger) *Controller {
	return &Controller{
		cfg: cfg, log: log, client: client, wake: lifecycle.NewWakeup(),
		lastEvents: map[types.UID]decision{}, left: map[types.NamespacedName]bool{},
		services: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(reduce),
			informers.WithTweakListOptions(func(o *metav1.ListOptions) {
				o.FieldSelector = fields.OneTermEqualSelector("spec.type", string(corev1.ServiceTypeLoadBalancer)).String()
			})),
		others: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(reduce)),
	}
}

// reduce removes the fields of nodes and slices that do not affect decisions.
func reduce(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Node:
		maps.DeleteFunc(o.Annotations, func(key, _ string) bool { return key != nodeaddr.Proven && key != nodeaddr.Announced })
		o.Spec = corev1.NodeSpec{}
		conditions := slices.DeleteFunc(o.Status.Conditions, func(c corev1.NodeCondition) bool { return c.Type != corev1.NodeReady })
		o.Status = corev1.NodeStatus{Addresses: o.Status.Addresses, Conditions: conditions}
	case *discoveryv1.EndpointSlice:
		o.Ports = nil
		for i := range o.Endpoints {
			e := &o.Endpoints[i]
			*e = discoveryv1.Endpoint{NodeName: e.NodeName, Conditions: discoveryv1.EndpointConditions{Ready: e.Conditions.Ready}}
		}
		o.Labels = map[string]string{discoveryv1.LabelServiceName: o.Labels[discoveryv1.LabelServiceName]}
	}
	if m, ok := o.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	return o, nil
}

// Name implements lifecycle.Component.
func (c *Controller) Name() string { return "servicelb" }

// Run implements lifecycle.Component. It calls ready after the first round.
func (c *Controller) Run(ctx context.Context, ready func()) error {
	for _, h := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{c.services.Core().V1().Services().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { c.wake.Wake() }, UpdateFunc: func(any, any) { c.wake.Wake() },
			DeleteFunc: func(o any) { c.recordLeft(o); c.wake.Wake() },
		}},
		{c.others.Core().V1().Nodes().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { c.wake.Wake() }, DeleteFunc: func(any) { c.wake.Wake() },
			UpdateFunc: func(a, b any) {
				if nodeMatters(a.(*corev1.Node), b.(*corev1.Node)) {
					c.wake.Wake()
				}
			},
		}},
		{c.others.Discovery().V1().EndpointSlices().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(o any) { c.sliceChanged(o) }, DeleteFunc: func(o any) { c.sliceChanged(o) },
			UpdateFunc: func(_, o any) { c.sliceChanged(o) },
		}},
	} {
		if _, err := h.informer.AddEventHandler(h.handler); err != nil {
			return fmt.Errorf("follow services and nodes: %w", err)
		}
	}
	// A broadcaster has goroutines, and a controller is made for each term in which this server leads.
	events := record.NewBroadcaster()
	events.StartRecordingToSink(&v1core.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
	defer events.Shutdown()
	c.recorder = events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-servicelb"})
	for _, f := range []informers.SharedInformerFactory{c.services, c.others} {
		f.StartWithContext(ctx)
		defer f.Shutdown()
		if err := f.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("read services and nodes: %w", err)
		}
	}
	if err := c.findLeft(ctx); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return err
	}
	c.round(ctx)
	ready()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.wake:
		}
		pause := batchDelay
		if c.Check(ctx) != nil {
			pause = retryDelay
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		if c.round(ctx) != nil {
			c.wake.Wake()
		}
	}
}

// nodeMatters reports whether a change of a node can change an address.
func nodeMatters(a, b *corev1.Node) bool {
	_, x := a.Labels[corev1.LabelNodeExcludeBalancers]
	_, y := b.Labels[corev1.LabelNodeExcludeBalancers]
	return x != y || a.Labels[NodeLabel] != b.Labels[NodeLabel] || isReady(a) != isReady(b) ||
		(a.DeletionTimestamp == nil) != (b.DeletionTimestamp == nil) || !slices.Equal(a.Status.Addresses, b.Status.Addresses) ||
		a.Annotations[nodeaddr.Proven] != b.Annotations[nodeaddr.Proven]
}

// sliceChanged requests a round if endpoints affect the service's addresses.
func (c *Controller) sliceChanged(o any) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		c.wake.Wake() // a deletion that the watch has missed
		return
	}
	service, err := c.services.Core().V1().Services().Lister().Services(s.Namespace).Get(s.Labels[discoveryv1.LabelServiceName])
	if err == nil && local(service) {
		c.wake.Wake()
	}
}

// recordLeft records a service that was deleted or has another type now: in the latter case its status still has
// addresses.
func (c *Controller) recordLeft(o any) {
	if unknown, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = unknown.Obj
	}
	if s, ok := o.(*corev1.Service); ok && len(s.Status.LoadBalancer.Ingress) > 0 {
		c.mu.Lock()
		c.left[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = true
		c.mu.Unlock()
	}
}

// findLeft finds services whose type changed while no controller watched: while no server ran, or during a
// change of the leader.
func (c *Controller) findLeft(ctx context.Context) error {
	others := metav1.ListOptions{Limit: 500, FieldSelector: fields.OneTermNotEqualSelector("spec.type", string(corev1.ServiceTypeLoadBalancer)).String()}
	for {
		page, err := c.client.CoreV1().Services(metav1.NamespaceAll).List(ctx, others)
		if err != nil {
			return fmt.Errorf("read services: %w", err)
		}
		for i := range page.Items {
			if s := &page.Items[i]; s.Spec.Type != corev1.ServiceTypeLoadBalancer {
				c.recordLeft(s)
			}
		}
		if others.Continue = page.Continue; others.Continue == "" {
			return nil
		}
	}
}

// round decides for all services and writes the differences.
func (c *Controller) round(ctx context.Context) error {
	err := c.reconcile(ctx)
	if ctx.Err() != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.failure == nil {
		c.log.Warn("the addresses of services could not be written; trying again", "err", err)
	}
	c.failure = err
	return err
}

// Check implements lifecycle.Checker.
func (c *Controller) Check(context.Context) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure
}

func (c *Controller) reconcile(ctx context.Context) error {
	services, err := c.services.Core().V1().Services().Lister().List(labels.Everything())
	if err != nil {
		return err
	}
	nodes, err := c.others.Core().V1().Nodes().Lister().List(labels.Everything())
	if err != nil {
		return err
	}
	st := state{pools: c.cfg.Pools, nodes: nodes, slices: c.slicesOf}
	for _, p := range c.cfg.Reserved {
		st.reserved = append(st.reserved, portKey{corev1.ProtocolTCP, int32(p)})
	}
	for _, s := range services {
		if s.DeletionTimestamp == nil {
			st.services = append(st.services, s)
		}
	}
	decisions := assign(st)
	errs := []error{c.clearLeft(ctx)}
	seen := map[types.UID]bool{}
	for _, s := range services {
		seen[s.UID] = true
		if modeOf(s, len(c.cfg.Pools) > 0) == foreign {
			continue
		}
		if s.DeletionTimestamp != nil {
			errs = append(errs, c.removeFinalizer(ctx, s))
			continue
		}
		d := decisions[nameOf(s)]
		errs = append(errs, c.write(ctx, s, d))
		c.recordEvent(s, d)
	}
	for uid := range c.lastEvents {
		if !seen[uid] {
			delete(c.lastEvents, uid)
		}
	}
	return errors.Join(errs...)
}

func (c *Controller) slicesOf(s *corev1.Service) []*discoveryv1.EndpointSlice {
	out, err := c.others.Discovery().V1().EndpointSlices().Lister().EndpointSlices(s.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name}))
	if err != nil {
		return nil // a lister of a cache returns no errors
	}
	return out
}

// write sets the addresses in a service's status if they differ.
func (c *Controller) write(ctx context.Context, s *corev1.Service, d decision) error {
	if slices.Equal(currentAddresses(s), d.addresses) && len(s.Status.LoadBalancer.Ingress) == len(d.addresses) {
		return nil
	}
	return c.patch(ctx, s.Namespace, s.Name, d.addresses)
}

func (c *Controller) patch(ctx context.Context, namespace, name string, addrs []netip.Addr) error {
	ingress := []map[string]any{}
	for _, a := range addrs {
		ingress = append(ingress, map[string]any{"ip": a.String(), "ipMode": corev1.LoadBalancerIPModeVIP})
	}
	body, err := json.Marshal(map[string]any{"status": map[string]any{"loadBalancer": map[string]any{"ingress": ingress}}})
	if err != nil {
		return err
	}
	_, err = c.client.CoreV1().Services(namespace).Patch(ctx, name, types.MergePatchType, body, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("write the addresses of %s/%s: %w", namespace, name, err)
	}
	c.log.Info("updated the addresses of a service", "service", namespace+"/"+name, "addresses", addrs)
	return nil
}

// clearLeft removes the addresses from services that do not have the type any more.
func (c *Controller) clearLeft(ctx context.Context) error {
	c.mu.Lock()
	left := make([]types.NamespacedName, 0, len(c.left))
	for k := range c.left {
		left = append(left, k)
	}
	c.mu.Unlock()
	var errs []error
	for _, k := range left {
		s, err := c.client.CoreV1().Services(k.Namespace).Get(ctx, k.Name, metav1.GetOptions{})
		if err == nil && s.Spec.Type != corev1.ServiceTypeLoadBalancer && len(s.Status.LoadBalancer.Ingress) > 0 {
			err = c.patch(ctx, k.Namespace, k.Name, nil)
		}
		if err != nil && !apierrors.IsNotFound(err) {
			errs = append(errs, err)
			continue
		}
		c.mu.Lock()
		delete(c.left, k)
		c.mu.Unlock()
	}
	return errors.Join(errs...)
}

// removeFinalizer removes a cloud controller manager's finalizer from a service that is being deleted.
func (c *Controller) removeFinalizer(ctx context.Context, s *corev1.Service) error {
	if !slices.Contains(s.Finalizers, cleanupFinalizer) {
		return nil
	}
	next := s.DeepCopy()
	next.Finalizers = slices.DeleteFunc(next.Finalizers, func(f string) bool { return f == cleanupFinalizer })
	_, err := c.client.CoreV1().Services(s.Namespace).Update(ctx, next, metav1.UpdateOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// recordEvent records an event if the decision for a service has changed.
func (c *Controller) recordEvent(s *corev1.Service, d decision) {
	before, known := c.lastEvents[s.UID]
	if known && before.message == d.message && slices.Equal(before.addresses, d.addresses) {
		return
	}
	c.lastEvents[s.UID] = d
	switch {
	case d.message != "":
		c.recorder.Event(s, corev1.EventTypeWarning, d.reason, d.message)
	case known || !slices.Equal(currentAddresses(s), d.addresses): // not after every start
		c.recorder.Eventf(s, corev1.EventTypeNormal, "AddressAssigned", "reached at %v", d.addresses)
	}
}
