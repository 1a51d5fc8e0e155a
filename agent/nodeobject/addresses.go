package nodeobject

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
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"kedge/internal/lifecycle"
	"kedge/internal/nodeaddr"
)

// Addresses is the component that keeps the addresses in the Node object up to date. The kubelet would keep the
// addresses of its start for ever; with an external cloud provider it leaves them to other programs.
type Addresses struct {
	client   kubernetes.Interface
	nodeName string
	opts     Machine
	log      *slog.Logger

	nodes cache.SharedIndexInformer
	wake  lifecycle.Wakeup // requests a comparison

	mu         sync.Mutex   // guards unproven
	unverified []netip.Addr // addresses of this machine that no server has verified yet
}

// Machine describes the machine for [Addresses].
type Machine struct {
	// Internal returns the machine's current addresses. External are the additional addresses that the
	// administrator has configured.
	Internal func() []netip.Addr
	External []netip.Addr
	// Others means that another program writes the addresses in the Node object.
	Others bool
	// Has reports whether an interface of the machine has an address.
	Has func(netip.Addr) bool
	// From returns the configuration of a client that calls the API as the kubelet from an address of the
	// machine, at a server of the list or at one of more. It is nil on a server, whose node needs no proofs.
	From func(from netip.Addr, more []netip.Addr) *rest.Config
}

// NewAddresses returns the component. client acts as the kubelet; the caller must run watches.
func NewAddresses(client *rest.Config, watches informers.SharedInformerFactory, nodeName string, opts Machine, log *slog.Logger) (*Addresses, error) {
	c, err := kubernetes.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("create the node's client: %w", err)
	}
	a := &Addresses{
		client: c, nodeName: nodeName, opts: opts, log: log,
		nodes: watches.Core().V1().Nodes().Informer(), wake: lifecycle.NewWakeup(),
	}
	update := func(obj any) {
		if n, ok := obj.(*corev1.Node); ok && n.Name == nodeName {
			a.Refresh()
		}
	}
	if _, err := a.nodes.AddEventHandler(cache.ResourceEventHandlerFuncs{AddFunc: update, UpdateFunc: func(_, obj any) { update(obj) }}); err != nil {
		return nil, fmt.Errorf("follow the node: %w", err)
	}
	return a, nil
}

// Name implements lifecycle.Component.
func (a *Addresses) Name() string { return "nodeaddresses" }

// Refresh requests a comparison after a change of the machine's addresses.
func (a *Addresses) Refresh() {
	a.wake.Wake()
}

// Describe implements lifecycle.Describer.
func (a *Addresses) Describe() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.unverified) == 0 {
		return ""
	}
	return fmt.Sprintf("no server has verified the addresses %v", a.unverified)
}

// Run implements lifecycle.Component. It calls ready at once, because the node may not be registered yet.
func (a *Addresses) Run(ctx context.Context, ready func()) error {
	ready()
	var again <-chan time.Time
	wait := lifecycle.Backoff{First: retryAfter, Last: maxVerifyDelay, Spread: 1}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-again:
		case <-a.wake:
		}
		again = nil
		err := a.write(ctx)
		if err == nil {
			err = a.verify(ctx)
		}
		if err != nil && ctx.Err() == nil {
			pause := wait.Next()
			a.log.Debug("the node's addresses could not be written or verified; trying again", "err", err, "again", pause)
			again = time.After(pause)
		} else {
			wait.Reset()
		}
	}
}

// maxVerifyDelay is the maximum interval between attempts to verify addresses: without an address of the family on
// any server, they fail permanently.
const maxVerifyDelay = 5 * time.Minute

// write updates the addresses in the Node object. If the node is not registered, there is nothing to write: the
// kubelet registers it with the current addresses.
func (a *Addresses) write(ctx context.Context) error {
	obj, there, err := a.nodes.GetStore().GetByKey(a.nodeName)
	if err != nil || !there {
		return err
	}
	node, ok := obj.(*corev1.Node)
	want := inObject(a.nodeName, a.opts.Internal(), a.opts.External)
	if !ok || a.opts.Others || slices.Equal(node.Status.Addresses, want) {
		return nil
	}
	// A merge patch replaces the list. A strategic merge patch would mix up the two addresses of a dual-stack
	// node, which have the same type.
	patch, err := json.Marshal(map[string]any{"status": map[string]any{"addresses": want}})
	if err != nil {
		return err
	}
	_, err = a.client.CoreV1().Nodes().Patch(ctx, a.nodeName, types.MergePatchType, patch, metav1.PatchOptions{}, "status")
	if apierrors.IsNotFound(err) {
		return nil // it was deleted, and will be registered with the current addresses
	}
	if err == nil {
		a.log.Info("updated the addresses in the Node object", "addresses", a.opts.Internal())
	}
	return err
}

