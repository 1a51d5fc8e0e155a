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

// Resolver is the cluster's DNS on one node: a component of the process.
type Resolver struct {
	cfg    Config
	log    *slog.Logger
	client kubernetes.Interface
	answer *answerer
	synced []cache.InformerSynced // that what the watches have read has reached the index

	running atomic.Bool
	failure atomic.Pointer[error] // why the sockets could not be opened
}

var _ interface {
	lifecycle.Component
	lifecycle.Checker
} = (*Resolver)(nil)

// New makes the resolver of a node. It reads services, endpoint slices and namespaces
// from the watches, which the caller runs, and the ConfigMap with the client, with which
// it also writes events.
func New(cfg Config, watches informers.SharedInformerFactory, client kubernetes.Interface, log *slog.Logger) (*Resolver, error) {
	st := stats.New(cfg.Domain)
	r := &Resolver{cfg: cfg, log: log, client: client, answer: &answerer{
		log:     log,
		index:   cluster.New(cluster.Config{Domain: cfg.Domain, Servers: cfg.Addresses, Ranges: cfg.Ranges, TTL: cfg.TTL}),
		outside: outside.NewResolver(outside.Config{ResolvConf: cfg.resolvConf, Own: cfg.Addresses}, st, log),
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
		r.programmed(s)
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
	} {
		reg, err := f.informer.AddEventHandler(f.handler)
		if err != nil {
			return fmt.Errorf("follow the cluster's names: %w", err)
		}
		r.synced = append(r.synced, reg.HasSynced)
	}
	return nil
}

// handler passes objects of one kind on.
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

// programmed measures how old a change of endpoints is that has names now. Old changes
// are those that were there before us.
func (r *Resolver) programmed(s *discoveryv1.EndpointSlice) {
	if !r.running.Load() {
		return
	}
	at, err := time.Parse(time.RFC3339Nano, s.Annotations[corev1.EndpointsLastChangeTriggerTime])
	if err == nil {
		r.answer.stats.Programmed(time.Since(at))
	}
}

// Run implements lifecycle.Component. It is ready when names are answered.
func (r *Resolver) Run(ctx context.Context, ready func()) error {
	if err := claim(r.cfg.Addresses); err != nil {
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
	// Queries wait in the sockets until there is something to answer with.
	if !cache.WaitForCacheSync(ctx.Done(), append(slices.Clone(r.synced), settings.synced)...) {
		return nil
	}
	r.answer.outside.Look()
	for _, c := range socks.udp {
		for range readers() {
			waiting.Go(func() { r.answer.serveUDP(inner, c, &waiting) })
		}
	}
	for _, l := range socks.tcp {
		waiting.Go(func() { r.answer.serveTCP(inner, l, &waiting) })
	}
	metrics := r.metricsServer()
	for _, l := range socks.metrics {
		waiting.Go(func() {
			if err := metrics.Serve(l); !errors.Is(err, http.ErrServerClosed) && inner.Err() == nil {
				r.log.Warn("metrics are not served any more", "cause", err)
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

// open opens the sockets. A port that another program has is waited for: without names
// pods suffer, without the node they would all be gone. Nobody else has to wait then, and
// Check says what is wrong.
func (r *Resolver) open(ctx context.Context, ready func()) (sockets, error) {
	defer r.failure.Store(nil)
	for {
		socks, err := listen(ctx, r.cfg.Addresses)
		if !errors.Is(err, unix.EADDRINUSE) {
			return socks, err
		}
		if r.failure.Swap(&err) == nil {
			r.log.Error("names are not answered", "cause", err)
		}
		ready()
		select {
		case <-ctx.Done():
			return socks, nil
		case <-time.After(listenAgain):
		}
	}
}

// listenAgain is how often a port that is taken is tried.
const listenAgain = 2 * time.Second

func (r *Resolver) metricsServer() *http.Server {
	registry := prometheus.NewRegistry()
	registry.MustRegister(r.answer.stats)
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	return &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute}
}

// Check implements lifecycle.Checker: it asks for a name of the cluster as a pod would.
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
