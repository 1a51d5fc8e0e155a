package proxy

import (
	"context"
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
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"

	"kedge/network/nft"
	"kedge/network/trace"
)

const (
	// repairEvery is how often the rules are compared with the kernel's even
	// though no event said that somebody changed them.
	repairEvery = 5 * time.Minute
	// repairPause is the least time between two comparisons: others who change
	// rules, such as container engines, do it often.
	repairPause = 3 * time.Second
	// retryAfter is how long a failed change of the rules is left alone.
	retryAfter = time.Second
)

// Proxy is the service proxy of one node: a component of the process.
type Proxy struct {
	cfg         Config
	log         *slog.Logger
	table       *nft.ServiceTable
	trackers    []*tracker
	broadcaster events.EventBroadcaster
	informed    []cache.ResourceEventHandlerRegistration
	flows       *flows
	pending     changes // not written yet; of the goroutine that calls update

	wake chan struct{} // asks for an update of the rules; holds one request
	look chan struct{} // asks for a comparison with the kernel; holds one request

	mu      sync.Mutex // guards what follows
	nodeIPs []netip.Addr
	moved   bool // nodeIPs changed since the last update
	labels  map[string]string
	relabel bool  // labels changed since the last update
	failure error // why the last update or comparison failed
}

// New makes the component. What it watches must be started by others.
func New(cfg Config, shared informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Proxy, error) {
	registerMetrics()
	p := &Proxy{
		cfg: cfg, log: log, nodeIPs: cfg.NodeIPs,
		table:       nft.NewServiceTable(cfg.NodeName, cfg.rules()),
		broadcaster: events.NewBroadcaster(&events.EventSinkImpl{Interface: client.EventsV1()}),
		flows:       newFlows(log),
		pending:     newChanges(),
		wake:        make(chan struct{}, 1),
		look:        make(chan struct{}, 1),
	}
	recorder := p.broadcaster.NewRecorder(scheme.Scheme, "kedge-proxy")
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		if slices.ContainsFunc(cfg.ServiceRanges, func(r netip.Prefix) bool { return familyOf(r.Addr()) == family }) {
			p.trackers = append(p.trackers, newTracker(family, cfg, recorder, func() bool { return p.Check(context.Background()) == nil }))
		}
	}
	for _, watch := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandlerFuncs
	}{
		{shared.Core().V1().Services().Informer(), handler(p.serviceChanged)},
		{shared.Discovery().V1().EndpointSlices().Informer(), handler(p.sliceChanged)},
		{shared.Core().V1().Nodes().Informer(), handler(p.nodeChanged)},
	} {
		registration, err := watch.informer.AddEventHandler(watch.handler)
		if err != nil {
			return nil, fmt.Errorf("watch what the service proxy needs: %w", err)
		}
		p.informed = append(p.informed, registration)
	}
	return p, nil
}

// handler makes an informer's handler of a function that is told of the object
// before and after; nil for none.
func handler[T any](changed func(old, now *T)) cache.ResourceEventHandlerFuncs {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(now any) { changed(nil, now.(*T)) },
		UpdateFunc: func(old, now any) { changed(old.(*T), now.(*T)) },
		DeleteFunc: func(old any) {
			if gone, ok := old.(cache.DeletedFinalStateUnknown); ok {
				old = gone.Obj
			}
			changed(old.(*T), nil)
		},
	}
}

// Rules returns the part of the node's rules that is about services, for those
// who want to see what it does.
func (p *Proxy) Rules() trace.Part { return p.table }

// Name implements lifecycle.Component.
func (p *Proxy) Name() string { return "proxy" }

// Run implements lifecycle.Component. It is ready when the rules of all services
// that there are have been written. They stay when it ends.
func (p *Proxy) Run(ctx context.Context, ready func()) error {
	for _, i := range p.informed {
		select {
		case <-i.HasSyncedChecker().Done():
		case <-ctx.Done():
			return nil
		}
	}
	p.noted(ensureRoutes(p.cfg.ServiceRanges, p.addresses()), "processes of the node may not reach services")
	if err := p.broadcaster.StartRecordingToSinkWithContext(ctx); err != nil {
		return fmt.Errorf("record events of services: %w", err)
	}
	defer p.broadcaster.Shutdown()
	defer p.close()

	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var watch sync.WaitGroup
	watch.Go(func() { fail(nft.Watch(inner, func() { ask(p.look) })) })
	watch.Go(func() { p.flows.run(inner) })
	p.loop(inner, ready)
	watch.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return context.Cause(inner)
}

// loop writes rules until ctx ends.
func (p *Proxy) loop(ctx context.Context, ready func()) {
	regular := time.NewTicker(repairEvery)
	defer regular.Stop()
	quiet := time.NewTimer(repairPause)
	defer quiet.Stop()
	var look chan struct{} // p.look when the last comparison is long enough ago
	ask(p.wake)
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			if p.noted(p.update(), "rules of services could not be written") {
				ready()
			} else {
				time.AfterFunc(retryAfter, func() { ask(p.wake) })
			}
		case <-quiet.C:
			look = p.look
		case <-look:
			began := time.Now()
			p.repair()
			look = nil
			// With many services a comparison takes a tenth of a second.
			quiet.Reset(max(repairPause, 50*time.Since(began)))
		case <-regular.C:
			p.repair()
		}
	}
}

// ask puts a request into a channel that holds one.
func ask(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default: // asked for already
	}
}

// noted keeps err for Check, logs it, and says whether there was none.
func (p *Proxy) noted(err error, what string) bool {
	p.mu.Lock()
	p.failure = err
	p.mu.Unlock()
	if err != nil {
		p.log.Warn(what, "err", err)
	}
	return err == nil
}

