// Package claims checks what nodes claim about themselves and their pods, and maintains the proofs of nodes'
// addresses (package nodeaddr). Other nodes route packets by these claims, and load balancers send traffic for
// services to them, so a compromised node must not be able to claim another machine's addresses.
//
// It does not know the API's requests: package server extracts the claims from them. Only package server may
// import it.
package claims

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/labels"
	v1listers "k8s.io/client-go/listers/core/v1"

	"kedge/internal/nodeaddr"
)

// Reasons why a claim is refused.
var (
	ErrNotNodeAddress = errors.New("not a valid node address: it is in the pod or service range, or not global unicast")
	ErrTaken          = errors.New("another node has the address")
	ErrPodRange       = errors.New("the cluster assigns pod ranges; a node may not set its own")
	ErrAllowance      = errors.New("only an administrator may write the annotation " + nodeaddr.Allowed)
	ErrPodAddress     = errors.New("not an address of the pod's node")
	ErrUnreadable     = errors.New("the annotation " + nodeaddr.Allowed + " must be a list of addresses and ranges, separated by commas, such as 192.168.0.5,10.1.0.0/24")
)

// Node has the checked fields of a Node object.
type Node struct {
	Name        string
	Addresses   []corev1.NodeAddress
	PodCIDRs    []string
	Annotations map[string]string
}

// claims returns the addresses that need proofs.
func (n Node) claims() []netip.Addr {
	return nodeaddr.Claims(nodeaddr.StatusAddresses(&corev1.Node{Status: corev1.NodeStatus{Addresses: n.Addresses}}), n.Annotations)
}

// Write is a request that creates or changes a Node object.
type Write struct {
	Node   Node
	Before *Node // nil if the request creates the object
	// ByNode means that a node's user made the request, from Source. Trusted means that the user is that of a
	// server's own node, whose requests are made in memory and have no source address.
	ByNode, Trusted bool
	Source          netip.Addr
	Now             time.Time
}

// CheckAllowance returns nil if a Node object's annotation with the allowed addresses is valid or unchanged.
func CheckAllowance(n, before Node) error {
	if n.Annotations[nodeaddr.Allowed] == before.Annotations[nodeaddr.Allowed] {
		return nil
	}
	if _, unreadable := nodeaddr.AllowedRanges(n.Annotations); len(unreadable) > 0 {
		return fmt.Errorf("%w; not %q", ErrUnreadable, unreadable)
	}
	return nil
}

// Annotate returns the annotations of the Node object, with the proofs of its addresses in [nodeaddr.Proven].
// all are the cluster's nodes: the proofs of the others decide for each address whether the node must prove it
// again.
//
// A write by an administrator, or by a cloud controller manager, may change the annotation itself. It proves
// the addresses that it adds to the node, but no address that the node has claimed before.
func Annotate(w Write, all []*corev1.Node) map[string]string {
	var before []nodeaddr.Proof
	known := false
	if w.Before != nil {
		before, known = nodeaddr.Proofs(w.Before.Annotations)
	}
	allowed, _ := nodeaddr.AllowedRanges(w.Node.Annotations)
	claims := w.Node.claims()
	if !w.ByNode {
		if w.Before != nil && !known && len(allowed) == 0 {
			return w.Node.Annotations // an object without proofs, from an older kedge, stays so until its node calls
		}
		if proofs, now := nodeaddr.Proofs(w.Node.Annotations); now {
			before = proofs
		}
		before = append(slices.Clone(before), added(w, claims, before)...)
	}
	proofs := nodeaddr.Prove(claims, before, allowed, nodeaddr.Call{
		Source: w.Source, Trusted: w.Trusted, Now: w.Now, Rival: nodeaddr.Rival(all, w.Node.Name),
	})
	out := maps.Clone(w.Node.Annotations)
	if out == nil {
		out = map[string]string{}
	}
	out[nodeaddr.Proven] = nodeaddr.Format(proofs)
	return out
}

// added returns proofs of the addresses that a write adds to a Node object.
func added(w Write, claims []netip.Addr, proven []nodeaddr.Proof) []nodeaddr.Proof {
	var old []netip.Addr
	if w.Before != nil {
		old = w.Before.claims()
	}
	var out []nodeaddr.Proof
	for _, a := range claims {
		if !slices.Contains(old, a) && !slices.ContainsFunc(proven, func(p nodeaddr.Proof) bool { return p.Address == a }) {
			out = append(out, nodeaddr.Proof{Address: a, Since: w.Now.UTC().Truncate(time.Second)})
		}
	}
	return out
}

