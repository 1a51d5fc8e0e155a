package agent

import (
	"context"
	"fmt"

	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/watched"
)

// Watches is the component that keeps the node's copies of what the API says
// about services, pods and policies. Proxy, policy and resolver share them: an
// object is held once on a node, and without what none of them reads.
type Watches struct {
	client    kubernetes.Interface
	informers informers.SharedInformerFactory
}

// NewWatches makes the component; nothing is watched before Run.
func NewWatches(client *rest.Config) (*Watches, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("make the client of the node's network: %w", err)
	}
	return &Watches{
		client:    c,
		informers: informers.NewSharedInformerFactoryWithOptions(c, 0, informers.WithTransform(watched.Reduce)),
	}, nil
}

// Name implements lifecycle.Component.
func (w *Watches) Name() string { return "watches" }

// Informers returns what is watched. Whoever wants a kind asks for its informer
// before Run. Objects are shared and must not be changed.
func (w *Watches) Informers() informers.SharedInformerFactory { return w.informers }

// Client returns the client that the watches use, for what must be written.
func (w *Watches) Client() kubernetes.Interface { return w.client }

// Run implements lifecycle.Component. It is ready when every kind has been read once.
func (w *Watches) Run(ctx context.Context, ready func()) error {
	w.informers.StartWithContext(ctx)
	if err := w.informers.WaitForCacheSyncWithContext(ctx).AsError(); err != nil {
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("read what the API says of the network: %w", err)
	}
	ready()
	<-ctx.Done()
	w.informers.Shutdown()
	return nil
}
