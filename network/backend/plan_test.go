package backend

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	corelisters "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"kedge/internal/nodeaddr"
)

func addrs(list ...string) (out []netip.Addr) {
	for _, s := range list {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

// Both ends of a tunnel must take the same family, whatever order their addresses have.
func TestBothEndsTakeOneFamily(t *testing.T) {
	kinds := [][]netip.Addr{
		addrs("192.0.2.1"), addrs("2001:db8::1"),
		addrs("192.0.2.1", "2001:db8::1"), addrs("2001:db8::1", "192.0.2.1"),
	}
	for _, a := range kinds {
		for _, b := range kinds {
			there, err1 := between(node{tunnel: a}, node{tunnel: b})
			back, err2 := between(node{tunnel: b}, node{tunnel: a})
			if (err1 == nil) != (err2 == nil) || there.Is6() != back.Is6() {
				t.Errorf("%v and %v: one sends to %v (%v), the other to %v (%v)", a, b, there, err1, back, err2)
			}
			common := slices.ContainsFunc(a, func(x netip.Addr) bool {
				return slices.ContainsFunc(b, func(y netip.Addr) bool { return x.Is6() == y.Is6() })
			})
			if common != (err1 == nil) {
				t.Errorf("%v and %v: %v", a, b, err1)
			}
		}
	}
}

func TestReadNode(t *testing.T) {
	object := func(annotation, addr string) *corev1.Node {
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: map[string]string{Annotation: annotation}},
			Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}, {Type: corev1.NodeHostName, Address: "n"}}},
		}
	}
	all := func(netip.Addr) bool { return true }
	ranges := []netip.Prefix{netip.MustParsePrefix("10.42.1.0/24")}
	announced := announcement{Mode: VXLAN, Addresses: addrs("198.51.100.1")}
	n, err := readNode(object(announced.String(), "192.0.2.1"), ranges, all)
	if err != nil || n.mode != VXLAN || !slices.Equal(n.addrs, addrs("192.0.2.1")) || !slices.Equal(n.tunnel, announced.Addresses) || !slices.Equal(n.ranges, ranges) {
		t.Errorf("got %+v, %v", n, err)
	}
	if n, err = readNode(object("", "192.0.2.1"), ranges, all); err != nil || n.mode != "" || !slices.Equal(n.tunnel, n.addrs) {
		t.Errorf("without annotation: %+v, %v", n, err)
	}
	if n, err = readNode(object(announced.String(), "192.0.2.1"), ranges, func(a netip.Addr) bool { return a == addrs("192.0.2.1")[0] }); err != nil || len(n.tunnel) > 0 || !slices.Equal(n.unproven, announced.Addresses) {
		t.Errorf("with an address of the annotation that is another's: %+v, %v", n, err)
	}
	for what, o := range map[string]*corev1.Node{
		"annotation": object("vxlan", "192.0.2.1"),
		"address":    object("", "192.0.2"),
	} {
		if _, err := readNode(o, ranges, all); err == nil || !strings.Contains(err.Error(), "node n: "+what) {
			t.Errorf("bad %s: %v", what, err)
		}
	}
}

