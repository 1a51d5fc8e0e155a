package server

import (
	"context"
	"slices"

	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	api "k8s.io/kubernetes/pkg/apis/core"

	"kedge/server/claims"
	"kedge/server/join"
)

// checkAddresses makes the API server look at the addresses that nodes say they have.
func checkAddresses(config *app.Config, cfg Config) {
	generic := config.KubeAPIs.ControlPlane.Generic
	generic.AdmissionControl = admission.NewChainHandler(generic.AdmissionControl, claimedAddresses{
		Handler: admission.NewHandler(admission.Create, admission.Update),
		judge: claims.Judge{
			Nodes:  config.KubeAPIs.ControlPlane.VersionedInformers.Core().V1().Nodes().Lister(),
			Ranges: slices.Concat(cfg.ClusterCIDRs, cfg.ServiceCIDRs),
		},
	})
}

// claimedAddresses refuses what no node may say of itself.
type claimedAddresses struct {
	*admission.Handler
	judge claims.Judge
}

var _ admission.ValidationInterface = claimedAddresses{}

// Validate implements admission.ValidationInterface. What a node has already it keeps.
func (c claimedAddresses) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	node, ok := a.GetObject().(*api.Node)
	source, remote := join.Source(ctx)
	// Servers and administrators know what they say, and this process' own node, whose
	// requests come from no address, is one.
	if !ok || !remote || !slices.Contains(a.GetUserInfo().GetGroups(), user.NodesGroup) {
		return nil
	}
	var before []api.NodeAddress
	if old, ok := a.GetOldObject().(*api.Node); ok {
		before = old.Status.Addresses
	}
	for _, said := range node.Status.Addresses {
		if said.Type != api.NodeInternalIP && said.Type != api.NodeExternalIP || slices.Contains(before, said) {
			continue
		}
		if err := c.judge.Check(node.Name, said.Address, source); err != nil {
			return admission.NewForbidden(a, err)
		}
	}
	return nil
}
