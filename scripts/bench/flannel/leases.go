package main

import (
	"context"
	"errors"
	"sync"

	"github.com/flannel-io/flannel/pkg/ip"
	"github.com/flannel-io/flannel/pkg/lease"
	"github.com/flannel-io/flannel/pkg/subnet"
)

// leases is flannel's subnet.Manager, which has the leases of the machines. This machine has a fixed range; the
// leases of the others arrive on a channel.
type leases struct {
	config *subnet.Config
	own    ip.IP4Net
	others chan lease.Lease
}

var _ subnet.Manager = (*leases)(nil)

func newLeases(config *subnet.Config, own ip.IP4Net) *leases {
	return &leases{config: config, own: own, others: make(chan lease.Lease)}
}

// Name implements subnet.Manager.
func (l *leases) Name() string { return "leases that the benchmark hands out" }

// GetNetworkConfig implements subnet.Manager.
func (l *leases) GetNetworkConfig(context.Context) (*subnet.Config, error) { return l.config, nil }

// AcquireLease implements subnet.Manager. attrs describes how other machines reach the backend.
func (l *leases) AcquireLease(_ context.Context, attrs *lease.LeaseAttrs) (*lease.Lease, error) {
	return &lease.Lease{EnableIPv4: true, Subnet: l.own, Attrs: *attrs}, nil
}

// WatchLeases implements subnet.Manager. It closes receiver when ctx is cancelled, which ends the backend.
func (l *leases) WatchLeases(ctx context.Context, receiver chan []lease.LeaseWatchResult) error {
	defer close(receiver)
	for {
		select {
		case other := <-l.others:
			seen := []lease.LeaseWatchResult{{Events: []lease.Event{{Type: lease.EventAdded, Lease: other}}}}
			select {
			case receiver <- seen:
			case <-ctx.Done():
				return ctx.Err()
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// errNotAsked is returned by methods that only flanneld calls, and no backend.
var errNotAsked = errors.New("only flanneld itself calls this")

// WatchLease implements subnet.Manager.
func (l *leases) WatchLease(context.Context, ip.IP4Net, ip.IP6Net, chan []lease.LeaseWatchResult) error {
	return errNotAsked
}

// RenewLease implements subnet.Manager.
func (l *leases) RenewLease(context.Context, *lease.Lease) error { return errNotAsked }

// CompleteLease implements subnet.Manager.
func (l *leases) CompleteLease(context.Context, *lease.Lease, *sync.WaitGroup) error {
	return errNotAsked
}

// HandleSubnetFile implements subnet.Manager.
func (l *leases) HandleSubnetFile(string, *subnet.Config, bool, ip.IP4Net, ip.IP6Net, int) error {
	return errNotAsked
}

// GetStoredMacAddresses implements subnet.Manager. Nothing is stored, so that flannel generates hardware
// addresses.
func (l *leases) GetStoredMacAddresses(context.Context) (v4, v6 string) { return "", "" }

// GetStoredPublicIP implements subnet.Manager.
func (l *leases) GetStoredPublicIP(context.Context) (v4, v6 string) { return "", "" }
