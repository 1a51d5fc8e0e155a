package servicelb

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
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
)

const (
	// settle is how long the controller waits after an event: services, endpoints and
	// nodes come several at a time.
	settle = 50 * time.Millisecond
	// retry is how long it waits after a failure.
	retry = 2 * time.Second

	// cleanupFinalizer is what cloud controllers leave on services. Nothing of ours needs
	// to be undone when a service goes, but nobody else would take it away.
	cleanupFinalizer = "service.kubernetes.io/load-balancer-cleanup"
)

// Config is what the controller is told once.
type Config struct {
	Pools    []addresspool.Pool
	Reserved []uint16 // TCP ports of the nodes that services cannot have: kedge's own
}

// Controller is the component that gives services of type LoadBalancer their addresses.
// It runs on one server.
type Controller struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface

	services informers.SharedInformerFactory // those of type LoadBalancer only
	others   informers.SharedInformerFactory
	recorder record.EventRecorder
	events   record.EventBroadcaster

	wake chan struct{} // asks for a round; holds one request

	mu      sync.Mutex // guards what follows
	failure error
	// Only the rounds touch what follows.
	told map[types.UID]decision // what the events of each service say
	left map[types.NamespacedName]bool
}

// New makes the controller. client acts as the user system:kedge:servicelb.
func New(cfg Config, client *rest.Config, log *slog.Logger) (*Controller, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("make the load balancer's client: %w", err)
	}
	return newController(cfg, c, log), nil
}

func newController(cfg Config, client kubernetes.Interface, log *slog.Logger) *Controller {
	c := &Controller{
		cfg: cfg, log: log, client: client, wake: make(chan struct{}, 1), events: record.NewBroadcaster(),
		told: map[types.UID]decision{}, left: map[types.NamespacedName]bool{},
		services: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(reduce),
			informers.WithTweakListOptions(func(o *metav1.ListOptions) {
				o.FieldSelector = fields.OneTermEqualSelector("spec.type", string(corev1.ServiceTypeLoadBalancer)).String()
			})),
		others: informers.NewSharedInformerFactoryWithOptions(client, 0, informers.WithTransform(reduce)),
	}
	c.recorder = c.events.NewRecorder(scheme.Scheme, corev1.EventSource{Component: "kedge-servicelb"})
	return c
}

// reduce keeps of nodes and slices what is decided by.
func reduce(o any) (any, error) {
	switch o := o.(type) {
	case *corev1.Node:
		o.Annotations, o.Spec = nil, corev1.NodeSpec{}
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

// Run implements lifecycle.Component. It is ready when the first round is done.
func (c *Controller) Run(ctx context.Context, ready func()) error {
	soon := func() {
		select {
		case c.wake <- struct{}{}:
		default:
		}
	}
	for _, h := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{c.services.Core().V1().Services().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { soon() }, UpdateFunc: func(any, any) { soon() },
			DeleteFunc: func(o any) { c.noteLeft(o); soon() },
		}},
		{c.others.Core().V1().Nodes().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(any) { soon() }, DeleteFunc: func(any) { soon() },
			UpdateFunc: func(a, b any) {
				if nodeMatters(a.(*corev1.Node), b.(*corev1.Node)) {
					soon()
				}
			},
		}},
		{c.others.Discovery().V1().EndpointSlices().Informer(), cache.ResourceEventHandlerFuncs{
			AddFunc: func(o any) { c.sliceChanged(o, soon) }, DeleteFunc: func(o any) { c.sliceChanged(o, soon) },
			UpdateFunc: func(_, o any) { c.sliceChanged(o, soon) },
		}},
	} {
		if _, err := h.informer.AddEventHandler(h.handler); err != nil {
			return fmt.Errorf("follow services and nodes: %w", err)
		}
	}
	c.events.StartRecordingToSink(&v1core.EventSinkImpl{Interface: c.client.CoreV1().Events("")})
	defer c.events.Shutdown()
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
		pause := settle
		if c.Check(ctx) != nil {
			pause = retry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		if c.round(ctx) != nil {
			soon()
		}
	}
}

// nodeMatters says whether a change of a node can change an address.
func nodeMatters(a, b *corev1.Node) bool {
	_, x := a.Labels[corev1.LabelNodeExcludeBalancers]
	_, y := b.Labels[corev1.LabelNodeExcludeBalancers]
	return x != y || a.Labels[NodeLabel] != b.Labels[NodeLabel] || isReady(a) != isReady(b) ||
		(a.DeletionTimestamp == nil) != (b.DeletionTimestamp == nil) || !slices.Equal(a.Status.Addresses, b.Status.Addresses)
}

