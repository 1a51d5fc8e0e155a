// Package claims judges the addresses that nodes say they have. Other nodes send there
// what is for a node's pods, and load balancers what is for services, so a node that was
// taken over must not have another's.
//
// It does not know how nodes say it: server asks, and alone may import it.
package claims

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	v1listers "k8s.io/client-go/listers/core/v1"
)

// Why a node cannot have an address.
var (
	ErrNobodys = errors.New("that can be no node's address: it is of pods, of services, or of no machine")
	ErrTaken   = errors.New("another node has the address")
)

// Judge knows what is taken.
type Judge struct {
	Nodes  v1listers.NodeLister
	Ranges []netip.Prefix // of pods and services
}

// Check returns nil if the node of a name, which calls from source, may have an address.
//
// An address from which it calls is its own, whoever had it before: machines that are
// renumbered get each other's. What it does not call from it may have too, on another link
// or behind a router, as long as it is no other node's InternalIP.
func (j Judge) Check(name, address string, source netip.Addr) error {
	addr, err := netip.ParseAddr(address)
	if err != nil {
		return fmt.Errorf("%w: %q", ErrNobodys, address)
	}
	addr = addr.Unmap()
	if !addr.IsGlobalUnicast() || slices.ContainsFunc(j.Ranges, func(r netip.Prefix) bool { return r.Contains(addr) }) {
		return fmt.Errorf("%w: %s", ErrNobodys, addr)
	}
	if addr == source {
		return nil
	}
	all, err := j.Nodes.List(labels.Everything())
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
