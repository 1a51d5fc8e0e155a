package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// NodeAddresses is the component that keeps the addresses in the node's object what they
// are. The kubelet would take those that it was started with for ever; it leaves them to
// others where it is told that a cloud knows them (see [Kubelet]).
type NodeAddresses struct {
	client   kubernetes.Interface
	nodeName string
	internal func() []netip.Addr
	external []netip.Addr
	log      *slog.Logger

	nodes cache.SharedIndexInformer
	wake  chan struct{} // asks for a look; holds one request
}

// NewNodeAddresses makes the component. client acts as the kubelet; watches must be run by
// the caller. internal are the machine's addresses at any time, external those that an
// administrator says it has elsewhere.
func NewNodeAddresses(client *rest.Config, watches *Watches, nodeName string, internal func() []netip.Addr, external []netip.Addr, log *slog.Logger) (*NodeAddresses, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("make the node's client: %w", err)
	}
	a := &NodeAddresses{
		client: c, nodeName: nodeName, internal: internal, external: external, log: log,
		nodes: watches.Informers().Core().V1().Nodes().Informer(), wake: make(chan struct{}, 1),
	}
	look := func(obj any) {
		if n, ok := obj.(*corev1.Node); ok && n.Name == nodeName {
			a.Look()
		}
	}
	if _, err := a.nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: look, UpdateFunc: func(_, obj any) { look(obj) }}); err != nil {
		return nil, fmt.Errorf("follow the node: %w", err)
	}
	return a, nil
}

// Name implements lifecycle.Component.
func (a *NodeAddresses) Name() string { return "nodeaddresses" }

// Look asks for a comparison: the machine's addresses have changed.
func (a *NodeAddresses) Look() {
	select {
	case a.wake <- struct{}{}:
	default: // asked for already
	}
}

// Run implements lifecycle.Component. It is ready at once: the node may not be registered.
func (a *NodeAddresses) Run(ctx context.Context, ready func()) error {
	ready()
	var again <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		case <-a.wake:
		}
		again = nil
		if err := a.write(ctx); err != nil && ctx.Err() == nil {
			a.log.Debug("the node's addresses were not written", "err", err, "again", retryAfter)
			again = time.After(retryAfter)
		}
	}
}

// write makes the addresses in the node's object what they should be. Of a node that is
// not registered there is nothing to write: the kubelet begins with the right ones.
func (a *NodeAddresses) write(ctx context.Context) error {
	obj, there, err := a.nodes.GetStore().GetByKey(a.nodeName)
	if err != nil || !there {
		return err
	}
	node, ok := obj.(*corev1.Node)
	want := nodeAddresses(a.nodeName, a.internal(), a.external)
	if !ok || slices.Equal(node.Status.Addresses, want) {
		return nil
	}
	// A merge patch replaces the list. With a strategic one the two addresses of a node with
	// both families, which are of one type, would be mixed up.
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"addresses": want}})
	if err != nil {
		return err
	}
	_, err = a.client.CoreV1().Nodes().Patch(ctx, a.nodeName, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it was deleted, and comes back with the right ones
	}
	if err == nil {
		a.log.Info("the node's addresses were written", "addresses", a.internal())
	}
	return err
}

// nodeAddresses are a node's as they are in its object.
func nodeAddresses(name string, internal, external []netip.Addr) []corev1.NodeAddress {
	var out []corev1.NodeAddress
	for _, a := range internal {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	for _, a := range external {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: a.String()})
	}
	return append(out, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
}