// Check says why rules are not what they should be, or nil.
func (p *Proxy) Check(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failure
}

// update writes the rules of all services that changed since the last time.
func (p *Proxy) update() error {
	began := time.Now()
	labels, full := p.takeLabels()
	nodeIPs, moved := p.takeAddresses()
	if moved {
		for _, t := range p.trackers {
			if err := t.setNodeIPs(nodeIPs); err != nil {
				p.log.Warn("health checks of services could not be closed", "err", err)
			}
		}
		p.table.SetNodePortsOn(p.cfg.nodePortsOn(nodeIPs))
		full = true
	}
	c := &p.pending
	for _, t := range p.trackers {
		t.update(c)
		if full {
			t.all(c)
		}
	}
	rules := make(map[string]nft.Service, len(c.services))
	for name := range c.services {
		var s nft.Service
		for _, t := range p.trackers {
			s.Ports = append(s.Ports, t.decide(name, labels)...)
		}
		rules[name.String()] = s
	}
	if err := p.table.Apply(rules); err != nil {
		for _, t := range p.trackers {
			t.failed()
		}
		return err
	}
	var errs []error
	for _, t := range p.trackers {
		t.observe(began, full, c.triggers)
		errs = append(errs, t.answerHealthChecks())
		if c.flows {
			for name := range c.services {
				t.checkFlows(p.flows, name, nodeIPs)
			}
		}
	}
	p.log.Debug("rules of services written", "services", len(rules), "took", time.Since(began))
	p.pending = newChanges()
	return errors.Join(errs...)
}

func (p *Proxy) takeLabels() (labels map[string]string, changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	labels, changed = p.labels, p.relabel
	p.relabel = false
	return labels, changed
}

// SetNodeIPs says which addresses the node has from now on.
func (p *Proxy) SetNodeIPs(addrs []netip.Addr) {
	p.mu.Lock()
	changed := !slices.Equal(p.nodeIPs, addrs)
	if changed {
		p.nodeIPs, p.moved = addrs, true
	}
	p.mu.Unlock()
	if changed {
		p.soon()
		ask(p.look) // for the route to services, which may have gone with the address
	}
}

func (p *Proxy) addresses() []netip.Addr {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.nodeIPs
}

func (p *Proxy) takeAddresses() (addrs []netip.Addr, changed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	addrs, changed = p.nodeIPs, p.moved
	p.moved = false
	return addrs, changed
}

// repair compares rules and routes with the kernel's.
func (p *Proxy) repair() {
	n, err := p.table.Repair()
	if p.noted(errors.Join(err, ensureRoutes(p.cfg.ServiceRanges, p.addresses())), "rules of services, or the way to them, could not be repaired") && n > 0 {
		p.log.Warn("rules repaired: somebody removed or changed them", "table", p.table.Name(), "differences", n)
	}
}

func (p *Proxy) close() {
	if err := p.table.Close(); err != nil {
		p.log.Debug("connection to nftables", "err", err)
	}
	for _, t := range p.trackers {
		if err := t.close(); err != nil {
			p.log.Warn("health checks of services could not be closed", "err", err)
		}
	}
}

func (p *Proxy) soon() {
	for _, t := range p.trackers {
		t.queued()
	}
	ask(p.wake)
}

// serviceChanged is told of services by the informer.
func (p *Proxy) serviceChanged(old, now *corev1.Service) {
	old, now = p.proxied(old), p.proxied(now)
	if old == nil && now == nil {
		return
	}
	for _, t := range p.trackers {
		t.serviceChanged(old, now)
	}
	p.soon()
}

// serviceProxyName is the label by which a service or its endpoints belong to
// another proxy.
const serviceProxyName = "service.kubernetes.io/service-proxy-name"

// proxied returns the service, or nil if others take care of it.
func (p *Proxy) proxied(s *corev1.Service) *corev1.Service {
	if s == nil {
		return nil
	}
	if _, others := s.Labels[serviceProxyName]; others {
		return nil
	}
	for _, ip := range s.Spec.ClusterIPs {
		if a, err := netip.ParseAddr(ip); err == nil && slices.Contains(p.cfg.Own, a) {
			return nil
		}
	}
	return s
}

// sliceChanged is told of endpoints by the informer.
func (p *Proxy) sliceChanged(old, now *discoveryv1.EndpointSlice) {
	slice, gone := now, false
	if now == nil {
		slice, gone = old, true
	}
	if _, others := slice.Labels[serviceProxyName]; others {
		gone = true
	}
	if _, headless := slice.Labels[corev1.IsHeadlessService]; headless {
		gone = true
	}
	changed := false
	for _, t := range p.trackers {
		changed = t.sliceChanged(slice, gone) || changed
	}
	if changed {
		p.soon()
	}
}

// nodeChanged is told of nodes by the informer. Only where this one is matters.
func (p *Proxy) nodeChanged(_, now *corev1.Node) {
	if now == nil || now.Name != p.cfg.NodeName {
		return
	}
	labels := map[string]string{}
	for _, name := range []string{corev1.LabelTopologyZone, corev1.LabelTopologyRegion} {
		if v, ok := now.Labels[name]; ok {
			labels[name] = v
		}
	}
	p.mu.Lock()
	changed := !maps.Equal(p.labels, labels)
	if changed {
		p.labels, p.relabel = labels, true
	}
	p.mu.Unlock()
	if changed {
		p.soon()
	}
}

func familyOf(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}