// A compromised node publishes data to attract other nodes' packets.
func TestReadBelievesNoClaims(t *testing.T) {
	age := 0
	object := func(name, cidr string, proven []netip.Addr, announced announcement, claims ...string) *corev1.Node {
		age++
		var proofs []nodeaddr.Proof
		for _, a := range proven {
			proofs = append(proofs, nodeaddr.Proof{Address: a, Since: time.Unix(int64(age), 0)})
		}
		o := &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{
				Name: name, CreationTimestamp: metav1.NewTime(time.Unix(int64(age), 0)),
				Annotations: map[string]string{Annotation: announced.String(), nodeaddr.Proven: nodeaddr.Format(proofs)},
			},
			Spec: corev1.NodeSpec{PodCIDRs: []string{cidr}},
		}
		for _, a := range claims {
			o.Status.Addresses = append(o.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
		}
		return o
	}
	for _, mode := range []Mode{VXLAN, HostGW, UDP, WireGuard} {
		vouch := announcement{Mode: mode}
		store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
		for _, o := range []*corev1.Node{
			object("own", "10.42.0.0/24", addrs("192.0.2.1"), vouch, "192.0.2.1"),
			object("good", "10.42.1.0/24", addrs("192.0.2.2"), vouch, "192.0.2.2"),
			object("claims-addresses", "10.42.2.0/24", addrs("192.0.2.3"), vouch, "192.0.2.3", "8.8.8.8", "192.0.2.2"),
			object("steals-range", "10.42.1.0/24", addrs("192.0.2.4"), vouch, "192.0.2.4"),
			object("steals-own-range", "10.42.0.128/25", addrs("192.0.2.5"), vouch, "192.0.2.5"),
			object("steals-the-internet", "8.0.0.0/8", addrs("192.0.2.6"), vouch, "192.0.2.6"),
			object("unseen", "10.42.7.0/24", nil, vouch, "192.168.0.5"),
			object("announces", "10.42.8.0/24", addrs("192.0.2.8"), announcement{Mode: mode, Addresses: addrs("8.8.4.4")}, "192.0.2.8"),
		} {
			if err := store.Add(o); err != nil {
				t.Fatal(err)
			}
		}
		cfg := DefaultConfig()
		cfg.NodeName, cfg.Mode, cfg.Ranges = "own", mode, []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16")}
		b := &Backend{cfg: cfg, nodes: corelisters.NewNodeLister(store), log: slog.New(slog.DiscardHandler)}
		own, peers, err := b.read()
		var got []string
		for _, p := range peers {
			got = append(got, fmt.Sprint(p.name, p.ranges, p.addrs, p.tunnel))
		}
		want := []string{
			"claims-addresses[10.42.2.0/24] [192.0.2.3] [192.0.2.3]",
			"good[10.42.1.0/24] [192.0.2.2] [192.0.2.2]",
		}
		if own == nil || !slices.Equal(got, want) {
			t.Errorf("%s: peers\n%s\nwant\n%s", mode, strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		for _, want := range []string{
			"node steals-range claims the pod range 10.42.1.0/24", "node steals-own-range claims", "node steals-the-internet claims",
			"node unseen is not proven: it claims [192.168.0.5]", "annotate node unseen kedge.io/allowed-addresses=192.168.0.5", "node announces is not proven: it claims [8.8.4.4]",
		} {
			if announced := fmt.Sprint(err, b.Describe()); !strings.Contains(announced, want) {
				t.Errorf("%s: %s lacks %q", mode, announced, want)
			}
		}
		if err != nil && strings.Contains(err.Error(), "unseen") {
			t.Errorf("%s: a node that no server has seen is this node's problem: %v", mode, err)
		}
	}
}

// Another node's public key is useless without the private one, and must not disconnect
// that node.
func TestCopiedWireGuardKey(t *testing.T) {
	w := &wireGuard{now: time.Now}
	key, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		t.Fatal(err)
	}
	peer := func(name, a, r string) node {
		return node{name: name, key: key.PublicKey().String(), tunnel: addrs(a), addrs: addrs(a), ranges: []netip.Prefix{netip.MustParsePrefix(r)}}
	}
	own := node{name: "own", tunnel: addrs("192.0.2.1")}
	victim, thief := peer("victim", "192.0.2.2", "10.42.2.0/24"), peer("a-thief", "192.0.2.3", "10.42.3.0/24")
	if _, errs := w.wantedPeers(own, []node{victim}); len(errs) > 0 {
		t.Fatal(errs)
	}
	want, errs := w.wantedPeers(own, []node{thief, victim})
	if got := want[key.PublicKey()]; got.at.Addr() != victim.addrs[0] || len(errs) != 1 || !strings.Contains(errs[0].Error(), "node a-thief has the WireGuard key of node victim") {
		t.Errorf("the key is of %v, %v", got, errs)
	}
}

// Interfaces must not look like pods' to the rules, and fit the kernel's 15 characters.
func TestMarks(t *testing.T) {
	seen := map[string]bool{}
	for _, n := range []string{"a", "b", strings.Repeat("long", 15)} {
		m := namesOf(n)
		for _, name := range []string{m.link4, m.link6} {
			if len(name) > 15 || strings.HasPrefix(name, "kdg") || seen[name] {
				t.Errorf("node %s: interface %s", n, name)
			}
			seen[name] = true
		}
		if m.number < 1<<16 || m.number > 1<<31-1 {
			t.Errorf("node %s: table %d", n, m.number)
		}
		if mac := tunnelAddr(n); !strings.ContainsAny(mac[1:2], "26ae") {
			t.Errorf("node %s: %s is not a local, single address", n, mac)
		}
	}
}

func TestValidate(t *testing.T) {
	c := DefaultConfig()
	c.NodeName = "n"
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	bad := Config{Mode: "vlan", VNI: 1 << 24, VXLANPort: 70000, UDPPort: 1}
	err := bad.Validate()
	for _, want := range []string{"name", `"vlan"`, "16777216", "70000"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v lacks %q", err, want)
		}
	}
}

// In mode UDP a node may send only packets of its own pods or of itself.
func TestTunnelKnowsWhoseAddressesAre(t *testing.T) {
	tunnel := newUserTunnel(1, nil)
	own := node{name: "own", tunnel: addrs("192.0.2.1")}
	tunnel.set(own, []node{
		{name: "a", tunnel: addrs("192.0.2.2"), addrs: addrs("192.0.2.2"), ranges: []netip.Prefix{netip.MustParsePrefix("10.42.2.0/24")}},
		{name: "b", tunnel: addrs("192.0.2.3"), addrs: addrs("192.0.2.3"), ranges: []netip.Prefix{netip.MustParsePrefix("10.42.3.0/24")}},
	}, false)
	m := tunnel.peers.Load()
	for inner, want := range map[string]string{"10.42.2.9": "a", "10.42.3.1": "b", "192.0.2.3": "b", "10.42.4.1": "", "8.8.8.8": ""} {
		if got, _ := lookup(m, m.name, netip.MustParseAddr(inner)); got != want {
			t.Errorf("%s is of %q, want %q", inner, got, want)
		}
	}
	if at, ok := lookup(m, m.to, netip.MustParseAddr("10.42.3.1")); !ok || at != netip.MustParseAddr("192.0.2.3") {
		t.Errorf("10.42.3.1 goes to %v", at)
	}
}

func FuzzEnds(f *testing.F) {
	f.Add([]byte{0x45})
	f.Add(make([]byte, 40))
	f.Fuzz(func(t *testing.T, packet []byte) {
		src, dst, ok := parseAddrs(packet)
		if ok && (!src.IsValid() || !dst.IsValid() || src.Is4() != dst.Is4()) {
			t.Errorf("%v %v", src, dst)
		}
	})
}