// verify calls the servers from each address of this machine that is in the Node object and that no server has
// verified yet: other nodes route only to verified addresses (package nodeaddr). It cannot call from an address
// that the machine does not have itself, such as a router's; the servers see that address at every call, or an
// administrator allows it.
func (a *Addresses) verify(ctx context.Context) error {
	if a.opts.From == nil {
		return nil
	}
	obj, there, err := a.nodes.GetStore().GetByKey(a.nodeName)
	if err != nil || !there {
		return err
	}
	node, ok := obj.(*corev1.Node)
	if !ok {
		return nil
	}
	var errs []error
	var left []netip.Addr
	for _, from := range unverified(node, a.opts.Has) {
		proven, err := a.call(ctx, from)
		if err != nil {
			errs = append(errs, fmt.Errorf("call from %s: %w", from, err))
		}
		if !proven {
			left = append(left, from)
		}
	}
	a.note(left)
	if len(left) > 0 {
		errs = append(errs, fmt.Errorf("no server has verified the addresses %v", left))
	}
	return errors.Join(errs...)
}

// note stores the unverified addresses for Describe, and logs them when they change.
func (a *Addresses) note(left []netip.Addr) {
	a.mu.Lock()
	changed := !slices.Equal(left, a.unverified)
	a.unverified = left
	a.mu.Unlock()
	if changed && len(left) > 0 {
		a.log.Warn("no server has verified some addresses of this node, so other nodes do not route to them; an administrator can allow them",
			"addresses", left, "command", fmt.Sprintf("kedge kubectl annotate node %s %s=%s", a.nodeName, nodeaddr.Allowed, left[0]))
	}
}

// unverified returns the node's claimed addresses that this machine has and no server has verified.
func unverified(node *corev1.Node, has func(netip.Addr) bool) []netip.Addr {
	proofs, _ := nodeaddr.Proofs(node.Annotations)
	return slices.DeleteFunc(nodeaddr.Claims(nodeaddr.StatusAddresses(node), node.Annotations), func(a netip.Addr) bool {
		return !has(a) || slices.ContainsFunc(proofs, func(p nodeaddr.Proof) bool { return p.Address == a })
	})
}

// call sends a request without changes from an address, and reports whether the server has recorded the
// address.
func (a *Addresses) call(ctx context.Context, from netip.Addr) (bool, error) {
	c, err := kubernetes.NewForConfig(a.opts.From(from, a.serverAddresses()))
	if err != nil {
		return false, fmt.Errorf("create the node's client: %w", err)
	}
	node, err := c.CoreV1().Nodes().Patch(ctx, a.nodeName, types.MergePatchType, []byte("{}"), metav1.PatchOptions{}, "status")
	if err != nil {
		return false, err
	}
	return !slices.Contains(unverified(node, a.opts.Has), from), nil
}

// serverAddresses returns the addresses of the servers that are nodes.
func (a *Addresses) serverAddresses() []netip.Addr {
	var out []netip.Addr
	for _, obj := range a.nodes.GetStore().List() {
		node, ok := obj.(*corev1.Node)
		if !ok {
			continue
		}
		if _, server := node.Labels[controlPlane]; server {
			out = append(out, nodeaddr.Claims(nodeaddr.StatusAddresses(node), nil)...)
		}
	}
	return out
}

// controlPlane is the label of nodes that are servers; nodes cannot set it themselves.
const controlPlane = "node-role.kubernetes.io/control-plane"

// inObject returns the addresses of a node in the form of its object.
func inObject(name string, internal, external []netip.Addr) []corev1.NodeAddress {
	var out []corev1.NodeAddress
	for _, a := range internal {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a.String()})
	}
	for _, a := range external {
		out = append(out, corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: a.String()})
	}
	return append(out, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
}
