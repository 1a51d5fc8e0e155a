package network

import (
	"bytes"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"kedge/network/cni"
	"kedge/network/cniclient"
)

func TestSingleFamilies(t *testing.T) {
	for _, r := range dualStack() {
		t.Run(r.String(), func(t *testing.T) {
			w := newWorld(t, r)
			a, b := w.pod(), w.pod()
			if len(a.addrs) != 1 || !r.Contains(a.addrs[0]) {
				t.Fatalf("pod got %v from range %s", a.addrs, r)
			}
			w.serve(b.ns.Do, "tcp", at(b.addrs[0], 80))
			w.wantSeen("pod to pod", a.ns.Do, "tcp", at(b.addrs[0], 80), a.addrs[0].String())
		})
	}
}

func TestTrafficGoesOnWhileKedgeIsStopped(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod(port{8000, 80, "TCP", ""})
	w.serve(p.ns.Do, "tcp", at(p.addrs[0], 80))
	w.serve(w.outside.Do, "tcp", "192.0.2.9:7")
	check := func(when string) {
		t.Helper()
		w.wantSeen(when, w.outside.Do, "tcp", "192.0.2.1:8000", "192.0.2.9")
		w.wantSeen(when, p.ns.Do, "tcp", "192.0.2.9:7", "192.0.2.1")
	}
	check("running")
	w.stop()
	check("stopped")
	if _, err := p.call("ADD"); err == nil {
		t.Error("ADD succeeded while the network is not running")
	}
	w.start()
	check("running again")
	again, err := p.call("ADD", port{8000, 80, "TCP", ""})
	w.must(err)
	if !slices.Equal(again, p.addrs) {
		t.Errorf("repeated ADD gave %v, first was %v", again, p.addrs)
	}
	check("after repeated ADD")
	if _, err := p.call("CHECK"); err != nil {
		t.Errorf("CHECK: %v", err)
	}
}

func TestPodThatDiedWhileKedgeWasDownIsForgotten(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p, stays := w.pod(port{8000, 80, "TCP", ""}), w.pod()
	w.stop()
	p.ns.Close() // its path is removed or reused from now on
	w.start()
	if got := w.network.plugin.HostPorts(); len(got) != 0 {
		t.Errorf("host ports of a dead pod remain: %v", got)
	}
	if _, err := stays.call("CHECK"); err != nil {
		t.Errorf("CHECK of the living pod: %v", err)
	}
	if links := podLinks(t); len(links) != 1 {
		t.Errorf("interfaces %v remain, want one", links)
	}
	if _, err := p.call("DEL"); err != nil {
		t.Errorf("DEL of a forgotten pod: %v", err)
	}
}

