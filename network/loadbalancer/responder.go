package loadbalancer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"kedge/internal/kernelnet"

	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// announceDelays are the delays of the announcements of a new address: neighbours may miss
// one.
var announceDelays = []time.Duration{0, 500 * time.Millisecond, 2 * time.Second}

// linksMaxAge is the maximum age of the list of interfaces.
const linksMaxAge = 5 * time.Second

// link is an interface on which addresses are announced.
type link struct {
	index    int
	name     string
	mac      net.HardwareAddr
	networks []netip.Prefix
	local    netip.Addr // its link-local address; the zero Addr without IPv6
}

// responder answers requests for addresses, in the network namespace in which it was
// created.
type responder struct {
	podLinks string // prefix of the names of pods' interfaces, on which nothing is announced
	log      *slog.Logger
	arp, ndp *os.File
	groups   int // socket with the memberships in multicast groups, so that solicitations arrive
	nl       *netlink.Handle

	mu     sync.Mutex // guards what follows
	addrs  map[netip.Addr]bool
	links  []link
	readAt time.Time
}

func newResponder(podLinks string, log *slog.Logger) (r *responder, err error) {
	r = &responder{podLinks: podLinks, log: log, groups: -1, addrs: map[netip.Addr]bool{}}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	if r.arp, err = packetSocket(unix.ETH_P_ARP, nil); err != nil {
		return nil, fmt.Errorf("listen for ARP: %w", err)
	}
	if r.ndp, err = packetSocket(unix.ETH_P_IPV6, solicitationsOnly()); err != nil {
		return nil, fmt.Errorf("listen for neighbour solicitations: %w", err)
	}
	if r.nl, err = netlink.NewHandle(unix.NETLINK_ROUTE); err != nil {
		return nil, fmt.Errorf("look at interfaces: %w", err)
	}
	r.groups, err = unix.Socket(unix.AF_INET6, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		r.groups, err = -1, nil // a kernel without IPv6
	}
	return r, err
}

// packetSocket opens a socket for whole frames of one protocol, on all interfaces.
func packetSocket(kind uint16, filter []bpf.RawInstruction) (*os.File, error) {
	// Without a protocol until the filter is attached, otherwise unfiltered frames would
	// arrive.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	if len(filter) > 0 {
		code := make([]unix.SockFilter, len(filter))
		for i, f := range filter {
			code[i] = unix.SockFilter{Code: f.Op, Jt: f.Jt, Jf: f.Jf, K: f.K}
		}
		err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(code)), Filter: &code[0]})
	}
	if err == nil {
		err = unix.Bind(fd, &unix.SockaddrLinklayer{Protocol: bigEndian(kind)})
	}
	if err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	return os.NewFile(uintptr(fd), "packets"), nil
}

func bigEndian(v uint16) uint16 { return v<<8 | v>>8 }

// solicitationsOnly drops all other IPv6 packets in the kernel: there may be millions.
func solicitationsOnly() []bpf.RawInstruction {
	code, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: ethernetLen + 6, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: protocolICMPv6, SkipTrue: 3},
		bpf.LoadAbsolute{Off: ethernetLen + ipv6Len, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: solicitation, SkipTrue: 1},
		bpf.RetConstant{Val: 1500},
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		panic(err) // the program is a constant
	}
	return code
}

func (r *responder) close() {
	for _, f := range []*os.File{r.arp, r.ndp} {
		if f != nil {
			f.Close()
		}
	}
	if r.nl != nil {
		r.nl.Close()
	}
	if r.groups >= 0 {
		unix.Close(r.groups)
	}
}

// run answers requests until ctx ends.
func (r *responder) run(ctx context.Context) {
	stop := context.AfterFunc(ctx, func() {
		_ = r.arp.SetReadDeadline(time.Unix(1, 0))
		_ = r.ndp.SetReadDeadline(time.Unix(1, 0))
	})
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { r.serve(ctx, r.arp, parseARP, r.answerARP) })
	both.Go(func() { r.serve(ctx, r.ndp, parseSolicitation, r.answerSolicitation) })
	both.Wait()
}

