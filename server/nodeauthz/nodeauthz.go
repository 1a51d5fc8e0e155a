// Package nodeauthz gives the node authorizer time to learn of a pod.
//
// A kubelet that has just received a pod immediately requests the token of its service account, its Secrets and
// its ConfigMaps. The node authorizer allows that for pods of the node, which it learns from a watch of its
// own. If the kubelet is faster than this watch, the request is forbidden, and the kubelet reports FailedMount
// and tries again after 0.5 s or more.
//
// It makes no decision of its own. Only package server may import it.
package nodeauthz

import (
	"context"
	"slices"
	"strings"
	"time"

	"k8s.io/apiserver/pkg/authorization/authorizer"
)

const (
	// firstWait is the delay before the second attempt. Each delay is twice as long as the one before, up to
	// lastWait: a quarter of a second in total.
	firstWait = time.Millisecond
	lastWait  = 128 * time.Millisecond
	// unrelated is in the reason of a request that is refused because no pod of the node needs the object.
	// TestNodeAuthorizerMatchesUpstream of scripts/house finds it in upstream's source.
	unrelated = "no relationship found between node"
)

// objects are the resources that a kubelet requests as soon as it knows a pod. Pods themselves are not
// included, because kubelets also request deleted pods, one after the other.
var objects = []string{"serviceaccounts", "secrets", "configmaps", "persistentvolumeclaims", "persistentvolumes", "resourceclaims"}

// Patient returns an authorizer that calls next repeatedly, for a quarter of a second, before it refuses a node
// access to an object that no pod of the node needs.
func Patient(next authorizer.Authorizer) authorizer.Authorizer { return patient{next} }

type patient struct {
	authorizer.Authorizer
}

// Authorize implements authorizer.Authorizer.
func (p patient) Authorize(ctx context.Context, a authorizer.Attributes) (decision authorizer.Decision, reason string, err error) {
	repeat(ctx, a, func() string {
		decision, reason, err = p.Authorizer.Authorize(ctx, a)
		if decision == authorizer.DecisionAllow {
			return ""
		}
		return reason
	})
	return decision, reason, err
}

// ConditionsAwareAuthorize implements authorizer.Authorizer.
func (p patient) ConditionsAwareAuthorize(ctx context.Context, a authorizer.Attributes) (decision authorizer.ConditionsAwareDecision) {
	repeat(ctx, a, func() string {
		decision = p.Authorizer.ConditionsAwareAuthorize(ctx, a)
		return decision.Reason()
	})
	return decision
}

// repeat calls authorize, which returns the reason of a refusal, as long as the node authorizer may lag behind.
func repeat(ctx context.Context, a authorizer.Attributes, authorize func() (refused string)) {
	for wait := firstWait; strings.Contains(authorize(), unrelated) && wait <= lastWait && slices.Contains(objects, a.GetResource()); wait *= 2 {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}
