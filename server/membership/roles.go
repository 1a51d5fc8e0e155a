package membership

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"

	"kedge/server/directory"
	"kedge/server/loopback"
)

// roleLabel is what kubectl shows as the node's role. The kubelet may not set
// labels of this kind for itself (NodeRestriction), so the server does.
const roleLabel = "node-role.kubernetes.io/control-plane"

// Roles is the component that labels this server's own node, and notes in the list of
// servers which it is.
type Roles struct {
	nodeName string
	loopback *loopback.Loopback
	list     *directory.Directory
	log      *slog.Logger
}

// NewRoles makes the component.
func NewRoles(nodeName string, lb *loopback.Loopback, list *directory.Directory, log *slog.Logger) *Roles {
	return &Roles{nodeName: nodeName, loopback: lb, list: list, log: log}
}

// Name implements lifecycle.Component.
func (r *Roles) Name() string { return "roles" }

// Run implements lifecycle.Component. It is ready at once: nothing waits for a label.
func (r *Roles) Run(ctx context.Context, ready func()) error {
	c, err := kubernetes.NewForConfig(r.loopback.Admin())
	if err != nil {
		return fmt.Errorf("make a client: %w", err)
	}
	ready()
	for ctx.Err() == nil {
		if err := r.follow(ctx, c); err != nil && ctx.Err() == nil {
			r.log.Debug("watch of the node ended", "err", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
	return nil
}

// follow labels the node whenever it has no role, until the watch ends.
func (r *Roles) follow(ctx context.Context, c kubernetes.Interface) error {
	w, err := c.CoreV1().Nodes().Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, r.nodeName).String(),
	})
	if err != nil {
		return err
	}
	defer w.Stop()
	patch := []byte(`{"metadata":{"labels":{"` + roleLabel + `":"true"}}}`)
	for e := range w.ResultChan() {
		node, ok := e.Object.(*corev1.Node)
		if !ok || e.Type == watch.Deleted {
			continue
		}
		r.list.SetNode(node.UID)
		if _, ok := node.Labels[roleLabel]; ok {
			continue
		}
		if _, err := c.CoreV1().Nodes().Patch(ctx, r.nodeName, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("label the node: %w", err)
		}
	}
	return nil
}