func (r *responder) serve(ctx context.Context, f *os.File, parse func([]byte) (request, bool), answer func(link, request) error) {
	conn, err := f.SyscallConn()
	if err != nil {
		r.log.Error("cannot answer ARP or neighbour solicitations", "err", err) // the file is open
		return
	}
	buf := make([]byte, 1600)
	for ctx.Err() == nil {
		var n int
		var from unix.Sockaddr
		var failed error
		err := conn.Read(func(fd uintptr) bool {
			n, from, failed = unix.Recvfrom(int(fd), buf, 0)
			return failed != unix.EAGAIN
		})
		if err != nil || failed != nil {
			if errors.Is(failed, unix.ENETDOWN) || errors.Is(failed, unix.ENOBUFS) || errors.Is(failed, syscall.EINTR) {
				continue
			}
			if ctx.Err() == nil {
				r.log.Error("stopped answering ARP or neighbour solicitations", "err", errors.Join(err, failed))
			}
			return
		}
		at, ok := from.(*unix.SockaddrLinklayer)
		if !ok || at.Pkttype == unix.PACKET_OUTGOING {
			continue
		}
		q, ok := parse(buf[:n])
		if !ok {
			continue
		}
		l, ours := r.linkFor(at.Ifindex, q.target)
		if !ours {
			continue
		}
		if err := answer(l, q); err != nil {
			r.log.Debug("request not answered", "address", q.target, "link", l.name, "err", err)
		}
	}
}

// linkFor returns the interface of a request, and reports whether the request is to be
// answered there.
func (r *responder) linkFor(index int, a netip.Addr) (link, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.addrs[a] {
		return link{}, false
	}
	for _, l := range r.linksOf(a) {
		if l.index == index {
			return l, true
		}
	}
	return link{}, false
}

// linksOf returns the interfaces on which an address is announced: the interfaces on its
// network or, if there are none, all, since other hosts then have a route to it there.
// Caller holds mu.
func (r *responder) linksOf(a netip.Addr) []link {
	r.refresh()
	var out []link
	for _, l := range r.links {
		if slices.ContainsFunc(l.networks, func(p netip.Prefix) bool { return p.Contains(a) }) {
			out = append(out, l)
		}
	}
	if len(out) == 0 {
		return r.links
	}
	return out
}

// refresh reads the interfaces if the list is too old. Caller holds mu.
func (r *responder) refresh() {
	if time.Since(r.readAt) <= linksMaxAge {
		return
	}
	links, err := r.readLinks()
	if err != nil {
		r.log.Warn("cannot read network interfaces", "err", err)
		return
	}
	r.links, r.readAt = links, time.Now()
}

// invalidateLinks makes the next refresh read the interfaces.
func (r *responder) invalidateLinks() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.readAt = time.Time{}
}

// readLinks returns the interfaces with neighbours: Ethernet, up, and not a pod's.
func (r *responder) readLinks() ([]link, error) {
	all, err := kernelnet.List(r.nl.LinkList)
	if err != nil {
		return nil, err
	}
	var out []link
	for _, i := range all {
		a := i.Attrs()
		if len(a.HardwareAddr) != 6 || a.Flags&net.FlagUp == 0 || a.Flags&net.FlagLoopback != 0 || a.RawFlags&unix.IFF_NOARP != 0 || strings.HasPrefix(a.Name, r.podLinks) {
			continue
		}
		l := link{index: a.Index, name: a.Name, mac: a.HardwareAddr}
		addrs, err := kernelnet.List(func() ([]netlink.Addr, error) { return r.nl.AddrList(i, netlink.FAMILY_ALL) })
		if err != nil {
			return nil, err
		}
		for _, addr := range addrs {
			ip, ok := netip.AddrFromSlice(addr.IP)
			if !ok {
				continue
			}
			ip = ip.Unmap()
			ones, _ := addr.Mask.Size()
			if ip.Is6() && ip.IsLinkLocalUnicast() {
				l.local = ip
				continue
			}
			if p := netip.PrefixFrom(ip, ones); ones < ip.BitLen() {
				l.networks = append(l.networks, p.Masked())
			}
		}
		out = append(out, l)
	}
	return out, nil
}

// networks returns the networks of this node's interfaces.
func (r *responder) networks() []netip.Prefix {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.refresh()
	var out []netip.Prefix
	for _, l := range r.links {
		out = append(out, l.networks...)
	}
	slices.SortFunc(out, func(a, b netip.Prefix) int { return strings.Compare(a.String(), b.String()) })
	return slices.Compact(out)
}

