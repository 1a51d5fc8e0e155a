package server

import (
	"context"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	"k8s.io/kubernetes/pkg/apis/coordination"
	api "k8s.io/kubernetes/pkg/apis/core"

	"kedge/internal/addresspool"
	"kedge/server/bootstrap"
	"kedge/server/claims"
	"kedge/server/join"
)

// checkClaims makes the API server check what nodes write about themselves: their addresses, their pod ranges,
// and the addresses of their pods. NodeRestriction, upstream's admission plugin for nodes, checks none of
// these.
func checkClaims(config *app.Config, cfg Config) {
	generic := config.KubeAPIs.ControlPlane.Generic
	nodes := config.KubeAPIs.ControlPlane.VersionedInformers.Core().V1().Nodes().Lister()
	generic.AdmissionControl = admission.NewChainHandler(generic.AdmissionControl, claimedAddresses{
		Handler: admission.NewHandler(admission.Create, admission.Update),
		nodes:   nodes,
		checker: claims.Checker{
			Nodes:  nodes,
			Ranges: slices.Concat(cfg.ClusterCIDRs, cfg.ServiceCIDRs), ForeignPods: cfg.ForeignPods,
		},
	})
}

// claimedAddresses is the admission plugin that records proofs of nodes' addresses, and refuses claims that a
// node may not make about itself or its pods.
type claimedAddresses struct {
	*admission.Handler
	nodes   v1listers.NodeLister
	checker claims.Checker
}

var (
	_ admission.MutationInterface   = claimedAddresses{}
	_ admission.ValidationInterface = claimedAddresses{}
)

// caller reports whether a node's user made a request, its source address, and whether the node is trusted. A
// server's own node calls in memory and is trusted like the server. Servers and administrators are not
// restricted.
func caller(ctx context.Context, a admission.Attributes) (source netip.Addr, node, trusted bool) {
	source, remote := join.Source(ctx)
	node = slices.Contains(a.GetUserInfo().GetGroups(), user.NodesGroup)
	return source, node, node && !remote
}

// Admit implements admission.MutationInterface: it sets the annotation with the proven addresses, and overrides
// the value that a node's user writes.
func (c claimedAddresses) Admit(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	node, ok := a.GetObject().(*api.Node)
	if !ok || a.GetResource().Resource != "nodes" {
		return nil
	}
	source, byNode, trusted := caller(ctx, a)
	all, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	w := claims.Write{Node: claimsOf(node), Source: source, ByNode: byNode, Trusted: trusted, Now: time.Now()}
	if old, ok := a.GetOldObject().(*api.Node); ok {
		before := claimsOf(old)
		w.Before = &before
	}
	node.Annotations = claims.Annotate(w, all)
	return nil
}

// Validate implements admission.ValidationInterface. Values that a node has already are accepted.
func (c claimedAddresses) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	if a.GetResource().GroupResource() == coordination.Resource("leases") {
		return checkLease(a)
	}
	source, byNode, trusted := caller(ctx, a)
	var err error
	switch o := a.GetObject().(type) {
	case *api.Node:
		var before claims.Node
		if old, ok := a.GetOldObject().(*api.Node); ok {
			before = claimsOf(old)
		}
		switch {
		case !byNode:
			err = claims.CheckAllowance(claimsOf(o), before)
		case !trusted:
			err = c.checker.CheckNode(claimsOf(o), before, source)
		}
	case *api.Pod:
		old, ok := a.GetOldObject().(*api.Pod)
		if !ok || !byNode || trusted {
			return nil // a mirror pod is created without addresses; NodeRestriction checks the rest
		}
		err = c.checker.CheckPod(podClaims(o), podClaims(old))
	}
	if err != nil {
		return admission.NewForbidden(a, err)
	}
	return nil
}

// checkLease refuses leases that a node's data path writes under the name of another node: leases decide which
// node announces the addresses of load balancers.
func checkLease(a admission.Attributes) error {
	node, ours := strings.CutPrefix(a.GetUserInfo().GetName(), bootstrap.NetworkGroup+":")
	if !ours || a.GetName() == addresspool.LeasePrefix+node {
		return nil
	}
	return admission.NewForbidden(a, errOthersLease)
}

var errOthersLease = errors.New("a node's data path may only write the lease of its own node")

func claimsOf(n *api.Node) claims.Node {
	out := claims.Node{Name: n.Name, PodCIDRs: n.Spec.PodCIDRs, Annotations: n.Annotations}
	for _, a := range n.Status.Addresses {
		out.Addresses = append(out.Addresses, corev1.NodeAddress{Type: corev1.NodeAddressType(a.Type), Address: a.Address})
	}
	return out
}

func podClaims(p *api.Pod) claims.Pod {
	out := claims.Pod{Node: p.Spec.NodeName, HostNetwork: p.Spec.HostNetwork}
	for _, ip := range p.Status.PodIPs {
		out.IPs = append(out.IPs, ip.IP)
	}
	for _, ip := range p.Status.HostIPs {
		out.HostIPs = append(out.HostIPs, ip.IP)
	}
	return out
}
