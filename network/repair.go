package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/network/cni"
)

const (
	// settle is the delay of a repair round after an event: programs that change interfaces
	// or rules usually make several changes.
	settle = 200 * time.Millisecond
	// repairPause is the minimum time between two rounds that events have requested.
	// Starting pods cause events too.
	repairPause = 3 * time.Second
)

func (n *Network) repairLoop(ctx context.Context, plugin *cni.Plugin) {
	regular := time.NewTicker(repairEvery)
	defer regular.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-regular.C:
		case <-n.wake:
			select {
			case <-ctx.Done():
				return
			case <-time.After(settle):
			}
		}
		err := n.repair(ctx, plugin)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			n.log.Warn("pod network could not be repaired", "err", err)
		}
		n.mu.Lock()
		n.failure = err
		n.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(repairPause):
		}
	}
}

func (n *Network) repair(ctx context.Context, plugin *cni.Plugin) error {
	n.mu.Lock()
	forwarding := n.restoreForwarding()
	if mtu, err := n.mtu(); err == nil && len(n.podCIDRs) > 0 {
		plugin.Configure(cni.Setup{Ranges: n.podCIDRs, MTU: mtu})
	}
	n.mu.Unlock()
	repaired, err := n.table.Repair()
	if repaired {
		n.log.Warn("nftables rules repaired: another program had removed or changed them", "table", n.table.Name())
	}
	return errors.Join(forwarding, err, plugin.Reconcile(ctx))
}

// watchLinks calls changed when an interface, address or route is removed or the default
// route changes, until ctx is cancelled.
func watchLinks(ctx context.Context, changed func()) error {
	groups := []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	}
	if err := kernelnet.Follow(ctx, unix.NETLINK_ROUTE, groups, relevant, changed); err != nil {
		return fmt.Errorf("watch interfaces: %w", err)
	}
	return nil
}

// relevant reports whether messages may mean that an object of kedge was removed, or that
// the default route has changed. New interfaces and addresses of pods are not relevant.
func relevant(msgs []netlink.Message) bool {
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.RTM_DELLINK, unix.RTM_DELADDR, unix.RTM_DELROUTE:
			return true
		case unix.RTM_NEWROUTE:
			// struct rtmsg: the second byte is the length of the destination.
			if len(m.Data) > 1 && m.Data[1] == 0 {
				return true
			}
		}
	}
	return false
}
