package backend_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/network/backend"
)

// parseAddrs are two places of a benchmark that are joined: the first calls the second.
type parseAddrs struct {
	from, to place
	addr     netip.Addr // of the second
	mtu      int        // the most that both and what is between them take undivided
}

// path is a way to connect two places.
type path struct {
	name string
	open func(b *testing.B) parseAddrs // it is closed when the benchmark ends
}

const (
	cableMTU = 1500 // between hosts
	vxlanMTU = cableMTU - 50
)

// paths returns all paths: kedge's, flannel's with kedge's pods at the ends, and the ones
// for comparison.
func paths() []path {
	return []path{
		{"veth", openVeth},
		{"cable", openCable},
		kedge("host-gw", backend.HostGW, cableMTU),
		plain(),
		kedge("vxlan", backend.VXLAN, vxlanMTU),
		kedge("wireguard", backend.WireGuard, cableMTU-60),
		kedge("udp", backend.UDP, cableMTU-28),
		flannel("host-gw", cableMTU),
		flannel("vxlan", vxlanMTU),
		flannel("wireguard", cableMTU-80),
	}
}

// plain is routing without a tunnel, with packets as large as a tunnel lets them be.
func plain() path { return kedge("host-gw-1450", backend.HostGW, vxlanMTU) }

// openVeth joins two namespaces that could be pods' by one virtual cable and nothing else.
func openVeth(b *testing.B) parseAddrs {
	host.RequireIsolation(b)
	var at [2]*namespaces.Network
	var err error
	for i := range at {
		if at[i], err = namespaces.NewNetwork(); err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { at[i].Close() })
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = "eth0", cableMTU
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerNamespace = "eth0", netlink.NsFd(at[1].FD())
	if err := at[0].Do(func() error { return netlink.LinkAdd(pair) }); err != nil {
		b.Fatal(err)
	}
	for i, ns := range at {
		if err := ns.Do(func() error {
			link, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr(fmt.Sprintf("192.0.2.%d/24", i+1))
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link))
		}); err != nil {
			b.Fatal(err)
		}
	}
	return parseAddrs{at[0].Do, at[1].Do, netip.MustParseAddr("192.0.2.2"), cableMTU}
}

// openCable joins the two hosts themselves, whose cable is a veth pair each and a bridge
// between them. The hosts have the rules of a node with pods.
func openCable(b *testing.B) parseAddrs {
	c := newCluster(b, backend.HostGW)
	one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
	return parseAddrs{one.Do, two.Do, two.cfg.Addrs[0], cableMTU}
}

// kedge joins two pods by one of kedge's modes.
func kedge(name string, mode backend.Mode, mtu int) path {
	return path{name, func(b *testing.B) parseAddrs {
		c := newCluster(b, mode)
		c.mtu = mtu
		one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
		return c.podToPod(one, two)
	}}
}

// podToPod waits until a pod of one machine reaches one of the other, with packets of the
// size that the cluster has for them and no larger ones.
func (c *cluster) podToPod(one, two *machine) parseAddrs {
	p, q := one.pod(), two.pod()
	c.serve(q.ns.Do, 80)
	c.within(patience, "two nodes", func() error { return c.reaches(p, q, false) })
	c.sizes(p, q, false, c.mtu)
	return parseAddrs{p.ns.Do, q.ns.Do, q.addr(false), c.mtu}
}

// flannelProgram is the output of make bench-flannel-program, seen from this directory.
const flannelProgram = "../../build/bench/flannel"

// flannelBuilt returns an error that says how to build flannel's backends.
func flannelBuilt() error {
	if _, err := os.Stat(flannelProgram); err != nil {
		return fmt.Errorf("flannel's backends are not measured: %w; run make bench-flannel-program", err)
	}
	return nil
}

// flannel connects two pods of kedge through a backend of flannel; kedge's backend has the
// mode none. The paths differ only in the backend.
func flannel(mode string, mtu int) path {
	return path{"flannel-" + mode, func(b *testing.B) parseAddrs {
		if err := flannelBuilt(); err != nil {
			b.Skip(err)
		}
		c := newCluster(b, backend.None)
		c.mtu = mtu
		one, two := c.machine(1, families{"4", "4"}), c.machine(2, families{"4", "4"})
		if mode == "wireguard" && !hasWireGuard(one) {
			b.Skip("this kernel has no WireGuard, and flannel has none of its own")
		}
		p, q := one.flannel(mode), two.flannel(mode)
		p.meet(q)
		q.meet(p)
		return c.podToPod(one, two)
	}}
}

// hasWireGuard says whether the machine's kernel can make an interface for WireGuard.
func hasWireGuard(m *machine) bool {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "probe"
	link := &netlink.Wireguard{LinkAttrs: attrs}
	err := m.Netlink().LinkAdd(link)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return false
	}
	m.c.must(err)
	m.c.must(m.Netlink().LinkDel(link))
	return true
}

// flannelNode is the process of a flannel backend on a machine. See scripts/bench/flannel
// for its input and output.
type flannelNode struct {
	m     *machine
	lease json.RawMessage // flannel's data
	stdin io.WriteCloser
}

// flannel starts a backend of flannel's on a machine that has kedge's pods.
func (m *machine) flannel(mode string) *flannelNode {
	c := m.c
	c.t.Helper()
	cmd := exec.Command(flannelProgram, "-backend="+mode, "-interface="+host.Uplink, "-address="+m.cfg.Addrs[0].String(),
		"-network="+m.cfg.Cluster[0].String(), "-subnet="+m.cfg.Ranges[0].String())
	cmd.Stderr = &m.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	stdin, err := cmd.StdinPipe()
	c.must(err)
	stdout, err := cmd.StdoutPipe()
	c.must(err)
	c.must(m.Host.Start(cmd))
	c.t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			c.t.Errorf("flannel on %s: %v: %s", m.cfg.Name, err, m.log.String())
		}
		m.forgetFlannel()
	})
	var said struct {
		MTU   int
		Lease json.RawMessage
	}
	stuck := time.AfterFunc(30*time.Second, func() { cmd.Process.Kill() })
	line, err := bufio.NewReader(stdout).ReadBytes('\n')
	stuck.Stop()
	if err == nil {
		err = json.Unmarshal(line, &said)
	}
	if err != nil {
		c.t.Fatalf("flannel on %s says %q: %v: %s", m.cfg.Name, line, err, m.log.String())
	}
	if said.MTU != c.mtu {
		c.t.Fatalf("flannel gives pods an MTU of %d, and these have %d: the figures could not be compared", said.MTU, c.mtu)
	}
	return &flannelNode{m, said.Lease, stdin}
}

// meet tells this node where the pods of another are.
func (f *flannelNode) meet(other *flannelNode) {
	_, err := f.stdin.Write(append(other.lease, '\n'))
	f.m.c.must(err)
}

// forgetFlannel removes the interfaces that flannel leaves on a machine.
func (m *machine) forgetFlannel() {
	links, err := m.Netlink().LinkList()
	if err != nil {
		m.c.t.Error(err)
	}
	for _, l := range links {
		if !strings.HasPrefix(l.Attrs().Name, "flannel") {
			continue
		}
		if err := m.Netlink().LinkDel(l); err != nil {
			m.c.t.Errorf("remove flannel's %s: %v", l.Attrs().Name, err)
		}
	}
}
