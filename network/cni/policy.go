package cni

import (
	"context"
	"net/netip"
	"strings"

	"kedge/network/ipam"
)

// Attachment is a pod of this node with the addresses that it was given.
type Attachment struct {
	Owner string // unique among the attachments of the node
	// Namespace, Name and UID of the pod as the runtime knows it. UID may be empty; the UID
	// of a static pod differs from the API's.
	Namespace, Name, UID string
	Addrs                []netip.Addr
}

// PolicyEngine decides about the connections of pods. It may be called from many
// goroutines.
type PolicyEngine interface {
	// Restore passes the pods that were attached before this process started. It is called
	// once, before the other methods.
	Restore(all []Attachment)
	// Attach returns when the policies of a pod are in force. The pod has no interface yet,
	// and gets none after an error.
	Attach(ctx context.Context, a Attachment) error
	// Detach is called when a pod is gone, before its addresses are given to another pod.
	Detach(owner string) error
}

// attachmentOf returns the attachment that a lease describes.
func attachmentOf(lease ipam.Lease, n note) Attachment {
	namespace, name, _ := strings.Cut(n.Pod, "/")
	return Attachment{Owner: lease.Owner, Namespace: namespace, Name: name, UID: n.UID, Addrs: lease.Addrs}
}

// RestorePolicy passes the pods that were attached before to the policy engine. It is to be
// called once, after Reconcile and before the first request.
func (p *Plugin) RestorePolicy() {
	if p.policy == nil {
		return
	}
	var all []Attachment
	for _, lease := range p.ledger.Leases() {
		// An attachment whose note is lost has no name; the policy engine knows its
		// address.
		n, _ := readNote(lease) //nolint:errcheck // then it is empty
		all = append(all, attachmentOf(lease, n))
	}
	p.policy.Restore(all)
}