// TestLostLeasesAreRecovered: whatever happened to the journal, pods that live keep
// their interfaces, addresses and host ports, and no new pod gets an address of theirs.
func TestLostLeasesAreRecovered(t *testing.T) {
	line := func(text []byte, n int) (from, to int) { // n counts from the end where negative
		var starts []int
		for i := range text {
			if i == 0 || text[i-1] == '\n' {
				starts = append(starts, i)
			}
		}
		if n < 0 {
			n += len(starts)
		}
		from = starts[n]
		return from, from + bytes.IndexByte(text[from:], '\n')
	}
	flip := func(n int) func([]byte) []byte {
		return func(text []byte) []byte {
			from, to := line(text, n)
			// A digit of an address or of the boot: still JSON.
			for i := to - 1; i >= from; i-- {
				if text[i] == '4' {
					text[i] = '5'
					return text
				}
			}
			text[(from+to)/2] ^= 1
			return text
		}
	}
	for name, harm := range map[string]func([]byte) []byte{
		"removed":         nil,
		"emptied":         func([]byte) []byte { return nil },
		"zeroes":          func(text []byte) []byte { return make([]byte, len(text)) },
		"first line":      flip(0),
		"second line":     flip(1),
		"last line":       flip(-1),
		"first line gone": func(text []byte) []byte { _, to := line(text, 0); return text[to+1:] },
		"last line gone":  func(text []byte) []byte { from, _ := line(text, -1); return text[:from] },
		"half":            func(text []byte) []byte { return text[:len(text)/2] },
		"another boot's":  func(text []byte) []byte { return []byte(`{"version":1,"boot":"another"}` + "\n") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, netip.MustParsePrefix("10.42.0.0/29"), netip.MustParsePrefix("fd42::/125"))
			gone := w.pod() // so that the journal has lines of all kinds
			if _, err := gone.call("DEL"); err != nil {
				t.Fatal(err)
			}
			pods := []*pod{w.pod(port{8000, 80, "TCP", ""}, port{8001, 80, "TCP", "192.0.2.1"}), w.pod()}
			for _, p := range pods {
				w.serve(p.ns.Do, "tcp", at(p.addrs[0], 80))
				mountNamespace(t, p)
			}
			w.stop()
			journal := filepath.Join(w.cfg.RunDir, "network", "leases", "leases.journal")
			text, err := os.ReadFile(journal)
			w.must(err)
			w.must(os.Remove(journal))
			if harm != nil {
				w.must(os.WriteFile(journal, harm(text), 0o600))
			}
			w.start()
			for _, p := range pods {
				if _, err := p.call("CHECK"); err != nil {
					t.Errorf("CHECK of %s: %v", p.id, err)
				}
			}
			w.wantSeen("host port", w.outside.Do, "tcp", "192.0.2.1:8000", "192.0.2.9")
			w.wantSeen("host port of an address", w.outside.Do, "tcp", "192.0.2.1:8001", "192.0.2.9")
			w.wantSeen("pod to pod", pods[0].ns.Do, "tcp", at(pods[1].addrs[0], 80), pods[0].addrs[0].String())
			for range 3 { // all that are left of the range
				p := w.pod()
				for _, old := range pods {
					if slices.Contains(old.addrs, p.addrs[0]) || slices.Contains(old.addrs, p.addrs[1]) {
						t.Fatalf("%v given twice", p.addrs)
					}
				}
			}
			// A removed interface is created again, with the pod's addresses and routes.
			for _, name := range podLinks(t) {
				link, err := netlink.LinkByName(name)
				w.must(err)
				w.must(netlink.LinkDel(link))
			}
			w.must(w.network.repair(t.Context(), w.network.plugin))
			w.wantSeen("after repair", pods[0].ns.Do, "tcp", at(pods[1].addrs[0], 80), pods[0].addrs[0].String())
			for _, p := range pods {
				if _, err := p.call("DEL"); err != nil {
					t.Errorf("DEL of %s: %v", p.id, err)
				}
			}
			if ports := w.network.plugin.HostPorts(); len(ports) != 0 {
				t.Errorf("host ports remain: %v", ports)
			}
		})
	}
}

// mountNamespace keeps a pod's namespace at a path, as a runtime does.
func mountNamespace(t *testing.T, p *pod) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "net ns") // with what the kernel escapes in lists
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(p.ns.Path(), path, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

// TestAddressesOfInterfacesAreNotGiven: an address on an interface of the node is not
// assigned to a pod for as long as it is there.
func TestAddressesOfInterfacesAreNotGiven(t *testing.T) {
	w := newWorld(t, netip.MustParsePrefix("10.42.0.0/29")) // 10.42.0.2 to 10.42.0.6
	lo, err := netlink.LinkByName("lo")
	w.must(err)
	for i := 2; i < 6; i++ {
		addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 42, 0, byte(i)), Mask: net.CIDRMask(32, 32)}}
		w.must(netlink.AddrAdd(lo, addr))
		t.Cleanup(func() { netlink.AddrDel(lo, addr) })
	}
	if p := w.pod(); p.addrs[0].String() != "10.42.0.6" {
		t.Errorf("pod got %v, want the only address that is free", p.addrs)
	}
	p := &pod{w: w, id: "late", ns: w.namespace()}
	t.Cleanup(func() { p.call("DEL") })
	if addrs, err := p.call("ADD"); err == nil {
		t.Fatalf("pod got %v, which an interface has", addrs)
	}
	w.must(netlink.AddrDel(lo, &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(10, 42, 0, 4), Mask: net.CIDRMask(32, 32)}}))
	if addrs, err := p.call("ADD"); err != nil || addrs[0].String() != "10.42.0.4" {
		t.Errorf("pod got %v, %v, want the address that has become free", addrs, err)
	}
}

