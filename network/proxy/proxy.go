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
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/events"

	"kedge/internal/lifecycle"
	"kedge/network/nft"
	"kedge/network/nft/services"
	"kedge/network/trace"
)

const (
	// repairEvery is the interval of comparisons with the kernel's rules that no event has
	// requested.
	repairEvery = 5 * time.Minute
	// repairPause is the minimum time between two comparisons: other programs, such as
	// container engines, change rules often.
	repairPause = 3 * time.Second
	// retryAfter is the delay after a failed change of the rules.
	retryAfter = time.Second
)

// Proxy is the service proxy of one node: a component of the process.
type Proxy struct {
	cfg           Config
	log           *slog.Logger
	table         *services.Table
	trackers      []*tracker
	recorder      *recorder
	registrations []cache.ResourceEventHandlerRegistration
	flows         *flows
	pending       changes // not written yet; belongs to the goroutine that calls update

	wake  lifecycle.Wakeup // requests an update of the rules
	check lifecycle.Wakeup // requests a comparison with the kernel

	mu             sync.Mutex // guards what follows
	nodeIPs        []netip.Addr
	nodeIPsChanged bool // nodeIPs changed since the last update
	labels         map[string]string
	labelsChanged  bool  // labels changed since the last update
	failure        error // of the last update or comparison
}

// New returns the component. The caller starts the watches.
func New(cfg Config, shared informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Proxy, error) {
	registerMetrics()
	p := &Proxy{
		cfg: cfg, log: log, nodeIPs: cfg.NodeIPs,
		table:    services.NewTable(cfg.NodeName, cfg.rules()),
		recorder: &recorder{sink: &events.EventSinkImpl{Interface: client.EventsV1()}},
		flows:    newFlows(log),
		pending:  newChanges(),
		wake:     lifecycle.NewWakeup(),
		check:    lifecycle.NewWakeup(),
	}
	for _, family := range []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol} {
		if slices.ContainsFunc(cfg.ServiceRanges, func(r netip.Prefix) bool { return familyOf(r.Addr()) == family }) {
			p.trackers = append(p.trackers, newTracker(family, cfg, p.recorder, func() bool { return p.Check(context.Background()) == nil }))
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
			return nil, fmt.Errorf("watch services, endpoint slices and nodes: %w", err)
		}
		p.registrations = append(p.registrations, registration)
	}
	return p, nil
}

// handler returns an informer's handler that calls changed with the object before and
// after; nil if there is none.
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

// Rules returns the node's rules for services, for tracing.
func (p *Proxy) Rules() trace.Part { return p.table }

// Name implements lifecycle.Component.
func (p *Proxy) Name() string { return "proxy" }

// Run implements lifecycle.Component. It is ready when the rules of all existing services
// have been written. They stay when it ends.
func (p *Proxy) Run(ctx context.Context, ready func()) error {
	for _, i := range p.registrations {
		select {
		case <-i.HasSyncedChecker().Done():
		case <-ctx.Done():
			return nil
		}
	}
	p.recordResult(ensureRoutes(p.cfg.ServiceRanges, p.addresses()), "processes on the node may be unable to reach services")
	inner, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	end, err := p.recorder.begin(inner)
	if err != nil {
		return fmt.Errorf("record events of services: %w", err)
	}
	defer end()
	defer p.close()

	var watch sync.WaitGroup
	watch.Go(func() { fail(nft.Watch(inner, func() { p.check.Wake() })) })
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
	var look chan struct{} // p.check once repairPause has passed
	p.wake.Wake()
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.wake:
			if p.recordResult(p.update(), "cannot write the rules of services") {
				ready()
			} else {
				time.AfterFunc(retryAfter, func() { p.wake.Wake() })
			}
		case <-quiet.C:
			look = p.check
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

// recordResult stores err for Check, logs it, and reports whether it is nil.
func (p *Proxy) recordResult(err error, what string) bool {
	p.mu.Lock()
	p.failure = err
	p.mu.Unlock()
	if err != nil {
		p.log.Warn(what, "err", err)
	}
	return err == nil
}

// Check returns why the rules are not the wanted ones, or nil.
func (p *Proxy) Check(context.Context) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failure
}

