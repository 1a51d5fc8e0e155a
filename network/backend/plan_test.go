package backend

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
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
	object := func(annotation, cidr, addr string) *corev1.Node {
		return &corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: "n", Annotations: map[string]string{Annotation: annotation}},
			Spec:       corev1.NodeSpec{PodCIDRs: []string{cidr}},
			Status:     corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: addr}, {Type: corev1.NodeHostName, Address: "n"}}},
		}
	}
	said := announcement{Mode: VXLAN, Addresses: addrs("198.51.100.1")}
	n, err := readNode(object(said.String(), "10.42.1.0/24", "192.0.2.1"))
	if err != nil || n.mode != VXLAN || !slices.Equal(n.addrs, addrs("192.0.2.1")) || !slices.Equal(n.tunnel, said.Addresses) {
		t.Errorf("got %+v, %v", n, err)
	}
	if n, err = readNode(object("", "10.42.1.0/24", "192.0.2.1")); err != nil || n.mode != "" || !slices.Equal(n.tunnel, n.addrs) {
		t.Errorf("without annotation: %+v, %v", n, err)
	}
	for what, o := range map[string]*corev1.Node{
		"annotation": object("vxlan", "10.42.1.0/24", "192.0.2.1"),
		"pod range":  object("", "10.42.1.0", "192.0.2.1"),
		"address":    object("", "10.42.1.0/24", "192.0.2"),
	} {
		if _, err := readNode(o); err == nil || !strings.Contains(err.Error(), "node n: "+what) {
			t.Errorf("bad %s: %v", what, err)
		}
	}
}

// Interfaces must not look like pods' to the rules, and fit the kernel's 15 characters.
func TestMarks(t *testing.T) {
	seen := map[string]bool{}
	for _, n := range []string{"a", "b", strings.Repeat("long", 15)} {
		m := marks(n)
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

// In mode UDP a node may only send what comes from its own pods or itself.
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
		src, dst, ok := ends(packet)
		if ok && (!src.IsValid() || !dst.IsValid() || src.Is4() != dst.Is4()) {
			t.Errorf("%v %v", src, dst)
		}
	})
}
