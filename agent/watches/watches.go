package watches

import (
	"context"
	"fmt"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/informertrim"
)

// Watches is the component that runs the informers of the node's data path. Proxy, policies and resolver share
// them, so that a node holds each object once, without the fields that none of them reads.
type Watches struct {
	client    kubernetes.Interface
	informers informers.SharedInformerFactory
}

// New returns the component; it watches nothing before Run.
func New(client *rest.Config) (*Watches, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the client of the node's network: %w", err)
	}
	return &Watches{
		client:    c,
		informers: informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithTransform(informertrim.Transform)),
	}, nil
}

// Name implements lifecycle.Component.
func (w *Watches) Name() string { return "watches" }

// Informers returns the factory. An informer must be requested before Run. Objects are shared and must not be
// changed.
func (w *Watches) Informers() informers.SharedInformerFactory { return w.informers }

// Client returns the client of the informers, for writing objects.
func (w *Watches) Client() kubernetes.Interface { return w.client }

// Run implements lifecycle.Component. It calls ready when every informer has synced.
func (w *Watches) Run(ctx context.Context, ready func()) error {
	w.informers.StartWithContext(ctx)
	if err := w.informers.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("sync the informers of the node's network: %w", err)
	}
	ready()
	<-ctx.Done()
	w.informers.Shutdown()
	return nil
}