func TestRepair(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod(port{8000, 80, "TCP", ""})
	w.serve(p.ns.Do, "tcp", at(p.addrs[0], 80))
	repaired := func(what string) {
		t.Helper()
		w.must(w.network.repair(t.Context(), w.network.plugin))
		w.wantSeen(what, w.outside.Do, "tcp", "192.0.2.1:8000", "192.0.2.9")
		if _, err := p.call("CHECK"); err != nil {
			t.Errorf("%s: CHECK: %v", what, err)
		}
	}
	conn, err := nftables.New()
	w.must(err)
	conn.FlushRuleset()
	w.must(conn.Flush())
	repaired("rules flushed")

	table := &nftables.Table{Name: w.network.table.Name(), Family: nftables.TableFamilyINet}
	conn.FlushSet(&nftables.Set{Table: table, Name: "host-ports-4", IsMap: true})
	w.must(conn.Flush())
	repaired("set emptied")

	link, err := netlink.LinkByName(podLinks(t)[0])
	w.must(err)
	w.must(netlink.RouteDel(&netlink.Route{LinkIndex: link.Attrs().Index, Scope: netlink.SCOPE_LINK, Dst: &net.IPNet{IP: p.addrs[0].AsSlice(), Mask: net.CIDRMask(32, 32)}}))
	if _, err := p.call("CHECK"); err == nil {
		t.Error("CHECK does not notice a missing route")
	}
	repaired("route removed")

	w.must(netlink.LinkDel(link))
	repaired("interface removed")
}

func TestRemovedInterfaceIsNoticed(t *testing.T) {
	w := newWorld(t, podsV4)
	p := w.pod()
	link, err := netlink.LinkByName(podLinks(t)[0])
	w.must(err)
	w.must(netlink.LinkDel(link))
	w.untilAttached(p)
}

// TestForwardingSwitchedOff: changes of the kernel's parameters by other programs are
// undone, at once if the kernel sends an event.
func TestForwardingSwitchedOff(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod(port{8000, 80, "TCP", ""})
	read := func(name string) string {
		text, err := os.ReadFile("/proc/sys/net/" + name)
		w.must(err)
		return strings.TrimSpace(string(text))
	}
	link := podLinks(t)[0]
	for name, want := range map[string]string{
		"ipv4/ip_forward":                       "1",
		"ipv4/conf/" + link + "/forwarding":     "1",
		"ipv6/conf/all/forwarding":              "1",
		"ipv4/conf/" + link + "/route_localnet": "1", // the kernel does not tell of the last two
		"ipv6/conf/" + link + "/accept_ra":      "0",
	} {
		t.Run(strings.ReplaceAll(name, "/", "."), func(t *testing.T) {
			for range 2 {
				other := string('0' + '1' - want[0])
				w.must(os.WriteFile("/proc/sys/net/"+name, []byte(other), 0))
				if name == "ipv4/conf/"+link+"/route_localnet" || name == "ipv6/conf/"+link+"/accept_ra" {
					w.must(w.network.repair(t.Context(), w.network.plugin))
				}
				for deadline := time.Now().Add(20 * time.Second); read(name) != want; time.Sleep(10 * time.Millisecond) {
					if time.Now().After(deadline) {
						t.Fatalf("%s is not restored", name)
					}
				}
			}
		})
	}
	w.untilAttached(p)
}

