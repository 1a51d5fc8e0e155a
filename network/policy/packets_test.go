package policy

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/network/nft"
	"kedge/network/nft/policies"
)

// lab is a node (the test program's own namespace) with pods that are namespaces,
// joined to it as the pod network does it.
type lab struct {
	t    testing.TB
	pods map[netip.Addr]*namespaces.Network
}

var (
	gateway4 = netip.MustParseAddr("169.254.1.1")
	gateway6 = netip.MustParseAddr("fd42::1")
)

func newLab(t testing.TB) *lab {
	t.Helper()
	host.RequireIsolation(t)
	for _, f := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/net/"+f, []byte("1"), 0); err != nil {
			t.Fatal(err)
		}
	}
	return &lab{t: t, pods: map[netip.Addr]*namespaces.Network{}}
}

func (l *lab) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// join makes pod number i.
func (l *lab) join(i int) *namespaces.Network {
	l.t.Helper()
	ns, err := namespaces.NewNetwork()
	l.must(err)
	l.t.Cleanup(func() { ns.Close() })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprint("pod", i)
	pair := netlink.NewVeth(attrs)
	pair.PeerName, pair.PeerNamespace = "eth0", netlink.NsFd(ns.FD())
	l.must(netlink.LinkAdd(pair))
	l.t.Cleanup(func() { netlink.LinkDel(pair) })
	hostNet := func(a netip.Addr) *net.IPNet {
		return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
	}
	outer, err := netlink.LinkByName(attrs.Name)
	l.must(err)
	var inner netlink.Link
	l.must(ns.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if inner, err = netlink.LinkByName("eth0"); err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetUp(lo), netlink.LinkSetUp(inner))
	}))
	l.must(netlink.LinkSetUp(outer))
	for _, v6 := range []bool{false, true} {
		addr, gateway := podAddr(i, v6), gateway4
		family := unix.AF_INET
		if v6 {
			gateway, family = gateway6, unix.AF_INET6
		}
		l.pods[addr] = ns
		neighbour := func(link netlink.Link, a netip.Addr, hw net.HardwareAddr) *netlink.Neigh {
			return &netlink.Neigh{LinkIndex: link.Attrs().Index, Family: family, State: netlink.NUD_PERMANENT, IP: a.AsSlice(), HardwareAddr: hw}
		}
		l.must(netlink.AddrReplace(outer, &netlink.Addr{IPNet: hostNet(gateway), Flags: unix.IFA_F_NODAD}))
		l.must(netlink.RouteAdd(&netlink.Route{LinkIndex: outer.Attrs().Index, Dst: hostNet(addr), Scope: netlink.SCOPE_LINK}))
		l.must(netlink.NeighSet(neighbour(outer, addr, inner.Attrs().HardwareAddr)))
		l.must(ns.Do(func() error {
			zero := &net.IPNet{IP: make(net.IP, len(addr.AsSlice())), Mask: net.CIDRMask(0, addr.BitLen())}
			return errors.Join(
				netlink.AddrAdd(inner, &netlink.Addr{IPNet: hostNet(addr), Flags: unix.IFA_F_NODAD}),
				netlink.NeighSet(neighbour(inner, gateway, outer.Attrs().HardwareAddr)),
				netlink.RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Dst: hostNet(gateway), Scope: netlink.SCOPE_LINK}),
				netlink.RouteAdd(&netlink.Route{LinkIndex: inner.Attrs().Index, Dst: zero, Gw: gateway.AsSlice()}))
		}))
	}
	return ns
}

// quick is the wait for a packet that is not expected to return.
const quick = 60 * time.Millisecond

func setSysctl(path, value string) error { return os.WriteFile("/proc/sys/"+path, []byte(value), 0) }

// TestPackets sends real packets through the rules of random policies and compares the
// result with the specification.
func TestPackets(t *testing.T) {
	l := newLab(t)
	s := &station{lab: l}
	for i := range randomPods {
		ns := l.join(i)
		// ICMP errors are limited to a few a second and target otherwise.
		l.must(ns.Do(func() error {
			return errors.Join(setSysctl("net/ipv4/icmp_ratelimit", "0"), setSysctl("net/ipv6/icmp/ratelimit", "0"))
		}))
	}
	table := policies.NewTable("node1")
	t.Cleanup(func() { nft.RemoveTables("node1") })
	e := newEngine(table)
	e.applyAll()
	w := newWorld(7, e)
	allowed, refused := 0, 0
	for round := range 15 {
		for range 1 + w.IntN(6) {
			w.step()
		}
		if err := table.Commit(); err != nil {
			t.Fatal(err)
		}
		if ok, err := table.Intact(); !ok || err != nil {
			t.Fatalf("round %d: the kernel holds what was staged: %v, %v", round, ok, err)
		}
		all := slices.DeleteFunc(w.connections(), func(c connection) bool { return l.pods[c.from] == nil || l.pods[c.to] == nil })
		w.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
		// The same number of allowed and denied ones; waiting for the latter takes long.
		seen := map[bool]int{}
		for _, c := range all {
			want := w.allows(c)
			if seen[want]++; seen[want] > 12 {
				continue
			}
			try := func() bool {
				return s.reaches(l.pods[c.from], strings.ToLower(string(c.protocol)), c.to, uint16(c.port))
			}
			if got := as(want, try); got != want {
				steps, _ := table.Trace(policies.Egress, c.nft())
				more, _ := table.Trace(policies.Ingress, c.nft())
				t.Fatalf("round %d: %s to %s %s %d passes: %v, want %v\n%+v\n%+v\n%s", round, c.from, c.to, c.protocol, c.port, got, want, steps, more, table)
			}
			if want {
				allowed++
			} else {
				refused++
			}
		}
	}
	t.Logf("%d connections allowed, %d refused", allowed, refused)
	if allowed < 100 || refused < 50 {
		t.Error("the test shows little")
	}
}
