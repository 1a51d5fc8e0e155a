package datastore

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"syscall"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
)

// When all machines have moved at once, no address in the book is right any more. So a member without a leader
// calls for the others on its links, with a datagram that says which member it is and on which port it listens.
// Who hears it tries a hello over TLS at the address it came from, and that decides: a stranger that sends such
// datagrams makes members try connections that fail, at most one a second and four addresses a member, and
// learns from those that arrive at the peer port what anybody can learn who connects to it.
//
// The socket is open only while another member is missing. Calls are sent only while there is no leader, but
// heard also with one: two of three that have found each other must still hear the third.

const (
	// callEvery is how often a member without a leader calls.
	callEvery = 2 * time.Second
	// discoverEvery is how often it is looked whether that is necessary.
	discoverEvery = time.Second
	// maxLinks bounds the links that are called on. The kernel lets a socket be in 20 groups.
	maxLinks = 16
)

var (
	group4 = netip.MustParseAddr("239.255.75.71") // for sites, RFC 2365
	group6 = netip.MustParseAddr("ff02::6b:6564:6765")
)

// A call is callMagic, the cluster's tag, and the ID and port of the caller.
var callMagic = []byte("kedge peer 1")

const callSize = 12 + 16 + 8 + 2

// clusterTag tells clusters on one link apart. It is no secret.
func (m *mesh) clusterTag() []byte {
	ca, err := os.ReadFile(m.cfg.CAFile)
	if err != nil {
		m.log.Debug("peers' authority", "err", err)
	}
	sum := sha256.Sum256(append(ca, m.book.get().Cluster...))
	return sum[:16]
}

// discover runs as long as the mesh is open.
func (m *mesh) discover() {
	for m.ctx.Err() == nil {
		if m.anyMissing() {
			if err := m.discoverOnce(); err != nil && m.ctx.Err() == nil {
				m.log.Debug("look for members on the links", "err", err)
			}
		}
		sleep(m.ctx, discoverEvery)
	}
}

func (m *mesh) anyMissing() bool {
	now := time.Now()
	return slices.ContainsFunc(m.all(), func(w *way) bool { return w.missing(now) })
}

// discoverOnce listens, and calls, until nobody is missing any more.
func (m *mesh) discoverOnce() error {
	ctx, cancel := context.WithCancel(m.ctx)
	defer cancel()
	lc := net.ListenConfig{Control: shareAddress}
	conn, err := lc.ListenPacket(ctx, "udp", fmt.Sprintf(":%d", m.cfg.Port))
	if err != nil {
		return err
	}
	defer conn.Close()
	tag := m.clusterTag()

	heard := make(chan struct{})
	go func() {
		defer close(heard)
		m.hear(conn, tag)
	}()
	defer func() { conn.Close(); <-heard }()

	m.log.Debug("looking for members on the links")
	for ctx.Err() == nil && m.anyMissing() {
		// Links come and go, the more so when machines move.
		links := multicastLinks()
		join(conn, links)
		if m.leaderless() {
			m.call(conn, links, tag)
		}
		sleep(ctx, callEvery)
	}
	return nil
}

func (m *mesh) hear(conn net.PacketConn, tag []byte) {
	var last time.Time
	buf := make([]byte, callSize+1)
	for {
		n, from, err := conn.ReadFrom(buf)
		if err != nil {
			return
		}
		u, ok := from.(*net.UDPAddr)
		if !ok || n != callSize || !bytes.HasPrefix(buf, callMagic) || !bytes.Equal(buf[12:28], tag) {
			continue
		}
		id := fmt.Sprintf("%x", binary.BigEndian.Uint64(buf[28:]))
		w := m.way(id)
		if w == nil || w.reach().alive(time.Now()) {
			continue
		}
		// Calls are rare. More of them are no reason to work more.
		if now := time.Now(); now.Sub(last) < 100*time.Millisecond {
			continue
		} else {
			last = now
		}
		source := u.AddrPort().Addr().Unmap()
		w.hint(netip.AddrPortFrom(source, binary.BigEndian.Uint16(buf[36:])))
	}
}

func (m *mesh) call(conn net.PacketConn, links []net.Interface, tag []byte) {
	id, err := parseID(m.book.self().ID)
	if err != nil {
		return
	}
	packet := slices.Concat(callMagic, tag)
	packet = binary.BigEndian.AppendUint64(packet, uint64(id))
	packet = binary.BigEndian.AppendUint16(packet, m.cfg.Port)

	ports := []uint16{m.cfg.Port}
	for _, p := range m.book.get().Others {
		for _, a := range p.Addresses {
			if !slices.Contains(ports, a.Port()) {
				ports = append(ports, a.Port())
			}
		}
	}
	c4, c6 := ipv4.NewPacketConn(conn), ipv6.NewPacketConn(conn)
	for _, link := range links {
		for _, port := range ports {
			// A link may have no address of a family; then there is nobody to call on it.
			if err := c4.SetMulticastInterface(&link); err == nil {
				_, _ = conn.WriteTo(packet, net.UDPAddrFromAddrPort(netip.AddrPortFrom(group4, port)))
			}
			if err := c6.SetMulticastInterface(&link); err == nil {
				_, _ = conn.WriteTo(packet, net.UDPAddrFromAddrPort(netip.AddrPortFrom(group6.WithZone(link.Name), port)))
			}
		}
	}
}

// join joins the groups on the links. To join again is an error that does not matter.
func join(conn net.PacketConn, links []net.Interface) {
	c4, c6 := ipv4.NewPacketConn(conn), ipv6.NewPacketConn(conn)
	for _, link := range links {
		_ = c4.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(group4, 0)))
		_ = c6.JoinGroup(&link, net.UDPAddrFromAddrPort(netip.AddrPortFrom(group6, 0)))
	}
}

// multicastLinks are the links on which other machines may be: those with an address out of a network, and not just
// of their own, as the links to pods have. The oldest come first, which are the machine's own.
func multicastLinks() []net.Interface {
	all, err := net.Interfaces()
	if err != nil {
		return nil
	}
	slices.SortFunc(all, func(a, b net.Interface) int { return a.Index - b.Index })
	links := slices.DeleteFunc(all, func(l net.Interface) bool {
		return l.Flags&net.FlagUp == 0 || l.Flags&net.FlagMulticast == 0 || l.Flags&net.FlagLoopback != 0 || !hasNetwork(l)
	})
	return links[:min(len(links), maxLinks)]
}

func hasNetwork(l net.Interface) bool {
	addrs, err := l.Addrs()
	return err == nil && slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		if !ok {
			return false
		}
		ones, bits := n.Mask.Size()
		return ones < bits && n.IP.IsGlobalUnicast()
	})
}

// shareAddress lets members of one machine hear the same calls.
func shareAddress(_, _ string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}); e != nil {
		return e
	}
	return err
}