// update writes the rules of all services that changed since the last update.
func (p *Proxy) update() error {
	began := time.Now()
	labels, full := p.takeLabels()
	nodeIPs, moved := p.takeAddresses()
	if moved {
		for _, t := range p.trackers {
			if err := t.setNodeIPs(nodeIPs); err != nil {
				p.log.Warn("cannot close the health check node ports of services", "err", err)
			}
		}
		p.table.SetNodePortsOn(p.cfg.nodePortsOn(nodeIPs))
		full = true
	}
	c := &p.pending
	for _, t := range p.trackers {
		t.update(c)
		if full {
			t.markAll(c)
		}
	}
	rules := make(map[string]services.Service, len(c.services))
	for name := range c.services {
		var s services.Service
		for _, t := range p.trackers {
			s.Ports = append(s.Ports, t.servicePorts(name, labels)...)
		}
		rules[name.String()] = s
	}
	if err := p.table.Apply(rules); err != nil {
		for _, t := range p.trackers {
			t.observeFailure()
		}
		return err
	}
	var errs []error
	for _, t := range p.trackers {
		t.observe(began, full, c.triggers)
		errs = append(errs, t.syncHealthChecks())
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
	labels, changed = p.labels, p.labelsChanged
	p.labelsChanged = false
	return labels, changed
}

// SetNodeIPs sets the addresses of the node.
func (p *Proxy) SetNodeIPs(addrs []netip.Addr) {
	p.mu.Lock()
	changed := !slices.Equal(p.nodeIPs, addrs)
	if changed {
		p.nodeIPs, p.nodeIPsChanged = addrs, true
	}
	p.mu.Unlock()
	if changed {
		p.trigger()
		p.check.Wake() // for the route to services, which may have been removed with the address
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
	addrs, changed = p.nodeIPs, p.nodeIPsChanged
	p.nodeIPsChanged = false
	return addrs, changed
}

// repair compares rules and routes with the kernel's.
func (p *Proxy) repair() {
	n, err := p.table.Repair()
	if p.recordResult(errors.Join(err, ensureRoutes(p.cfg.ServiceRanges, p.addresses())), "cannot repair the rules of services or the route to them") && n > 0 {
		p.log.Warn("nftables rules repaired: another program had removed or changed them", "table", p.table.Name(), "differences", n)
	}
}

func (p *Proxy) close() {
	if err := p.table.Close(); err != nil {
		p.log.Debug("cannot close the connection to nftables", "err", err)
	}
	for _, t := range p.trackers {
		if err := t.close(); err != nil {
			p.log.Warn("cannot close the health check node ports of services", "err", err)
		}
	}
}

func (p *Proxy) trigger() {
	for _, t := range p.trackers {
		t.observeQueued()
	}
	p.wake.Wake()
}

// serviceChanged is called by the informer of services.
func (p *Proxy) serviceChanged(old, now *corev1.Service) {
	old, now = p.proxied(old), p.proxied(now)
	if old == nil && now == nil {
		return
	}
	for _, t := range p.trackers {
		t.serviceChanged(old, now)
	}
	p.trigger()
}

// serviceProxyName is the label of services and endpoints of another proxy.
const serviceProxyName = "service.kubernetes.io/service-proxy-name"

// proxied returns the service, or nil if another component serves it.
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

// sliceChanged is called by the informer of endpoint slices.
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
		p.trigger()
	}
}

// nodeChanged is called by the informer of nodes. Only the labels of this node matter.
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
		p.labels, p.labelsChanged = labels, true
	}
	p.mu.Unlock()
	if changed {
		p.trigger()
	}
}

func familyOf(a netip.Addr) corev1.IPFamily {
	if a.Is4() {
		return corev1.IPv4Protocol
	}
	return corev1.IPv6Protocol
}
