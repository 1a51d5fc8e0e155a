package upgrades

import (
	"context"
	"fmt"
	"io"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kubectl/pkg/drain"
)

// drainLimit is the time limit for the eviction of a node's pods. It is that of "kedge upgrade --all --drain".
const drainLimit = 10 * time.Minute

// helper returns upstream's drain with the settings of "kedge upgrade --all --drain".
func (w *statusWriter) helper(ctx context.Context) *drain.Helper {
	return &drain.Helper{
		Ctx: ctx, Client: w.c.client, Force: true, IgnoreAllDaemonSets: true, DeleteEmptyDirData: true,
		GracePeriodSeconds: -1, Timeout: drainLimit, Out: io.Discard, ErrOut: io.Discard,
	}
}

// drain evicts the pods of a node.
func (w *statusWriter) drain(ctx context.Context, name string) error {
	node, err := w.c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return err
	}
	if !node.Spec.Unschedulable { // an administrator may have cordoned it, and wants it to stay so
		if err := w.change(ctx, func(s *Status) { s.node(name).Cordoned = true }); err != nil {
			return err
		}
		if err := drain.RunCordonOrUncordon(w.helper(ctx), node, true); err != nil {
			return fmt.Errorf("cordon the node: %w", err)
		}
	}
	if err := drain.RunNodeDrain(w.helper(ctx), name); err != nil {
		return fmt.Errorf("drain the node: %w", err)
	}
	return nil
}

// uncordon makes a node schedulable that the upgrade has cordoned.
func (w *statusWriter) uncordon(ctx context.Context, name string) error {
	w.mu.Lock()
	ours := w.u.Status.node(name).Cordoned
	w.mu.Unlock()
	if !ours {
		return nil
	}
	node, err := w.c.client.CoreV1().Nodes().Get(ctx, name, metav1.GetOptions{})
	if err == nil {
		err = drain.RunCordonOrUncordon(w.helper(ctx), node, false)
	}
	if err != nil && !apierrors.IsNotFound(err) {
		return fmt.Errorf("uncordon the node: %w", err)
	}
	err = w.change(ctx, func(s *Status) { s.node(name).Cordoned = false })
	if apierrors.IsNotFound(err) {
		return nil // the user has deleted the upgrade meanwhile
	}
	return err
}

// uncordonEnded makes the nodes schedulable whose upgrade does not go on, and that are still cordoned.
func (w *statusWriter) uncordonEnded(ctx context.Context) error {
	for _, n := range w.u.Status.Nodes {
		if n.Cordoned && n.Phase != NodeUpgrading {
			if err := w.uncordon(ctx, n.Name); err != nil {
				return err
			}
		}
	}
	return nil
}
