package agent

import (
	"context"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	cloudproviderapi "k8s.io/cloud-provider/api"

	"kedge/internal/componentflags"
)

// OthersAddresses reports whether the user has decided where the node's addresses come
// from: from the kubelet's own flags, or from a cloud's controller.
func (c Config) OthersAddresses() bool {
	return componentflags.Has(c.KubeletArgs, "node-ip") || componentflags.Has(c.KubeletArgs, "cloud-provider")
}

// registering is a client with which a node begins with the addresses that
// [NodeAddresses] keeps, and ready for pods: the kubelet, which believes that a cloud's
// controller will come, begins without addresses and with a taint. It is a pointer, since
// the kubelet looks whether it is nil.
type registering struct {
	kubernetes.Interface
	internal func() []netip.Addr
	external []netip.Addr
}

// CoreV1 implements kubernetes.Interface.
func (r *registering) CoreV1() v1core.CoreV1Interface {
	return registeringCore{r.Interface.CoreV1(), r}
}

type registeringCore struct {
	v1core.CoreV1Interface
	r *registering
}

// Nodes implements v1core.NodesGetter.
func (c registeringCore) Nodes() v1core.NodeInterface {
	return registeringNodes{c.CoreV1Interface.Nodes(), c.r}
}

type registeringNodes struct {
	v1core.NodeInterface
	r *registering
}

// Create implements v1core.NodeInterface.
func (n registeringNodes) Create(ctx context.Context, node *corev1.Node, opts metav1.CreateOptions) (*corev1.Node, error) {
	node = node.DeepCopy()
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == cloudproviderapi.TaintExternalCloudProvider })
	node.Status.Addresses = nodeAddresses(node.Name, n.r.internal(), n.r.external)
	return n.NodeInterface.Create(ctx, node, opts)
}
