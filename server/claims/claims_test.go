package claims

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	v1listers "k8s.io/client-go/listers/core/v1"
	"k8s.io/client-go/tools/cache"

	"kedge/internal/nodeaddr"
)

func TestCheck(t *testing.T) {
	store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	victim := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "victim"}}
	victim.Status.Addresses = []corev1.NodeAddress{
		{Type: corev1.NodeInternalIP, Address: "192.0.2.1"}, {Type: corev1.NodeInternalIP, Address: "2001:db8:0::1"},
		{Type: corev1.NodeExternalIP, Address: "203.0.113.1"},
	}
	if err := store.Add(victim); err != nil {
		t.Fatal(err)
	}
	j := Checker{Nodes: v1listers.NewNodeLister(store), Ranges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")}}
	for _, test := range []struct {
		what, address, source string
		want                  error
	}{
		{"that from which it calls", "192.0.2.7", "192.0.2.7", nil},
		{"one behind a router", "10.0.0.7", "192.0.2.7", nil},
		{"another node's", "192.0.2.1", "192.0.2.7", ErrTaken},
		{"another node's, written otherwise", "2001:db8::1", "192.0.2.7", ErrTaken},
		{"another node's, IPv4 in IPv6", "::ffff:192.0.2.1", "192.0.2.7", ErrTaken},
		{"another node's, from which it calls", "192.0.2.1", "192.0.2.1", nil},
		{"that of a router that both are behind", "203.0.113.1", "192.0.2.7", nil},
		{"a service's", "10.43.0.1", "192.0.2.7", ErrNotNodeAddress},
		{"a pod's, from which it calls", "10.42.1.5", "10.42.1.5", ErrNotNodeAddress},
		{"loopback", "127.0.0.1", "192.0.2.7", ErrNotNodeAddress},
		{"link-local", "fe80::1", "192.0.2.7", ErrNotNodeAddress},
		{"none", "x", "192.0.2.7", ErrNotNodeAddress},
	} {
		if err := j.Check("node", test.address, netip.MustParseAddr(test.source)); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
	if err := j.Check("victim", "192.0.2.1", netip.MustParseAddr("192.0.2.9")); err != nil {
		t.Errorf("its own: %v", err)
	}
}

func objectWith(name string, ranges []string, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: ranges}}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func judgeOf(t *testing.T, nodes ...*corev1.Node) Checker {
	t.Helper()
	store := cache.NewIndexer(cache.MetaNamespaceKeyFunc, cache.Indexers{})
	for _, n := range nodes {
		if err := store.Add(n); err != nil {
			t.Fatal(err)
		}
	}
	return Checker{Nodes: v1listers.NewNodeLister(store), Ranges: []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16")}}
}

func TestCheckNode(t *testing.T) {
	j := judgeOf(t, objectWith("victim", []string{"10.42.1.0/24"}, "192.0.2.1"))
	source := netip.MustParseAddr("192.0.2.7")
	said := func(a ...string) (out []corev1.NodeAddress) {
		for _, s := range a {
			out = append(out, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: s})
		}
		return out
	}
	for _, test := range []struct {
		what      string
		n, before Node
		want      error
	}{
		{"created", Node{Name: "n", Addresses: said("192.0.2.7")}, Node{}, nil},
		{"created with another's pod range", Node{Name: "n", PodCIDRs: []string{"10.42.1.0/24"}}, Node{}, ErrPodRange},
		{"created with a free pod range", Node{Name: "n", PodCIDRs: []string{"10.42.9.0/24"}}, Node{}, ErrPodRange},
		{"a pod range set later", Node{Name: "n", PodCIDRs: []string{"10.42.9.0/24"}}, Node{Name: "n"}, ErrPodRange},
		{"a pod range that it was given", Node{Name: "n", PodCIDRs: []string{"10.42.9.0/24"}}, Node{Name: "n", PodCIDRs: []string{"10.42.9.0/24"}}, nil},
		{"an allowance", Node{Name: "n", Annotations: map[string]string{nodeaddr.Allowed: "8.8.8.8"}}, Node{Name: "n"}, ErrAllowance},
		{"an allowance taken away", Node{Name: "n"}, Node{Name: "n", Annotations: map[string]string{nodeaddr.Allowed: "8.8.8.8"}}, ErrAllowance},
		{"another's address", Node{Name: "n", Addresses: said("192.0.2.7", "192.0.2.1")}, Node{Name: "n"}, ErrTaken},
		{"another's address, which it has had", Node{Name: "n", Addresses: said("192.0.2.1")}, Node{Name: "n", Addresses: said("192.0.2.1")}, nil},
	} {
		if err := j.CheckNode(test.n, test.before, source); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
}

func TestCheckPod(t *testing.T) {
	j := judgeOf(t, objectWith("n", []string{"10.42.1.0/24", "fd00:42::/64"}, "192.0.2.7"))
	for _, test := range []struct {
		what      string
		p, before Pod
		want      error
	}{
		{"of the node's ranges", Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.1.9", "fd00:42::9"}}, Pod{}, nil},
		{"of another node's range", Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.2.9"}}, Pod{}, ErrPodAddress},
		{"of no pod", Pod{Node: "n", HostNetwork: false, IPs: []string{"8.8.8.8"}}, Pod{}, ErrPodAddress},
		{"of the node, for a pod with a network of its own", Pod{Node: "n", HostNetwork: false, IPs: []string{"192.0.2.7"}}, Pod{}, ErrPodAddress},
		{"of the node, for one on the host's network", Pod{Node: "n", HostNetwork: true, IPs: []string{"192.0.2.7"}}, Pod{}, nil},
		{"of another machine, for one on the host's network", Pod{Node: "n", HostNetwork: true, IPs: []string{"192.0.2.1"}}, Pod{}, ErrPodAddress},
		{"of before", Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.7.1"}}, Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.7.1"}}, nil},
		{"of before, and another", Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.7.1", "10.42.8.1"}}, Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.7.1"}}, ErrPodAddress},
		{"its node's as the host's", Pod{Node: "n", HostIPs: []string{"192.0.2.7"}}, Pod{}, nil},
		{"another machine's as the host's", Pod{Node: "n", HostIPs: []string{"192.0.2.1"}}, Pod{}, ErrPodAddress},
		{"the host's of before", Pod{Node: "n", HostIPs: []string{"192.0.2.1"}}, Pod{HostIPs: []string{"192.0.2.1"}}, nil},
		{"none", Pod{Node: "n", HostNetwork: false, IPs: nil}, Pod{Node: "n", HostNetwork: false, IPs: []string{"10.42.7.1"}}, nil},
		{"of a node that there is not", Pod{Node: "m", HostNetwork: false, IPs: []string{"10.42.1.9"}}, Pod{}, ErrPodAddress},
		{"no address", Pod{Node: "n", HostNetwork: false, IPs: []string{"x"}}, Pod{}, ErrPodAddress},
	} {
		if err := j.CheckPod(test.p, test.before); !errors.Is(err, test.want) || (err == nil) != (test.want == nil) {
			t.Errorf("%s: %v", test.what, err)
		}
	}
	j.ForeignPods = true
	if err := j.CheckPod(Pod{Node: "n", HostNetwork: false, IPs: []string{"172.16.0.1"}}, Pod{}); err != nil {
		t.Errorf("another plug-in's: %v", err)
	}
}

