package nodeobject

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

// Registration is the component that follows the node's own object: the kubelet creates it, the controllers
// assign pod ranges to it, and set passes them to the network. It is ready when set has been called.
type Registration struct {
	client   *rest.Config
	nodeName string
	set      func([]netip.Prefix) error
	log      *slog.Logger
}

// NewRegistration returns the component. It calls set with the node's pod ranges when they are first known and
// after each change.
func NewRegistration(client *rest.Config, nodeName string, set func([]netip.Prefix) error, log *slog.Logger) *Registration {
	return &Registration{client: client, nodeName: nodeName, set: set, log: log}
}

// Name implements lifecycle.Component.
func (r *Registration) Name() string { return "registration" }

// retryAfter is the delay before a watch that ended is started again.
const retryAfter = time.Second

// Run implements lifecycle.Component.
func (r *Registration) Run(ctx context.Context, ready func()) error {
	c, err := kubernetes.NewForConfig(r.client)
	if err != nil {
		return fmt.Errorf("create the node's client: %w", err)
	}
	for {
		if err := r.follow(ctx, c, ready); err != nil && ctx.Err() == nil {
			r.log.Debug("watch of the node ended", "err", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(retryAfter):
		}
	}
}

// follow watches the node's object until the watch ends.
func (r *Registration) follow(ctx context.Context, c kubernetes.Interface, ready func()) error {
	// Without a resource version the watch begins with the existing objects.
	w, err := c.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, r.nodeName).String(),
	})
	if err != nil {
		return err
	}
	defer w.Stop()
	for e := range w.ResultChan() {
		node, ok := e.Object.(*corev1.Node)
		if !ok {
			return errors.New("the API ended the watch")
		}
		ranges, err := podRanges(node)
		if err != nil {
			return err
		}
		if len(ranges) == 0 {
			continue
		}
		if err := r.set(ranges); err != nil {
			return fmt.Errorf("set the pod ranges: %w", err)
		}
		ready()
	}
	return nil
}

// Annotator returns a function that sets an annotation of the node's own object. It acts as the kubelet's user,
// which may change only its own Node.
func Annotator(rc *rest.Config, nodeName string) (func(ctx context.Context, key, value string) error, error) {
	c, err := kubernetes.NewForConfig(rc)
	if err != nil {
		return nil, fmt.Errorf("create the node's client: %w", err)
	}
	return func(ctx context.Context, key, value string) error {
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": map[string]string{key: value}}})
		if err != nil {
			return err
		}
		_, err = c.CoreV1().Nodes().Patch(ctx, nodeName, types.MergePatchType, patch, metav1.PatchOptions{})
		return err
	}, nil
}

// podRanges returns the pod ranges that the controllers have assigned to a node.
func podRanges(node *corev1.Node) ([]netip.Prefix, error) {
	cidrs := node.Spec.PodCIDRs
	if len(cidrs) == 0 && node.Spec.PodCIDR != "" {
		cidrs = []string{node.Spec.PodCIDR}
	}
	var out []netip.Prefix
	for _, s := range cidrs {
		p, err := netip.ParsePrefix(s)
		if err != nil {
			return nil, fmt.Errorf("pod range of the node: %w", err)
		}
		out = append(out, p)
	}
	return out, nil
}
