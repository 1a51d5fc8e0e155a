package cni

import (
	"log/slog"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// deleteFlows deletes tracked UDP flows to host ports, so that the kernel translates them
// again. A client that keeps sending keeps its old entry alive: to a pod that is gone, or
// untranslated, from before the port was published. Connections of other protocols begin
// with a handshake and need no help.
//
// It is best effort: remaining flows expire when the client pauses.
func deleteFlows(pods []netip.Addr, ports []hostPort, log *slog.Logger) {
	filter := &flowFilter{pods: pods}
	for _, p := range ports {
		if p.Protocol == unix.IPPROTO_UDP {
			filter.ports = append(filter.ports, p.Host)
		}
	}
	if len(filter.ports) == 0 {
		return
	}
	// One walk through the kernel's table, which takes 10 ms if it is large, for both
	// families; a second walk only for the flows found.
	flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_UNSPEC)
	if err != nil {
		log.Debug("tracked flows of a host port not listed", "err", err)
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
			log.Debug("tracked flows of a host port not deleted", "err", err)
		}
	}
}

type flowFilter struct {
	pods  []netip.Addr
	ports []uint16
}

// MatchConntrackFlow selects UDP flows to one of the ports that a pod answers, or that are
// not translated.
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
