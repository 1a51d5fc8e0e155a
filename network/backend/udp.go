package backend

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"kedge/internal/lifecycle"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// planUDP returns one TUN interface with routes to all peers; userTunnel carries its
// packets. Unlike with VXLAN, packets stop while kedge is not running.
func planUDP(cfg Config, own node, peers []node, mtu int) (plan, error) {
	var p plan
	var errs []error
	m := namesOf(own.name)
	d := device{name: m.link4, mtu: mtu, addrs: own.gateways()}
	for _, peer := range peers {
		at, err := between(own, peer)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		d.mtu = min(d.mtu, mtu-cfg.overhead(at.Is6()))
		for _, r := range peer.ranges {
			ipv6 := r.Addr().Is6()
			src, ok := own.source(ipv6)
			if !ok {
				continue // no pod here has an address of this family
			}
			p.routes = append(p.routes, route{dst: r, src: src, link: d.name, table: unix.RT_TABLE_MAIN})
			p.tunnelToNode(own, peer, ipv6, netip.Addr{}, d.name, m.number)
		}
	}
	if len(p.routes) > 0 {
		p.links = []device{d}
	}
	return p, errors.Join(errs...)
}

// userTunnel carries packets between a TUN interface and UDP. A datagram is one IP packet
// and nothing else. A packet is accepted only from an address of the node that owns its
// source address.
type userTunnel struct {
	port  int
	log   *slog.Logger
	peers atomic.Pointer[tunnelMap]
	open  lifecycle.Wakeup // signals that the interface exists
}

// tunnelMap has the nodes to which packets go and from which they may come. It is
// immutable.
type tunnelMap struct {
	to   map[netip.Prefix]netip.Addr // inner destination to node address
	bits []int                       // lengths of the keys, longest first
	from map[netip.Addr]string       // node address to name
	name map[netip.Prefix]string     // inner source to name
}

func newUserTunnel(port int, log *slog.Logger) *userTunnel {
	t := &userTunnel{port: port, log: log, open: lifecycle.NewWakeup()}
	t.peers.Store(&tunnelMap{})
	return t
}

// set sets the peers, and signals that the interface exists.
func (t *userTunnel) set(own node, peers []node, there bool) {
	m := &tunnelMap{to: map[netip.Prefix]netip.Addr{}, from: map[netip.Addr]string{}, name: map[netip.Prefix]string{}}
	for _, p := range peers {
		at, err := between(own, p)
		if err != nil {
			continue // the plan has reported it
		}
		inner := slices.Clone(p.ranges)
		for _, a := range p.addrs {
			inner = append(inner, netip.PrefixFrom(a, a.BitLen()))
			m.from[a] = p.name
		}
		for _, a := range p.tunnel {
			m.from[a] = p.name
		}
		for _, r := range inner {
			m.to[r], m.name[r] = at, p.name
			if !slices.Contains(m.bits, r.Bits()) {
				m.bits = append(m.bits, r.Bits())
			}
		}
	}
	slices.SortFunc(m.bits, func(a, b int) int { return b - a })
	t.peers.Store(m)
	if there {
		t.open.Wake()
	}
}

// lookup returns the value of the longest prefix that contains a.
func lookup[T any](m *tunnelMap, table map[netip.Prefix]T, a netip.Addr) (T, bool) {
	for _, bits := range m.bits {
		if p, err := a.Prefix(bits); err == nil {
			if v, ok := table[p]; ok {
				return v, true
			}
		}
	}
	var none T
	return none, false
}

// run carries packets until ctx is cancelled. It calls changed when the interface was
// removed.
func (t *userTunnel) run(ctx context.Context, link string, changed func()) error {
	conn, err := net.ListenUDP("udp", &net.UDPAddr{Port: t.port})
	if err != nil {
		return fmt.Errorf("listen for packets of other nodes' pods: %w", err)
	}
	// Bursts would be lost while this process is busy. The kernel grants what its limit
	// allows.
	_ = conn.SetReadBuffer(4 << 20)
	_ = conn.SetWriteBuffer(4 << 20)
	defer context.AfterFunc(ctx, func() { conn.Close() })()

	var tun atomic.Pointer[os.File]
	var in sync.WaitGroup
	in.Go(func() { t.receive(conn, &tun) })
	defer in.Wait()
	defer conn.Close()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.open:
		}
		f, err := attachTUN(link, 0)
		if err != nil {
			t.log.Warn("cannot use the tunnel interface", "err", err)
			continue
		}
		tun.Store(f)
		stop := context.AfterFunc(ctx, func() { f.Close() })
		err = t.send(f, conn)
		stop()
		tun.Store(nil)
		f.Close()
		if ctx.Err() == nil {
			t.log.Warn("the tunnel interface was removed", "err", err)
			changed()
		}
	}
}

const maxPacket = 1 << 16

// send sends packets from the interface to the nodes that have their destinations, until
// the interface is closed.
func (t *userTunnel) send(tun *os.File, conn *net.UDPConn) error {
	buf := make([]byte, maxPacket)
	for {
		n, err := tun.Read(buf)
		if err != nil {
			return err
		}
		_, dst, ok := parseAddrs(buf[:n])
		if !ok {
			continue
		}
		m := t.peers.Load()
		if at, ok := lookup(m, m.to, dst); ok {
			// As with any link, a packet that cannot be sent now is lost.
			_, _ = conn.WriteToUDPAddrPort(buf[:n], netip.AddrPortFrom(at, uint16(t.port)))
		}
	}
}

// receive passes packets from other nodes to the interface, until conn is closed.
func (t *userTunnel) receive(conn *net.UDPConn, tun *atomic.Pointer[os.File]) {
	buf := make([]byte, maxPacket)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			continue // an ICMP error about an earlier packet
		}
		src, _, ok := parseAddrs(buf[:n])
		if !ok {
			continue
		}
		m := t.peers.Load()
		sender, known := m.from[from.Addr().Unmap()]
		if owner, ok := lookup(m, m.name, src); !known || !ok || owner != sender {
			continue
		}
		if f := tun.Load(); f != nil {
			_, _ = f.Write(buf[:n])
		}
	}
}

// parseAddrs returns the source and destination of an IP packet.
func parseAddrs(packet []byte) (src, dst netip.Addr, ok bool) {
	if len(packet) == 0 {
		return src, dst, false
	}
	switch {
	case packet[0]>>4 == 4 && len(packet) >= 20:
		return netip.AddrFrom4([4]byte(packet[12:16])), netip.AddrFrom4([4]byte(packet[16:20])), true
	case packet[0]>>4 == 6 && len(packet) >= 40:
		return netip.AddrFrom16([16]byte(packet[8:24])), netip.AddrFrom16([16]byte(packet[24:40])), true
	}
	return src, dst, false
}

// attachTUN opens an interface that ensureDevice has created, with additional flags.
func attachTUN(name string, flags uint16) (*os.File, error) {
	// Otherwise the kernel would create an interface that disappears with this process.
	if _, err := netlink.LinkByName(name); err != nil {
		return nil, fmt.Errorf("find %s: %w", name, err)
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI | flags)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("attach to %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
