package doctor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/hostfirewall"
)

func readNameServers(ctx context.Context, s *subject) (nameServers, error) {
	n := nameServers{file: s.ResolvConf, own: s.Preflight.DNS}
	if n.file == "" {
		n.file = "/etc/resolv.conf"
	}
	data, err := os.ReadFile(n.file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return n, err
	}
	n.list = parseNameServers(string(data))
	for _, sock := range listening("udp") {
		if sock.addr.Port() == 53 && (sock.addr.Addr().IsUnspecified() || sock.addr.Addr().Unmap().IsLoopback()) {
			n.used = true
		}
	}
	return n, ctx.Err()
}

// listening returns the sockets of a protocol, of both families. The kernel may lack IPv6.
func listening(protocol string) (all []socket) {
	for _, file := range []string{protocol, protocol + "6"} {
		if data, err := os.ReadFile("/proc/net/" + file); err == nil {
			all = append(all, parseSockets(string(data), protocol == "tcp")...)
		}
	}
	return all
}

func readPorts(ctx context.Context, s *subject) (held []heldPort, err error) {
	inodes := map[string][]int{} // indices in held
	for _, p := range s.Ports {
		for _, sock := range listening(p.Protocol) {
			if int(sock.addr.Port()) != p.Number {
				continue
			}
			inodes["socket:["+sock.inode+"]"] = append(inodes["socket:["+sock.inode+"]"], len(held))
			held = append(held, heldPort{Port: p})
			break
		}
	}
	if len(held) == 0 {
		return nil, nil
	}
	for pid := range processes(ctx) {
		openFiles(pid, func(_, target string) {
			for _, i := range inodes[target] {
				if s.state == Running && pid == s.report.PID {
					held[i].ours = true
				}
				if held[i].pid == 0 {
					held[i].pid, held[i].name = pid, processName(pid)
				}
			}
		})
	}
	// A UDP socket without a process is the kernel's, for VXLAN or WireGuard.
	held = slices.DeleteFunc(held, func(p heldPort) bool { return p.pid == 0 && p.Protocol == "udp" })
	return held, ctx.Err()
}

func readFirewall(ctx context.Context, s *subject) (firewall, error) {
	f := firewall{ports: map[string][]hostfirewall.Drop{}}
	var err error
	if s.node() {
		if f.pods, err = hostfirewall.Against(hostfirewall.OfPods(s.Preflight.OwnLinks, s.Preflight.PodRanges, s.Preflight.DNS)); err != nil {
			return f, err
		}
	}
	in, to := uplink(s.NodeIPs)
	for _, p := range s.portsForOthers(ctx) {
		if !to.IsValid() {
			break // the node has no address that others could reach
		}
		packet := hostfirewall.Packet{Hook: hostfirewall.Input, In: in.name, From: neighbour(to), To: to, Protocol: unix.IPPROTO_TCP, Port: uint16(p.Number)}
		if p.Protocol == "udp" {
			packet.Protocol = unix.IPPROTO_UDP
		}
		drops, err := hostfirewall.Drops(packet)
		if err != nil {
			return f, err
		}
		if len(drops) > 0 {
			f.ports[fmt.Sprintf("port %d/%s (%s)", p.Number, p.Protocol, p.Purpose)] = drops
		}
	}
	if s.node() {
		f.legacy, err = readLegacy()
	}
	return f, err
}

// portsForOthers returns the ports that other machines connect to: those between nodes only if there are ways to other
// nodes, and those between servers only if there are several.
func (s *subject) portsForOthers(ctx context.Context) []Port {
	ports := slices.Clone(s.Ports)
	links, err := net.Interfaces()
	tunnels := err == nil && slices.ContainsFunc(links, func(l net.Interface) bool { return s.isTunnel(l.Name) })
	if tunnels && s.Backend.Number != 0 && !slices.Contains(ports, s.Backend) {
		ports = append(ports, s.Backend)
	}
	if all, err := readServers(ctx, s); err == nil && len(all) > 1 && s.Peer.Number != 0 {
		ports = append(ports, s.Peer)
	}
	return ports
}

// neighbour returns another address of the same network.
func neighbour(a netip.Addr) netip.Addr {
	if b := a.Next(); b.IsValid() {
		return b
	}
	return a.Prev()
}

// uplink returns the interface with one of the node's addresses, and the address; without such an interface that of the
// default route.
func uplink(addrs []netip.Addr) (link, netip.Addr) {
	links, err := net.Interfaces()
	if err != nil {
		return link{}, netip.Addr{}
	}
	for _, l := range links {
		have, err := l.Addrs()
		if err != nil {
			continue
		}
		for _, h := range have {
			p, err := netip.ParsePrefix(h.String())
			if err == nil && slices.Contains(addrs, p.Addr().Unmap()) {
				return link{l.Name, l.MTU}, p.Addr().Unmap()
			}
		}
	}
	return link{}, netip.Addr{}
}

func readMTU(_ context.Context, s *subject) (mtus, error) {
	if !s.node() {
		return mtus{}, skip("no node runs on this machine")
	}
	var m mtus
	m.uplink, _ = uplink(s.NodeIPs)
	if m.uplink.name == "" {
		return m, skip("no interface has the node's address")
	}
	links, err := netlink.LinkList()
	if err != nil && !errors.Is(err, netlink.ErrDumpInterrupted) {
		return m, fmt.Errorf("list interfaces: %w", err)
	}
	for _, l := range links {
		a := l.Attrs()
		switch {
		case s.isPod(a.Name):
			m.pods = append(m.pods, link{a.Name, a.MTU})
		case s.isTunnel(a.Name) && !strings.HasPrefix(a.Name, m.uplink.name):
			m.tunnels = append(m.tunnels, link{a.Name, a.MTU})
		}
	}
	return m, nil
}
