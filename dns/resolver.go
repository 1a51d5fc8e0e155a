package dns

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"

	"kedge/dns/cluster"
	"kedge/dns/custom"
	"kedge/dns/outside"
	"kedge/dns/stats"
	"kedge/internal/lifecycle"
)

// Resolver is the cluster DNS on one node: a component of the process.
type Resolver struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface
	answer *answerer
	synced []cache.InformerSynced // report that the initial objects have reached the index

	running atomic.Bool
	failure atomic.Pointer[error] // of opening the sockets
}

var _ interface {
	lifecycle.Component
	lifecycle.Checker
} = (*Resolver)(nil)

// New returns the resolver of a node. It reads services, endpoint slices, namespaces and
// nodes from the watches, which the caller runs, and uses the client for the ConfigMap and
// for events.
func New(cfg Config, watches informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Resolver, error) {
	st := stats.New(cfg.Domain)
	r := &Resolver{cfg: cfg, log: log, client: client, answer: &answerer{
		log:     log,
		index:   cluster.New(cluster.Config{Domain: cfg.Domain, Servers: cfg.Addresses, Ranges: cfg.Ranges, TTL: cfg.TTL}),
		outside: outside.NewResolver(outside.Config{ResolvConf: cfg.resolvConf, Own: cfg.Addresses}, st, log),
		nodes:   newNodes(),
		stats:   st,
		ttl:     cfg.TTL,
		waiting: make(chan struct{}, maxWaiting),
	}}
	st.CacheSizes(r.answer.outside.Sizes)
	r.answer.rules.Store(&custom.Rules{})
	return r, r.follow(watches)
}

// Name implements lifecycle.Component.
func (r *Resolver) Name() string { return "dns" }

// follow keeps the index up to date.
func (r *Resolver) follow(watches informers.SharedInformerFactory) error {
	index := r.answer.index
	services := handler(index.SetService, func(s *corev1.Service) { index.DeleteService(s.Namespace, s.Name) })
	endpoints := handler(func(s *discoveryv1.EndpointSlice) {
		index.SetSlice(s)
		r.observeProgramming(s)
	}, index.DeleteSlice)
	namespaces := handler(
		func(n *corev1.Namespace) { index.SetNamespace(n.Name, true) },
		func(n *corev1.Namespace) { index.SetNamespace(n.Name, false) })
	for _, f := range []struct {
		informer cache.SharedIndexInformer
		handler  cache.ResourceEventHandler
	}{
		{watches.Core().V1().Services().Informer(), services},
		{watches.Discovery().V1().EndpointSlices().Informer(), endpoints},
		{watches.Core().V1().Namespaces().Informer(), namespaces},
		{watches.Core().V1().Nodes().Informer(), handler(r.answer.nodes.set, r.answer.nodes.remove)},
	} {
		reg, err := f.informer.AddEventHandler(f.handler)
		if err != nil {
			return fmt.Errorf("follow the cluster's names: %w", err)
		}
		r.synced = append(r.synced, reg.HasSynced)
	}
	return nil
}

// handler returns an informer's handler for objects of one kind.
func handler[T any](set, remove func(T)) cache.ResourceEventHandler {
	return cache.ResourceEventHandlerFuncs{
		AddFunc:    func(o any) { set(o.(T)) },
		UpdateFunc: func(_, o any) { set(o.(T)) },
		DeleteFunc: func(o any) {
			if unknown, ok := o.(cache.DeletedFinalStateUnknown); ok {
				o = unknown.Obj
			}
			remove(o.(T))
		},
	}
}

// observeProgramming measures the time from a change of endpoints to its names. Changes
// from before the start are ignored.
func (r *Resolver) observeProgramming(s *discoveryv1.EndpointSlice) {
	if !r.running.Load() {
		return
	}
	at, err := time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
	if err == nil {
		r.answer.stats.Programmed(time.Since(at))
	}
}

// Run implements lifecycle.Component. It is ready when queries are answered.
func (r *Resolver) Run(ctx context.Context, ready func()) error {
	routes, err := watchRoutes() // before the routes are added, so that no removal is missed
	if err != nil {
		return err
	}
	defer routes.Close()
	if err := addRoutes(r.cfg.Addresses); err != nil {
		return err
	}
	defer r.answer.outside.Close()
	socks, err := r.open(ctx, ready)
	if err != nil || ctx.Err() != nil {
		return err
	}
	defer socks.close()
	var waiting sync.WaitGroup
	defer waiting.Wait()
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	settings := newSettings(r.cfg, r.client, r.answer, r.log)
	waiting.Go(func() { settings.run(inner) })
	// Queries wait in the sockets until the index is complete.
	if !cache.WaitForCacheSync(ctx.Done(), append(slices.Clone(r.synced), settings.synced)...) {
		return nil
	}
	r.answer.outside.ReadHostServers()
	for _, c := range socks.udp {
		for range readers() {
			waiting.Go(func() { r.answer.serveUDP(inner, c, &waiting) })
		}
	}
	for _, l := range socks.tcp {
		waiting.Go(func() { r.answer.serveTCP(inner, l, &waiting) })
	}
	waiting.Go(func() { r.watchAddresses(inner, routes) })
	if socks.noMetrics != nil {
		r.log.Warn("DNS metrics are not served", "err", socks.noMetrics)
	}
	metrics := r.metricsServer()
	for _, l := range socks.metrics {
		waiting.Go(func() {
			if err := metrics.Serve(l); !errors.Is(err, http.ErrServerClosed) && inner.Err() == nil {
				r.log.Warn("DNS metrics are no longer served", "err", err)
			}
		})
	}
	r.log.Info("names are answered", "addresses", r.cfg.Addresses, "services", r.answer.index.Services())
	r.running.Store(true)
	defer r.running.Store(false)
	ready()
	<-ctx.Done()
	cancel()
	socks.close()
	metrics.Close()
	return nil
}

// open opens the sockets. It waits for a port that another program uses: pods without names
// are better than no node at all. Other components need not wait then, and Check reports
// the error.
func (r *Resolver) open(ctx context.Context, ready func()) (sockets, error) {
	defer r.failure.Store(nil)
	for {
		socks, err := listen(ctx, r.cfg.Addresses)
		if !errors.Is(err, unix.EADDRINUSE) {
			return socks, err
		}
		if r.failure.Swap(&err) == nil {
			r.log.Error("names are not answered", "err", err)
		}
		ready()
		select {
		case <-ctx.Done():
			return socks, nil
		case <-time.After(listenRetry):
		}
	}
}

// listenRetry is the interval of attempts to open a port that is in use.
const listenRetry = 2 * time.Second

func (r *Resolver) metricsServer() *http.Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(r.answer.stats)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
}

// Check implements lifecycle.Checker: it queries a name of the cluster as a pod would.
func (r *Resolver) Check(ctx context.Context) error {
	if err := r.failure.Load(); err != nil {
		return *err
	}
	if !r.running.Load() {
		return errors.New("names are not answered")
	}
	for _, a := range r.cfg.Addresses {
		if err := probe(ctx, a, r.cfg.Domain); err != nil {
			return fmt.Errorf("%s does not answer: %w", a, err)
		}
	}
	return r.answer.outside.Check()
}