func TestAnnotate(t *testing.T) {
	now := time.Unix(1_800_000_000, 0).UTC()
	proofs := func(m map[string]string) string {
		got, known := nodeaddr.Proofs(m)
		if !known {
			return "unknown"
		}
		out := ""
		for _, p := range got {
			out += p.Address.String() + " "
		}
		return strings.TrimSpace(out)
	}
	said := []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: "192.0.2.7"}, {Type: corev1.NodeInternalIP, Address: "8.8.8.8"}}
	forged := map[string]string{nodeaddr.Proven: nodeaddr.Format([]nodeaddr.Proof{{Address: netip.MustParseAddr("8.8.8.8")}})}
	stamped := map[string]string{nodeaddr.Proven: nodeaddr.Format(nil)}
	for _, test := range []struct {
		what string
		w    Write
		want string
	}{
		{"a node registers", Write{Node: Node{Addresses: said}, ByNode: true, Source: netip.MustParseAddr("192.0.2.7")}, "192.0.2.7"},
		{"a node forges its proofs", Write{Node: Node{Addresses: said, Annotations: forged}, Before: &Node{Addresses: said, Annotations: stamped}, ByNode: true, Source: netip.MustParseAddr("192.0.2.7")}, "192.0.2.7"},
		{"a node forges them when it registers", Write{Node: Node{Addresses: said, Annotations: forged}, ByNode: true, Source: netip.MustParseAddr("192.0.2.7")}, "192.0.2.7"},
		{"a node takes the annotation away", Write{Node: Node{Addresses: said}, Before: &Node{Addresses: said, Annotations: forged}, ByNode: true, Source: netip.MustParseAddr("192.0.2.7")}, "8.8.8.8 192.0.2.7"},
		{"a server's own node", Write{Node: Node{Addresses: said}, ByNode: true, Trusted: true}, "8.8.8.8 192.0.2.7"},
		{"an administrator labels a node", Write{Node: Node{Addresses: said, Annotations: stamped}, Before: &Node{Addresses: said, Annotations: stamped}}, ""},
		{"an administrator labels a node of before", Write{Node: Node{Addresses: said}, Before: &Node{Addresses: said}}, "unknown"},
		{"an administrator allows an address", Write{Node: Node{Addresses: said, Annotations: map[string]string{nodeaddr.Allowed: "8.8.8.8"}}, Before: &Node{Addresses: said}}, "8.8.8.8"},
		{"a cloud's controller adds an address", Write{Node: Node{Addresses: said, Annotations: stamped}, Before: &Node{Addresses: said[1:], Annotations: stamped}}, "192.0.2.7"},
	} {
		test.w.Now = now
		if got := proofs(Annotate(test.w, nil)); got != test.want {
			t.Errorf("%s: %q, want %q", test.what, got, test.want)
		}
	}
}

func TestCheckAllowance(t *testing.T) {
	with := func(text string) Node { return Node{Annotations: map[string]string{nodeaddr.Allowed: text}} }
	for text, good := range map[string]bool{"": true, "192.0.2.1": true, "192.0.2.1, 10.0.0.0/8,": true, "nonsense": false, "192.168.88.5x": false, "192.0.2.1 192.0.2.2": false} {
		if err := CheckAllowance(with(text), Node{}); (err == nil) != good {
			t.Errorf("%q: %v", text, err)
		}
	}
	if err := CheckAllowance(with("nonsense"), with("nonsense")); err != nil {
		t.Errorf("a heartbeat of a node whose annotation is damaged: %v", err)
	}
}
