package network

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/netwatch"
	"kedge/network/cni"
)

const (
	// settle is how long repair waits after an event: those who change
	// interfaces or rules change many at once.
	settle = 200 * time.Millisecond
	// repairPause is the least time between two rounds caused by events. Starting
	// pods cause events too.
	repairPause = 3 * time.Second
)

// repairSoon asks for a round of repair and returns at once.
func (n *Network) repairSoon() {
	select {
	case n.wake <- struct{}{}:
	default: // asked for already
	}
}

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
			n.log.Warn("pod network could not be repaired", "error", err)
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
	forwarding := enableForwarding(n.wantsIPv6())
	if mtu, err := n.mtu(); err == nil && len(n.podCIDRs) > 0 {
		plugin.Configure(cni.Setup{Ranges: n.podCIDRs, MTU: mtu})
	}
	n.mu.Unlock()
	repaired, err := n.table.Repair()
	if repaired {
		n.log.Warn("rules repaired: somebody removed or changed them", "table", n.table.Name())
	}
	return errors.Join(forwarding, err, plugin.Reconcile(ctx, false))
}

// watchLinks calls changed when an interface, address or route goes away or the
// default route changes, until ctx is cancelled.
func watchLinks(ctx context.Context, changed func()) error {
	groups := []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE,
	}
	if err := netwatch.Follow(ctx, unix.NETLINK_ROUTE, groups, concerns, changed); err != nil {
		return fmt.Errorf("watch interfaces: %w", err)
	}
	return nil
}

// concerns says whether a message may mean that something of ours is gone, or
// that the way out has changed. New interfaces and addresses of pods do not.
func concerns(msgs []netlink.Message) bool {
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
