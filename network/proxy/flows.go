package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"

	"kedge/internal/lifecycle"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// flows deletes the tracked UDP flows of services whose endpoint is gone, or that were not
// translated before the service had one, so that the kernel translates them again: a client
// that keeps sending keeps its entry alive. Connections of other protocols end with their
// endpoint and need no help.
//
// It runs beside the writing of rules, because one walk through the kernel's table takes
// longer than a hundred changes of rules.
type flows struct {
	log  *slog.Logger
	wake lifecycle.Wakeup

	mu      sync.Mutex // guards what follows
	pending map[netip.AddrPort][]netip.AddrPort
}

func newFlows(log *slog.Logger) *flows {
	return &flows{log: log, wake: lifecycle.NewWakeup(), pending: map[netip.AddrPort][]netip.AddrPort{}}
}

// enqueue requests the deletion of the flows to a frontend that go to other endpoints than
// the given ones. Node ports have the node's addresses.
func (f *flows) enqueue(frontend netip.AddrPort, endpoints []netip.AddrPort) {
	f.mu.Lock()
	f.pending[frontend] = endpoints
	f.mu.Unlock()
	f.wake.Wake()
}

// run processes requests until ctx ends.
func (f *flows) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.wake:
		}
		f.mu.Lock()
		stale := staleFlows(f.pending)
		f.pending = map[netip.AddrPort][]netip.AddrPort{}
		f.mu.Unlock()
		for _, family := range stale.families() {
			if err := stale.deleteFrom(family); err != nil {
				f.log.Warn("UDP packets to services may go to removed endpoints until their senders pause", "err", err)
			}
		}
	}
}

// staleFlows has, for each frontend, the endpoints to which flows may go.
type staleFlows map[netip.AddrPort][]netip.AddrPort

func (s staleFlows) families() []netlink.InetFamily {
	var out []netlink.InetFamily
	for frontend := range s {
		family := netlink.InetFamily(unix.AF_INET)
		if frontend.Addr().Is6() {
			family = unix.AF_INET6
		}
		if !slices.Contains(out, family) {
			out = append(out, family)
		}
	}
	return out
}

// deleteFrom deletes the stale flows of a family. The kernel interrupts walks through a
// table that changes; the flows seen until then are deleted, and the others in the next
// attempt.
func (s staleFlows) deleteFrom(family netlink.InetFamily) error {
	const attempts = 5
	var err error
	for range attempts {
		if _, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, s); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return err
}

// MatchConntrackFlow selects the flows to delete.
func (s staleFlows) MatchConntrackFlow(flow *netlink.ConntrackFlow) bool {
	if flow.Forward.Protocol != unix.IPPROTO_UDP {
		return false
	}
	endpoints, ours := s[ipPort(flow.Forward.DstIP, flow.Forward.DstPort)]
	return ours && !slices.Contains(endpoints, ipPort(flow.Reverse.SrcIP, flow.Reverse.SrcPort))
}

func ipPort(ip net.IP, port uint16) netip.AddrPort {
	a, _ := netip.AddrFromSlice(ip)
	return netip.AddrPortFrom(a.Unmap(), port)
}
