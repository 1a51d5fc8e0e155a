package cni

import (
	"log/slog"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// forgetFlows makes the kernel decide anew about datagrams to host ports. A
// client that goes on sending keeps its old entry alive: to a pod that is gone,
// or untranslated, from before the port was published. Connections of the other
// protocols begin with a handshake and need no help.
//
// It is best effort: what stays behind expires when the client pauses.
func forgetFlows(pods []netip.Addr, ports []hostPort, log *slog.Logger) {
	filter := &flowFilter{pods: pods}
	for _, p := range ports {
		if p.Protocol == unix.IPPROTO_UDP {
			filter.ports = append(filter.ports, p.Host)
		}
	}
	if len(filter.ports) == 0 {
		return
	}
	// One walk through the kernel's table, which takes 10 ms where it is large,
	// for both families; a second one only for what it finds.
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	if err != nil {
		log.Debug("tracked flows of a host port not listed", "error", err)
		return
	}
	families := map[uint8]bool{}
	for _, flow := range flows {
		if filter.MatchConntrackFlow(flow) {
			families[flow.FamilyType] = true
		}
	}
	for family := range families {
		if _, err := netlink.ConntrackDeleteFilters(netlink.ConntrackTable, netlink.InetFamily(family), filter); err != nil {
			log.Debug("tracked flows of a host port not deleted", "error", err)
		}
	}
}

type flowFilter struct {
	pods  []netip.Addr
	ports []uint16
}

// MatchConntrackFlow chooses datagram flows to one of the ports that a pod
// answers, or nobody because they are not translated.
func (f *flowFilter) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP || !slices.Contains(f.ports, flow.Forward.DstPort) {
		return false
	}
	if flow.Forward.DstIP.Equal(flow.Reverse.SrcIP) {
		return true
	}
	answers, ok := netip.AddrFromSlice(flow.Reverse.SrcIP)
	return ok && slices.Contains(f.pods, answers.Unmap())
}