// Pod has the checked fields of a Pod object.
type Pod struct {
	Node        string
	HostNetwork bool
	IPs         []string
	HostIPs     []string
}

// Checker checks claims against the state of the cluster.
type Checker struct {
	Nodes       v1listers.NodeLister
	Ranges      []netip.Prefix // of pods and services
	ForeignPods bool           // pods have addresses outside their nodes' ranges
}

// CheckNode returns nil if a node's user, calling from source, may change before to n. Values that the node has
// already are accepted.
func (c Checker) CheckNode(n, before Node, source netip.Addr) error {
	if !slices.Equal(n.PodCIDRs, before.PodCIDRs) {
		return fmt.Errorf("%w: %v", ErrPodRange, n.PodCIDRs)
	}
	if n.Annotations[nodeaddr.Allowed] != before.Annotations[nodeaddr.Allowed] {
		return ErrAllowance
	}
	var errs []error
	for _, claimed := range n.Addresses {
		if (claimed.Type == corev1.NodeInternalIP || claimed.Type == corev1.NodeExternalIP) && !slices.Contains(before.Addresses, claimed) {
			errs = append(errs, c.Check(n.Name, claimed.Address, source))
		}
	}
	return errors.Join(errs...)
}

// Check returns nil if the named node, calling from source, may claim an address. The claim alone does not make
// other nodes route there: see package nodeaddr.
//
// A node may claim the address from which it calls, even if another node had it before: machines that are
// renumbered may swap addresses. It may also claim addresses on another link or behind a router, except the
// InternalIP of another node.
func (c Checker) Check(name, address string, source netip.Addr) error {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("%w: %q", ErrNotNodeAddress, address)
	}
	addr = addr.Unmap()
	if !addr.IsGlobalUnicast() || slices.ContainsFunc(c.Ranges, func(r netip.Prefix) bool { return r.Contains(addr) }) {
		return fmt.Errorf("%w: %s", ErrNotNodeAddress, addr)
	}
	if addr == source {
		return nil
	}
	all, err := c.Nodes.List(labels.Everything())
	if err != nil {
		return err
	}
	for _, other := range all {
		if other.Name != name && slices.ContainsFunc(other.Status.Addresses, func(a corev1.NodeAddress) bool {
			has, err := netip.ParseAddr(a.Address)
			return a.Type == corev1.NodeInternalIP && err == nil && has.Unmap() == addr
		}) {
			return fmt.Errorf("%w: %s has %s, and %s calls from %s", ErrTaken, other.Name, addr, name, source)
		}
	}
	return nil
}

// CheckPod returns nil if a node's user may change the addresses of before to those of p: a pod's addresses
// must be in its node's ranges, and a pod on the host network must have its node's addresses. Services and
// network policies depend on these addresses.
func (c Checker) CheckPod(p, before Pod) error {
	// status.hostIPs is checked too, because clients read there where a pod runs.
	sameIPs := slices.Equal(p.IPs, before.IPs) || len(p.IPs) == 0 || c.ForeignPods
	if sameIPs && (slices.Equal(p.HostIPs, before.HostIPs) || len(p.HostIPs) == 0) {
		return nil
	}
	node, err := c.Nodes.Get(p.Node)
	if apierrors.IsNotFound(err) {
		return fmt.Errorf("%w: the node %q does not exist", ErrPodAddress, p.Node)
	}
	if err != nil {
		return err
	}
	for _, text := range p.HostIPs {
		if a, err := netip.ParseAddr(text); !slices.Contains(before.HostIPs, text) && (err != nil || !mayHave(node, true, a.Unmap())) {
			return fmt.Errorf("%w: %s is not an address of node %s", ErrPodAddress, text, p.Node)
		}
	}
	if sameIPs {
		return nil
	}
	for _, text := range p.IPs {
		if slices.Contains(before.IPs, text) {
			continue // from a range that the node had before it registered again
		}
		a, err := netip.ParseAddr(text)
		if err != nil || !mayHave(node, p.HostNetwork, a.Unmap()) {
			return fmt.Errorf("%w: %s is not in the pod ranges of node %s", ErrPodAddress, text, p.Node)
		}
	}
	return nil
}

func mayHave(node *corev1.Node, hostNetwork bool, a netip.Addr) bool {
	if hostNetwork {
		return slices.ContainsFunc(node.Status.Addresses, func(claimed corev1.NodeAddress) bool {
			has, err := netip.ParseAddr(claimed.Address)
			return err == nil && has.Unmap() == a
		})
	}
	return slices.ContainsFunc(node.Spec.PodCIDRs, func(s string) bool {
		r, err := netip.ParsePrefix(s)
		return err == nil && r.Contains(a)
	})
}
