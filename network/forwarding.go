package network

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
)

// enableForwarding makes the machine forward packets between its pods and other networks.
// It returns the parameters that it had to set.
func enableForwarding(ipv6 bool) (set []string, err error) {
	const v4, v6 = "net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"
	changed, err := setSysctl(v4, "1")
	if err != nil {
		return nil, fmt.Errorf("enable IPv4 forwarding: %w", err)
	}
	if changed {
		set = append(set, v4)
	}
	if !ipv6 {
		return set, nil
	}
	advertised, err := keepRouterAdvertisements()
	set = append(set, advertised...)
	if err != nil {
		return set, err
	}
	changed, err = setSysctl(v6, "1")
	if errors.Is(err, fs.ErrNotExist) {
		return set, errors.New("the pod ranges include IPv6, which this kernel lacks or has disabled; boot without ipv6.disable=1, or use IPv4 ranges only")
	}
	if err != nil {
		return set, fmt.Errorf("enable IPv6 forwarding: %w", err)
	}
	if changed {
		set = append(set, v6)
	}
	return set, nil
}

// enableForwardingOn enables forwarding on the interfaces that lead to other nodes, each of
// which has its own parameter.
func enableForwardingOn(links []string) (set []string, err error) {
	for _, link := range links {
		name := filepath.Join("net/ipv4/conf", link, "forwarding")
		changed, err := setSysctl(name, "1")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return set, fmt.Errorf("enable forwarding on %s: %w", link, err)
		}
		if changed {
			set = append(set, name)
		}
	}
	return set, nil
}

// restoreForwarding sets the parameters of enableForwarding, and logs those that another
// program has changed. Caller holds mu.
func (n *Network) restoreForwarding() error {
	set, err := enableForwarding(n.wantsIPv6())
	onLinks, linksErr := enableForwardingOn(n.tunnels)
	for _, name := range slices.Concat(set, onLinks) {
		n.log.Warn("kernel parameter restored: another program had changed it, and pods need it", "parameter", strings.ReplaceAll(name, "/", "."))
	}
	return errors.Join(err, linksErr)
}

// watchForwarding restores forwarding when the kernel reports that it was switched off,
// until ctx is cancelled. The parameters of pods' interfaces are left to a repair round.
func (n *Network) watchForwarding(ctx context.Context) error {
	groups := []uint32{unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV6_NETCONF}
	var last time.Time
	changed := func() {
		n.wake.Wake()
		if time.Since(last) < repairPause {
			return // another program changes it repeatedly; the repair rounds have pauses
		}
		last = time.Now()
		n.mu.Lock()
		defer n.mu.Unlock()
		if err := n.restoreForwarding(); err != nil {
			n.log.Warn("forwarding was switched off and cannot be restored", "err", err)
		}
	}
	if err := kernelnet.Follow(ctx, unix.NETLINK_ROUTE, groups, forwardingOff, changed); err != nil {
		return fmt.Errorf("watch kernel parameters: %w", err)
	}
	return nil
}

// forwardingOff reports whether a message says that forwarding was switched off: for IPv4
// on the machine or on an interface, for IPv6 on the machine, since its interfaces have no
// such parameter.
func forwardingOff(msgs []netlink.Message) bool {
	const header = 4                     // struct netconfmsg: the family, and three bytes of padding
	const index, forwarding = 1, 2       // NETCONFA_IFINDEX, NETCONFA_FORWARDING
	const allInterfaces = math.MaxUint32 // NETCONFA_IFINDEX_ALL, which is -1
	for _, m := range msgs {
		if m.Header.Type != unix.RTM_NEWNETCONF || len(m.Data) < header {
			continue
		}
		attributes, err := netlink.NewAttributeDecoder(m.Data[header:])
		if err != nil {
			continue
		}
		var of, value uint32 = allInterfaces, 1
		for attributes.Next() {
			switch attributes.Type() {
			case index:
				of = attributes.Uint32()
			case forwarding:
				value = attributes.Uint32()
			}
		}
		if attributes.Err() == nil && value == 0 && (m.Data[0] == unix.AF_INET || of == allInterfaces) {
			return true
		}
	}
	return false
}

// keepRouterAdvertisements makes hardware interfaces that learn addresses and default route
// from a router continue to do so: on a machine that forwards packets, the kernel ignores
// router advertisements unless accept_ra is 2. Virtual interfaces are left alone, because a
// machine behind them could make itself the router of this node.
func keepRouterAdvertisements() (set []string, err error) {
	const dir = "/proc/sys/net/ipv6/conf"
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return set, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list IPv6 interfaces: %w", err)
	}
	for _, e := range entries {
		if _, err := os.Stat(filepath.Join("/sys/class/net", e.Name(), "device")); err != nil {
			continue
		}
		name := filepath.Join("net/ipv6/conf", e.Name(), "accept_ra")
		now, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil || string(bytes.TrimSpace(now)) != "1" {
			continue
		}
		changed, err := setSysctl(name, "2")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return set, fmt.Errorf("keep router advertisements on %s: %w", e.Name(), err)
		}
		if changed {
			set = append(set, name)
		}
	}
	return set, nil
}

// setSysctl writes a kernel parameter unless it has the value already: writing forwarding
// again would reset other parameters.
func setSysctl(name, value string) (changed bool, err error) {
	path := filepath.Join("/proc/sys", name)
	now, err := os.ReadFile(path)
	if err != nil {
		return false, err
	}
	if string(bytes.TrimSpace(now)) == value {
		return false, nil
	}
	return true, os.WriteFile(path, []byte(value), 0)
}