// untilAttached waits until a pod has all that belongs to it.
func (w *world) untilAttached(p *pod) {
	w.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for {
		_, err := p.call("CHECK")
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("interface is not made again: %v", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// TestInterfaceRemovedMeanwhile: a start learns the pod ranges from the API, after it has
// looked at the pods.
func TestInterfaceRemovedMeanwhile(t *testing.T) {
	w := newWorld(t, podsV4)
	p := w.pod()
	w.stop()
	link, err := netlink.LinkByName(podLinks(t)[0])
	w.must(err)
	w.must(netlink.LinkDel(link))
	w.cfg.PodCIDRs = nil
	w.start()
	w.must(w.network.SetPodCIDRs([]netip.Prefix{podsV4}))
	w.untilAttached(p)
}

func TestRangesAreGivenLater(t *testing.T) {
	w := newWorld(t)
	if _, err := os.Stat(filepath.Join(w.cfg.ConfDir(), "10-kedge.conflist")); err == nil {
		t.Error("the network is reported as ready without pod ranges")
	}
	if err := w.network.Check(t.Context()); err == nil {
		t.Error("healthy without pod ranges")
	}
	resp, err := cniclient.Call(w.cfg.socket(), cniclient.Request{Command: "STATUS", Config: []byte(`{"cniVersion":"1.1.0"}`)})
	w.must(err)
	if !resp.Failed || !strings.Contains(string(resp.Output), `"code":50`) {
		t.Errorf("STATUS without ranges: %s", resp.Output)
	}
	if err := w.network.SetPodCIDRs([]netip.Prefix{podsV4, podsV4}); err == nil {
		t.Error("two ranges of one family accepted")
	}
	w.must(w.network.SetPodCIDRs(dualStack()))
	w.must(w.network.Check(t.Context()))
	if p := w.pod(); len(p.addrs) != 2 {
		t.Errorf("pod got %v", p.addrs)
	}
}

func TestManyPodsAtOnce(t *testing.T) {
	w := newWorld(t, dualStack()...)
	const n = 30
	pods := make([]*pod, n)
	for i := range pods {
		pods[i] = &pod{w: w, id: fmt.Sprintf("many%d", i), ns: w.namespace()}
	}
	each := func(command string) {
		var all sync.WaitGroup
		for _, p := range pods {
			all.Go(func() {
				addrs, err := p.call(command)
				if err != nil {
					t.Errorf("%s: %v", command, err)
				}
				p.addrs = addrs
			})
		}
		all.Wait()
	}
	each("ADD")
	seen := map[netip.Addr]bool{}
	for _, p := range pods {
		for _, a := range p.addrs {
			if seen[a] {
				t.Errorf("%s given twice", a)
			}
			seen[a] = true
		}
	}
	each("CHECK")
	each("DEL")
	if links := podLinks(t); len(links) != 0 {
		t.Errorf("interfaces left: %v", links)
	}
	each("DEL") // again, of pods that are unknown now
}

func TestCollectReleasesWhatTheRuntimeDoesNotKnow(t *testing.T) {
	w := newWorld(t, podsV4)
	keep, lose := w.pod(), w.pod()
	resp, err := cniclient.Call(w.cfg.socket(), cniclient.Request{Command: "GC",
		Config: []byte(`{"cniVersion":"1.1.0","cni.dev/valid-attachments":[{"containerID":"` + keep.id + `","ifname":"eth0"}]}`)})
	if err != nil || resp.Failed {
		t.Fatalf("GC: %v %s", err, resp.Output)
	}
	if _, err := keep.call("CHECK"); err != nil {
		t.Error(err)
	}
	if _, err := lose.call("CHECK"); err == nil {
		t.Error("attachment survived GC")
	}
}

func TestHostPortConflict(t *testing.T) {
	w := newWorld(t, podsV4)
	first := w.pod(port{8000, 80, "TCP", ""})
	second := &pod{w: w, id: "second", ns: w.namespace()}
	if _, err := second.call("ADD", port{8000, 81, "TCP", "192.0.2.1"}); err == nil || !strings.Contains(err.Error(), "belongs to pod default/"+first.id) {
		t.Errorf("second pod with the same host port: %v", err)
	}
	if _, err := second.call("ADD", port{8000, 81, "UDP", ""}); err != nil {
		t.Errorf("same port, other protocol: %v", err)
	}
	if _, err := second.call("DEL"); err != nil {
		t.Error(err)
	}
}

func TestTwoNodesOfOneMachine(t *testing.T) {
	if a, b := cni.LinkPrefix("node1"), cni.LinkPrefix("node2"); a == b || len(a) != 7 {
		t.Errorf("prefixes %q and %q", a, b)
	}
	w := newWorld(t, podsV4)
	p := w.pod()
	other := w.cfg
	other.NodeName = "node1-b" // its name begins like the first node's
	w.must(Cleanup(Config{NodeName: other.NodeName, DataDir: t.TempDir(), RunDir: t.TempDir()}))
	if _, err := p.call("CHECK"); err != nil {
		t.Errorf("cleaning one node hurt another: %v", err)
	}
	if !slices.Contains(listTables(t), w.network.table.Name()) {
		t.Error("cleaning one node removed another's rules")
	}
}

// podLinks lists the host interfaces of pods.
func podLinks(t *testing.T) []string {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, cni.LinkPrefix("node1")) {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}
