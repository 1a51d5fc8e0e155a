package backend

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/kernelnet"
	"kedge/network/cni"
)

// watchRoutes calls changed when an interface of the machine changed or a route or address
// was removed, until ctx is cancelled. Events of pods' links do not count: most events are
// theirs, and they affect no route to other nodes.
func watchRoutes(ctx context.Context, changed func()) error {
	groups := []uint32{
		unix.RTNLGRP_LINK, unix.RTNLGRP_IPV4_IFADDR, unix.RTNLGRP_IPV6_IFADDR,
		unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
		unix.RTNLGRP_NEIGH,
	}
	if err := kernelnet.Follow(ctx, unix.NETLINK_ROUTE, groups, relevant, changed); err != nil {
		return fmt.Errorf("watch routes: %w", err)
	}
	return nil
}

// relevant reports whether messages may mean that an object of kedge was removed, or that
// the link to the other nodes has changed.
func relevant(msgs []netlink.Message) bool {
	for _, m := range msgs {
		switch m.Header.Type {
		case unix.RTM_NEWLINK, unix.RTM_DELLINK:
			if name, ok := linkName(m.Data); !ok || !strings.HasPrefix(name, cni.LinkTag) {
				return true
			}
		case unix.RTM_DELROUTE:
			// struct rtmsg: the sixth byte is the protocol.
			if len(m.Data) > 5 && m.Data[5] == routeProtocol {
				return true
			}
		case unix.RTM_NEWADDR, unix.RTM_DELADDR:
			// struct ifaddrmsg: the second byte is the prefix length. Links of pods have
			// only single addresses; links of nodes rarely do.
			if len(m.Data) > 1 && m.Data[1] != 32 && m.Data[1] != 128 {
				return true
			}
		case unix.RTM_DELRULE:
			return true
		case unix.RTM_DELNEIGH:
			// struct ndmsg: the ninth and tenth byte are the state. Most permanent
			// neighbours and forwarding entries are kedge's.
			if len(m.Data) > 9 && binary.NativeEndian.Uint16(m.Data[8:])&unix.NUD_PERMANENT != 0 {
				return true
			}
		}
	}
	return false
}

// linkName returns the name in a message about an interface.
func linkName(data []byte) (string, bool) {
	if len(data) < unix.SizeofIfInfomsg {
		return "", false
	}
	attrs, err := netlink.NewAttributeDecoder(data[unix.SizeofIfInfomsg:])
	if err != nil {
		return "", false
	}
	for attrs.Next() {
		if attrs.Type() == unix.IFLA_IFNAME {
			return attrs.String(), true
		}
	}
	return "", false
}