func (r *responder) answerARP(l link, q request) error {
	return r.send(r.arp, unix.ETH_P_ARP, l, arp(arpReply, l.mac, q.target, q.mac, q.sender))
}

func (r *responder) answerSolicitation(l link, q request) error {
	if q.sender.IsUnspecified() { // duplicate address detection: the address is in use
		return r.send(r.ndp, unix.ETH_P_IPV6, l, advertise(l.mac, q.target, l.source(q.target), groupMAC(allNodes), allNodes, flagOverride))
	}
	return r.send(r.ndp, unix.ETH_P_IPV6, l, advertise(l.mac, q.target, l.source(q.target), q.mac, q.sender, flagOverride|flagSolicited))
}

// source returns the source address of an advertisement.
func (l link) source(a netip.Addr) netip.Addr {
	if l.local.IsValid() {
		return l.local
	}
	return a
}

func (r *responder) send(f *os.File, kind uint16, l link, frame []byte) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	err = conn.Write(func(fd uintptr) bool {
		failed = unix.Sendto(int(fd), frame, 0, &unix.SockaddrLinklayer{Ifindex: l.index, Protocol: bigEndian(kind)})
		return failed != unix.EAGAIN
	})
	return errors.Join(err, failed)
}

// setAddresses sets the addresses that this node announces.
func (r *responder) setAddresses(ctx context.Context, addrs []netip.Addr) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for a := range r.addrs {
		if !slices.Contains(addrs, a) {
			delete(r.addrs, a)
			r.leaveGroups(a)
			r.log.Info("load balancer address is no longer announced by this node", "address", a)
		}
	}
	for _, a := range addrs {
		r.setMembership(a, unix.IPV6_JOIN_GROUP) // there may be new interfaces
		if r.addrs[a] {
			continue
		}
		r.addrs[a] = true
		r.log.Info("load balancer address is announced by this node", "address", a)
		for _, after := range announceDelays {
			if after == 0 {
				r.announce(a)
				continue
			}
			time.AfterFunc(after, func() {
				r.mu.Lock()
				defer r.mu.Unlock()
				if ctx.Err() == nil && r.addrs[a] {
					r.announce(a)
				}
			})
		}
	}
}

// leaveGroups leaves the multicast groups of an address, unless another address has the
// same. Caller holds mu.
func (r *responder) leaveGroups(a netip.Addr) {
	for o := range r.addrs {
		if o.Is6() && a.Is6() && solicitedNode(o) == solicitedNode(a) {
			return
		}
	}
	r.setMembership(a, unix.IPV6_LEAVE_GROUP)
}

// setMembership joins or leaves the solicited-node groups of an IPv6 address: switches and
// interfaces filter solicitations for groups without members. Caller holds mu.
func (r *responder) setMembership(a netip.Addr, option int) {
	if a.Is4() || r.groups < 0 {
		return
	}
	for _, l := range r.linksOf(a) {
		m := unix.IPv6Mreq{Multiaddr: solicitedNode(a).As16(), Interface: uint32(l.index)}
		err := unix.SetsockoptIPv6Mreq(r.groups, unix.IPPROTO_IPV6, option, &m)
		// The membership may exist already, or no longer.
		if err != nil && !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
			r.log.Debug("cannot change multicast group membership", "address", a, "link", l.name, "err", err)
		}
	}
}

// announce sends announcements of an address. Caller holds mu.
func (r *responder) announce(a netip.Addr) {
	for _, l := range r.linksOf(a) {
		var err error
		if a.Is4() {
			// Some systems process only requests, some only replies.
			err = errors.Join(
				r.send(r.arp, unix.ETH_P_ARP, l, arp(arpRequest, l.mac, a, broadcast, a)),
				r.send(r.arp, unix.ETH_P_ARP, l, arp(arpReply, l.mac, a, broadcast, a)))
		} else {
			err = r.send(r.ndp, unix.ETH_P_IPV6, l, advertise(l.mac, a, l.source(a), groupMAC(allNodes), allNodes, flagOverride))
		}
		if err != nil {
			r.log.Debug("address not announced", "address", a, "link", l.name, "err", err)
		}
	}
}
