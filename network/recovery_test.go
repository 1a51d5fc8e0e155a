package network

import (
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
		t.Error("ADD succeeded while nobody runs")
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
	p.ns.Close() // its path is another file's from now on, or nobody's
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

func TestStrayInterfaceIsRemovedAndLostLeaseRecovered(t *testing.T) {
	w := newWorld(t, dualStack()...)
	p := w.pod()
	w.stop()
	journal := filepath.Join(w.cfg.RunDir, "network", "leases", "leases.journal")
	text, err := os.ReadFile(journal)
	w.must(err)

	// Damage within the journal of this boot: the addresses in use must not be
	// given to others.
	w.must(os.WriteFile(journal, append(text[:strings.IndexByte(string(text), '\n')+1], "rubbish\n"...), 0o600))
	w.start()
	for range 5 {
		if other := w.pod(); other.addrs[0] == p.addrs[0] {
			t.Fatalf("%s given twice", p.addrs[0])
		}
	}
	if _, err := p.call("DEL"); err != nil {
		t.Fatal(err)
	}

	// No journal at all, but interfaces: nobody will ask for them any more.
	w.stop()
	w.must(os.Remove(journal))
	w.start()
	if links := podLinks(t); len(links) != 0 {
		t.Errorf("interfaces %v remain, want none", links)
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
	deadline := time.Now().Add(20 * time.Second)
	for {
		if _, err := p.call("CHECK"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("interface is not made again")
		}
		time.Sleep(50 * time.Millisecond)
	}
}

func TestRangesAreGivenLater(t *testing.T) {
	w := newWorld(t)
	if _, err := os.Stat(filepath.Join(w.cfg.ConfDir(), "10-kedge.conflist")); err == nil {
		t.Error("the runtime is told that the network is ready without pod ranges")
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