// sliceChanged asks for a round when endpoints decide about a service's addresses.
func (c *Controller) sliceChanged(o any, soon func()) {
	s, ok := o.(*discoveryv1.EndpointSlice)
	if !ok {
		soon() // it was deleted while nobody watched
		return
	}
	service, err := c.services.Core().V1().Services().Lister().Services(s.Namespace).Get(s.Labels[discoveryv1.LabelServiceName])
	if err == nil && local(service) {
		soon()
	}
}

// noteLeft remembers a service that is gone or is not of the type any more: in the latter
// case it still has addresses in its status.
func (c *Controller) noteLeft(o any) {
	if unknown, ok := o.(cache.DeletedFinalStateUnknown); ok {
		o = unknown.Obj
	}
	if s, ok := o.(*corev1.Service); ok && len(s.Status.LoadBalancer.Ingress) > 0 {
		c.mu.Lock()
		c.left[types.NamespacedName{Namespace: s.Namespace, Name: s.Name}] = true
		c.mu.Unlock()
	}
}

// findLeft finds the services that ceased to be of the type while nobody watched: when
// no server ran, or while another began to lead.
func (c *Controller) findLeft(ctx context.Context) error {
	others := metav1.ListOptions{Limit: 500, FieldSelector: fields.OneTermNotEqualSelector("spec.type", string(corev1.ServiceTypeLoadBalancer)).String()}
	for {
		page, err := c.client.CoreV1().Services(metav1.NamespaceAll).List(ctx, others)
		if err != nil {
			return fmt.Errorf("read services: %w", err)
		}
		for i := range page.Items {
			if s := &page.Items[i]; s.Spec.Type != corev1.ServiceTypeLoadBalancer {
				c.noteLeft(s)
			}
		}
		if others.Continue = page.Continue; others.Continue == "" {
			return nil
		}
	}
}

// round decides about all services and writes what differs.
func (c *Controller) round(ctx context.Context) error {
	err := c.reconcile(ctx)
	if ctx.Err() != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil && c.failure == nil {
		c.log.Warn("addresses of services could not be written", "cause", err)
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
		if modeOf(s, len(c.cfg.Pools) > 0) == notOurs {
			continue
		}
		if s.DeletionTimestamp != nil {
			errs = append(errs, c.letGo(ctx, s))
			continue
		}
		d := decisions[nameOf(s)]
		errs = append(errs, c.write(ctx, s, d))
		c.tell(s, d)
	}
	for uid := range c.told {
		if !seen[uid] {
			delete(c.told, uid)
		}
	}
	return errors.Join(errs...)
}

func (c *Controller) slicesOf(s *corev1.Service) []*discoveryv1.EndpointSlice {
	out, err := c.others.Discovery().V1().EndpointSlices().Lister().EndpointSlices(s.Namespace).List(labels.SelectorFromSet(labels.Set{discoveryv1.LabelServiceName: s.Name}))
	if err != nil {
		return nil // a lister of a cache has no errors
	}
	return out
}

// write puts addresses into a service's status, unless they are there.
func (c *Controller) write(ctx context.Context, s *corev1.Service, d decision) error {
	if slices.Equal(given(s), d.addresses) && len(s.Status.LoadBalancer.Ingress) == len(d.addresses) {
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
	c.log.Info("addresses of a service", "service", namespace+"/"+name, "addresses", addrs)
	return nil
}

// clearLeft takes the addresses from services that are not of the type any more.
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

// letGo removes a cloud controller's finalizer from a service that is to go.
func (c *Controller) letGo(ctx context.Context, s *corev1.Service) error {
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

// tell says in an event what changed for a service.
func (c *Controller) tell(s *corev1.Service, d decision) {
	before, known := c.told[s.UID]
	if known && before.message == d.message && slices.Equal(before.addresses, d.addresses) {
		return
	}
	c.told[s.UID] = d
	switch {
	case d.message != "":
		c.recorder.Event(s, corev1.EventTypeWarning, d.reason, d.message)
	case known || !slices.Equal(given(s), d.addresses): // not after every start
		c.recorder.Eventf(s, corev1.EventTypeNormal, "AddressAssigned", "reached at %v", d.addresses)
	}
}
