package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// flows makes the kernel decide anew about datagrams to services whose endpoint is
// gone, or that were not translated before there was one: a client that goes on
// sending keeps its entry alive. Connections of the other protocols end with their
// endpoint and need no help.
//
// It works beside the writing of rules, because one walk through the kernel's
// table takes longer than a hundred changes of rules.
type flows struct {
	log  *slog.Logger
	wake chan struct{} // holds one request

	mu      sync.Mutex // guards what follows
	pending map[netip.AddrPort][]netip.AddrPort
}

func newFlows(log *slog.Logger) *flows {
	return &flows{log: log, wake: make(chan struct{}, 1), pending: map[netip.AddrPort][]netip.AddrPort{}}
}

// check asks to look at the flows to a frontend: those to other endpoints than the
// given ones will be forgotten. Node ports have the node's addresses.
func (f *flows) check(frontend netip.AddrPort, endpoints []netip.AddrPort) {
	f.mu.Lock()
	f.pending[frontend] = endpoints
	f.mu.Unlock()
	ask(f.wake)
}

// run works until ctx ends.
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
			if err := stale.forget(family); err != nil {
				f.log.Warn("datagrams to services may go to endpoints that are gone, until their senders pause", "err", err)
			}
		}
	}
}

// staleFlows says to which endpoints flows to a frontend may go.
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

// forget deletes the stale flows of a family. The kernel interrupts walks through
// a table that changes; what was seen until then is deleted, and the rest after that.
func (s staleFlows) forget(family netlink.InetFamily) error {
	const attempts = 5
	var err error
	for range attempts {
		if _, err = netlink.ConntrackDeleteFilters(netlink.ConntrackTable, family, s); !errors.Is(err, netlink.ErrDumpInterrupted) && !errors.Is(err, unix.EINTR) {
			return err
		}
	}
	return err
}

// MatchConntrackFlow chooses the flows to forget.
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
