package server

import (
	"context"
	"fmt"
	"net/netip"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/apiserver/pkg/endpoints/request"
	"k8s.io/apiserver/pkg/registry/generic"
	"k8s.io/apiserver/pkg/server/egressselector"
	"k8s.io/apiserver/pkg/storage"
	"k8s.io/apiserver/pkg/storage/storagebackend"
	"k8s.io/apiserver/pkg/storage/storagebackend/factory"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"
	"k8s.io/kubernetes/cmd/kube-apiserver/app"
	api "k8s.io/kubernetes/pkg/apis/core"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
	"kedge/server/tunnels"
)

// errOtherEgress is returned if the user configures egress, which the tunnels replace.
var errOtherEgress error = errorkind.BadSetting("kube-apiserver-arg", ": egress-selector-config-file cannot be set: kedge has its own way to the nodes")

// throughTunnels makes the API server reach kubelets, pods and services through hub.
func throughTunnels(config *app.Config, hub *tunnels.Hub) error {
	generic := config.KubeAPIs.ControlPlane.Generic
	if generic.EgressSelector != nil {
		return errOtherEgress
	}
	hub.SetNodes(nodes{config.KubeAPIs.ControlPlane.VersionedInformers.Core().V1().Nodes().Lister()})
	generic.RESTOptionsGetter = namedNodes{generic.RESTOptionsGetter}
	config.KubeAPIs.Extra.KubeletClientConfig.Lookup = func(egressselector.NetworkContext) (utilnet.DialFunc, error) { return hub.Kubelet, nil }
	// This transport is used for the proxy of pods and services; extension API servers and webhooks take its
	// dialer.
	config.KubeAPIs.ControlPlane.ProxyTransport.DialContext = hub.Cluster
	return nil
}

// nodes reads the cluster's nodes from the API server's own cache.
type nodes struct{ lister v1listers.NodeLister }

// Owner implements tunnels.Nodes. If several nodes have the same range, it belongs to the oldest node.
func (n nodes) Owner(a netip.Addr) string {
	all, err := n.lister.List(labels.Everything())
	if err != nil {
		return "" // a cache does not fail
	}
	owner, since := "", time.Time{}
	for _, node := range all {
		if created := node.CreationTimestamp.Time; hasPods(node, a) && (owner == "" || created.Before(since)) {
			owner, since = node.Name, created
		}
	}
	return owner
}

func hasPods(node *corev1.Node, a netip.Addr) bool {
	for _, cidr := range node.Spec.PodCIDRs {
		if p, err := netip.ParsePrefix(cidr); err == nil && p.Contains(a) {
			return true
		}
	}
	return false
}

// Names implements tunnels.Nodes.
func (n nodes) Names() []string {
	all, err := n.lister.List(labels.Everything())
	if err != nil {
		return nil
	}
	out := make([]string, 0, len(all))
	for _, node := range all {
		out = append(out, node.Name)
	}
	return out
}

// namedNodes makes the parts of the API server that call kubelets see the address derived from the node's name,
// instead of the addresses that the node has written into its status. Upstream reads the address from the store
// of nodes and can be given it in no other place. Responses to clients are not changed.
type namedNodes struct{ generic.RESTOptionsGetter }

// GetRESTOptions implements generic.RESTOptionsGetter.
func (n namedNodes) GetRESTOptions(resource schema.GroupResource, example runtime.Object) (generic.RESTOptions, error) {
	opts, err := n.RESTOptionsGetter.GetRESTOptions(resource, example)
	if err != nil || resource != (schema.GroupResource{Resource: "nodes"}) {
		return opts, err
	}
	decorate := opts.Decorator
	opts.Decorator = func(config *storagebackend.ConfigForResource, prefix string, key func(runtime.Object) (string, error),
		object, list func() runtime.Object, attrs storage.AttrFunc, trigger storage.IndexerFuncs, indexers *cache.Indexers,
	) (storage.Interface, factory.DestroyFunc, error) {
		s, destroy, err := decorate(config, prefix, key, object, list, attrs, trigger, indexers)
		return nodeStore{s}, destroy, err
	}
	return opts, nil
}

type nodeStore struct{ storage.Interface }

// Get implements storage.Interface.
func (s nodeStore) Get(ctx context.Context, key string, opts storage.GetOptions, into runtime.Object) error {
	if err := s.Interface.Get(ctx, key, opts, into); err != nil || !callsKubelet(ctx) {
		return err
	}
	node, ok := into.(*api.Node)
	if !ok {
		return fmt.Errorf("unexpected type %T in the store of nodes", into)
	}
	address := joining.NodeAddress(node.Name).String()
	// The slice is replaced and not changed, because it is shared with the watch cache. It has addresses of
	// every type, because the user may set kubelet-preferred-address-types.
	node.Status.Addresses = nil
	for _, t := range []api.NodeAddressType{api.NodeInternalIP, api.NodeExternalIP, api.NodeHostName, api.NodeInternalDNS, api.NodeExternalDNS} {
		node.Status.Addresses = append(node.Status.Addresses, api.NodeAddress{Type: t, Address: address})
	}
	return nil
}

// callsKubelet reports whether a request is forwarded to a kubelet. Such requests read a node only for its
// address.
func callsKubelet(ctx context.Context) bool {
	r, ok := request.RequestInfoFrom(ctx)
	if !ok || !r.IsResourceRequest || r.APIGroup != "" {
		return false
	}
	switch r.Resource {
	case "nodes":
		return r.Subresource == "proxy"
	case "pods":
		switch r.Subresource {
		case "log", "exec", "attach", "portforward":
			return true
		}
	}
	return false
}
