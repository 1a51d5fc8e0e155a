package nodeobject

import (
	"context"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	v1core "k8s.io/client-go/kubernetes/typed/core/v1"
	cloudproviderapi "k8s.io/cloud-provider/api"
)

// Creating returns a client for the kubelet that creates the Node object with the addresses that [Addresses]
// maintains: the result of internal, and external.
func Creating(client kubernetes.Interface, internal func() []netip.Addr, external []netip.Addr) kubernetes.Interface {
	return &creating{client, internal, external}
}

// creating is a client that creates a Node with its addresses and without the taint of uninitialised nodes: the
// kubelet, which is configured for an external cloud provider, would create the Node without addresses and with
// the taint. It is a pointer, because the kubelet compares it with nil.
type creating struct {
	kubernetes.Interface
	internal func() []netip.Addr
	external []netip.Addr
}

// CoreV1 implements kubernetes.Interface.
func (r *creating) CoreV1() v1core.CoreV1Interface {
	return creatingCore{r.Interface.CoreV1(), r}
}

type creatingCore struct {
	v1core.CoreV1Interface
	r *creating
}

// Nodes implements v1core.NodesGetter.
func (c creatingCore) Nodes() v1core.NodeInterface {
	return creatingNodes{c.CoreV1Interface.Nodes(), c.r}
}

type creatingNodes struct {
	v1core.NodeInterface
	r *creating
}

// Create implements v1core.NodeInterface.
func (n creatingNodes) Create(ctx context.Context, node *corev1.Node, opts metav1.CreateOptions) (*corev1.Node, error) {
	node = node.DeepCopy()
	node.Spec.Taints = slices.DeleteFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == cloudproviderapi.TaintExternalCloudProvider })
	node.Status.Addresses = inObject(node.Name, n.r.internal(), n.r.external)
	return n.NodeInterface.Create(ctx, node, opts)
}
