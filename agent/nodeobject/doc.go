// Package nodeobject maintains the parts of the Node object that the node itself decides: the labels and taints
// for its registration, its addresses, and the verification of its addresses. It also reads the node's pod
// ranges there.
//
// It does not know the kubelet, which creates the object. The packages agent and assembly may import it.
package nodeobject
