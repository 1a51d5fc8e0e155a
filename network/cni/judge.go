package cni

import (
	"context"
	"net/netip"
	"strings"

	"kedge/network/ipam"
)

// Attachment is a pod of this node and the addresses that it was given.
type Attachment struct {
	Owner string // unique among the attachments of the node
	// Namespace, Name and UID are the pod's as the runtime knows it. UID may be
	// empty; that of a static pod is not the API's.
	Namespace, Name, UID string
	Addrs                []netip.Addr
}

// Judge decides which connections pods may have. It may be called from many
// goroutines.
type Judge interface {
	// Restore says which pods the node has from before, once, before all else.
	Restore(all []Attachment)
	// Attach returns when the decisions about a pod are in force. The pod has no
	// interface yet, and gets none after an error.
	Attach(ctx context.Context, a Attachment) error
	// Detach says that a pod is gone. Its addresses have not been given away yet.
	Detach(owner string) error
}

// attachmentOf reads from a lease whose it is.
func attachmentOf(lease ipam.Lease, n note) Attachment {
	namespace, name, _ := strings.Cut(n.Pod, "/")
	return Attachment{Owner: lease.Owner, Namespace: namespace, Name: name, UID: n.UID, Addrs: lease.Addrs}
}

// RestoreJudge tells the judge of the pods that were attached before. It is to be
// called once, after Reconcile and before the first request.
func (p *Plugin) RestoreJudge() {
	if p.judge == nil {
		return
	}
	var all []Attachment
	for _, lease := range p.ledger.Leases() {
		// One whose note is lost has no name; the judge knows its address.
		n, _ := readNote(lease) //nolint:errcheck // then it is empty
		all = append(all, attachmentOf(lease, n))
	}
	p.judge.Restore(all)
}
