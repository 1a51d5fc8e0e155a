package server

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/admission"
	"k8s.io/apiserver/pkg/authentication/user"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	api "k8s.io/kubernetes/pkg/apis/core"

	"kedge/server/join"
)

// checkAddresses makes the API server look at the addresses that nodes say they have.
func checkAddresses(config *app.Config, cfg Config) {
	generic := config.KubeAPIs.ControlPlane.Generic
	generic.AdmissionControl = admission.NewChainHandler(generic.AdmissionControl, claimedAddresses{
		Handler: admission.NewHandler(admission.Create, admission.Update),
		nodes:   config.KubeAPIs.ControlPlane.VersionedInformers.Core().V1().Nodes().Lister(),
		ranges:  slices.Concat(cfg.ClusterCIDRs, cfg.ServiceCIDRs),
	})
}

// claimedAddresses refuses what no node may say of itself: addresses that are no
// machine's, and those of another node. Other nodes send there what is for its pods, and
// load balancers what is for services.
//
// An address from which the node calls is its own, whoever had it before: machines that
// are renumbered get each other's. What it does not call from it may have too, on another
// link or behind a router, as long as nobody else does.
type claimedAddresses struct {
	*admission.Handler
	nodes  v1listers.NodeLister
	ranges []netip.Prefix // of pods and services
}

var _ admission.ValidationInterface = claimedAddresses{}

// Validate implements admission.ValidationInterface.
func (c claimedAddresses) Validate(ctx context.Context, a admission.Attributes, _ admission.ObjectInterfaces) error {
	node, ok := a.GetObject().(*api.Node)
	source, remote := join.Source(ctx)
	// Servers and administrators know what they say, and of the requests of nodes those
	// from this process' own come from no address.
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
		if err := c.check(node.Name, said, source); err != nil {
			return admission.NewForbidden(a, err)
		}
	}
	return nil
}

func (c claimedAddresses) check(name string, said api.NodeAddress, source netip.Addr) error {
	addr, err := netip.ParseAddr(said.Address)
	if err != nil {
		return fmt.Errorf("the address %q of node %s is none", said.Address, name)
	}
	addr = addr.Unmap()
	if !addr.IsGlobalUnicast() || slices.ContainsFunc(c.ranges, func(r netip.Prefix) bool { return r.Contains(addr) }) {
		return fmt.Errorf("%s can be no node's address: it is of pods, of services, or of no machine", addr)
	}
	if addr == source {
		return nil
	}
	all, err := c.nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Name != name && slices.ContainsFunc(other.Status.Addresses, func(a corev1.NodeAddress) bool {
			has, err := netip.ParseAddr(a.Address)
			return a.Type == corev1.NodeInternalIP && err == nil && has.Unmap() == addr
		}) {
			return fmt.Errorf("node %s has the address %s; node %s calls from %s", other.Name, addr, name, source)
		}
	}
	return nil
}
