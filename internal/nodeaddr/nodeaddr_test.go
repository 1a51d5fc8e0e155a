package nodeaddr

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

var begin = time.Unix(1_800_000_000, 0).UTC()

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

// object is a node that says it has addresses, and was created age seconds after the begin.
func object(name string, age int, proofs []Proof, addresses ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(begin.Add(time.Duration(age) * time.Second))}}
	if proofs != nil {
		n.Annotations = map[string]string{Proven: Format(proofs)}
	}
	for _, a := range addresses {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	return n
}

func text(proofs []Proof) string {
	var out []string
	for _, p := range proofs {
		s := fmt.Sprintf("%s@%d", p.Address, int(p.Since.Sub(begin).Seconds()))
		if p.Allowed {
			s += "!"
		}
		out = append(out, s)
	}
	return strings.Join(out, " ")
}

func TestProve(t *testing.T) {
	claims := []netip.Addr{addr("192.0.2.1"), addr("198.51.100.1")}
	none := func(netip.Addr) (Proof, bool) { return Proof{}, false }
	seen := []Proof{{Address: addr("192.0.2.1"), Since: begin}}
	for what, test := range map[string]struct {
		before  []Proof
		allowed string
		call    Call
		want    string
	}{
		"a first call":                     {nil, "", Call{Source: addr("192.0.2.1")}, "192.0.2.1@60"},
		"from an address that it has not":  {nil, "", Call{Source: addr("203.0.113.9")}, ""},
		"of an administrator":              {nil, "", Call{}, ""},
		"a heartbeat":                      {seen, "", Call{Source: addr("192.0.2.1")}, "192.0.2.1@0"},
		"from the other one":               {seen, "", Call{Source: addr("198.51.100.1")}, "192.0.2.1@0 198.51.100.1@60"},
		"of a server's own node":           {nil, "", Call{Trusted: true}, "192.0.2.1@60 198.51.100.1@60"},
		"with an allowed address":          {seen, "198.51.100.1", Call{}, "192.0.2.1@0 198.51.100.1@60!"},
		"with an allowed range":            {nil, "10.0.0.0/8, 198.51.100.0/24", Call{}, "198.51.100.1@60!"},
		"with an allowance taken back":     {[]Proof{{Address: addr("198.51.100.1"), Allowed: true}}, "", Call{Source: addr("192.0.2.1")}, "192.0.2.1@60"},
		"with an address no longer named":  {[]Proof{{Address: addr("192.0.2.99"), Since: begin}}, "", Call{Source: addr("192.0.2.1")}, "192.0.2.1@60"},
		"after another node has called":    {seen, "", Call{Source: addr("192.0.2.1"), Rival: func(netip.Addr) (Proof, bool) { return Proof{Since: begin.Add(5 * time.Second)}, true }}, "192.0.2.1@60"},
		"while another node has the other": {seen, "", Call{Source: addr("203.0.113.9"), Rival: func(netip.Addr) (Proof, bool) { return Proof{Since: begin.Add(5 * time.Second)}, true }}, "192.0.2.1@0"},
	} {
		test.call.Now = begin.Add(time.Minute)
		if test.call.Rival == nil {
			test.call.Rival = none
		}
		allowed, bad := AllowedRanges(map[string]string{Allowed: test.allowed})
		if got := text(Prove(claims, test.before, allowed, test.call)); got != test.want || bad != nil {
			t.Errorf("%s: %q, want %q", what, got, test.want)
		}
	}
	if _, bad := AllowedRanges(map[string]string{Allowed: "192.0.2.1,nonsense"}); !slices.Equal(bad, []string{"nonsense"}) {
		t.Errorf("unreadable: %v", bad)
	}
}

func TestOwners(t *testing.T) {
	proof := func(a string, age int) []Proof {
		return []Proof{{Address: addr(a), Since: begin.Add(time.Duration(age) * time.Second)}}
	}
	allowed := []Proof{{Address: addr("192.0.2.1"), Since: begin, Allowed: true}}
	for what, test := range map[string]struct {
		nodes []*corev1.Node
		want  string
	}{
		"one that was seen":                    {[]*corev1.Node{object("a", 0, proof("192.0.2.1", 1), "192.0.2.1")}, "a"},
		"a claim without a proof":              {[]*corev1.Node{object("a", 0, []Proof{}, "192.0.2.1")}, ""},
		"a proof without a claim":              {[]*corev1.Node{object("a", 0, proof("192.0.2.1", 1))}, ""},
		"from before the proofs":               {[]*corev1.Node{object("a", 0, nil, "192.0.2.1")}, "a"},
		"two from before: the older":           {[]*corev1.Node{object("b", 0, nil, "192.0.2.1"), object("a", 1, nil, "192.0.2.1")}, "b"},
		"a proof counts more than none":        {[]*corev1.Node{object("a", 0, nil, "192.0.2.1"), object("b", 9, proof("192.0.2.1", 1), "192.0.2.1")}, "b"},
		"the latest call":                      {[]*corev1.Node{object("a", 0, proof("192.0.2.1", 1), "192.0.2.1"), object("b", 9, proof("192.0.2.1", 2), "192.0.2.1")}, "b"},
		"two calls at once: the older node":    {[]*corev1.Node{object("b", 0, proof("192.0.2.1", 1), "192.0.2.1"), object("a", 9, proof("192.0.2.1", 1), "192.0.2.1")}, "b"},
		"two of one second: the first by name": {[]*corev1.Node{object("b", 0, proof("192.0.2.1", 1), "192.0.2.1"), object("a", 0, proof("192.0.2.1", 1), "192.0.2.1")}, "a"},
		"an administrator's word":              {[]*corev1.Node{object("a", 9, allowed, "192.0.2.1"), object("b", 0, proof("192.0.2.1", 99), "192.0.2.1")}, "a"},
	} {
		for range 2 {
			if got := Owners(test.nodes)[addr("192.0.2.1")].Node; got != test.want {
				t.Errorf("%s: %q, want %q", what, got, test.want)
			}
			slices.Reverse(test.nodes)
		}
	}
	broken := object("a", 0, nil, "192.0.2.1")
	broken.Annotations = map[string]string{Proven: "{"}
	if got := Owners([]*corev1.Node{broken}); len(got) > 0 {
		t.Errorf("a broken annotation proves %v", got)
	}
}

// An address of the annotation needs a proof too: tunnels lead there.
func TestAnnouncedAddressesAreClaims(t *testing.T) {
	n := object("a", 0, []Proof{{Address: addr("192.0.2.1")}}, "192.0.2.1")
	n.Annotations[Announced] = `{"mode":"vxlan","addresses":["198.51.100.1","::ffff:192.0.2.1"]}`
	if got := fmt.Sprint(Claims(StatusAddresses(n), n.Annotations)); got != "[192.0.2.1 198.51.100.1]" {
		t.Errorf("claims %s", got)
	}
	if o := Owners([]*corev1.Node{n}); len(o) != 1 || o[addr("192.0.2.1")].Node != "a" {
		t.Errorf("owners %v", o)
	}
}

func TestPodRanges(t *testing.T) {
	with := func(n *corev1.Node, ranges ...string) *corev1.Node { n.Spec.PodCIDRs = ranges; return n }
	nodes := []*corev1.Node{
		with(object("evil", 5, nil), "10.42.1.0/24"), with(object("wide", 4, nil), "10.42.0.0/16"),
		with(object("a", 1, nil), "10.42.1.0/24", "fd00:42:0:1::/64"), with(object("b", 2, nil), "10.42.2.7/24"),
		with(object("out", 3, nil), "8.8.8.0/24", "10.0.0.0/8"), with(object("bad", 6, nil), "10.42.3"),
	}
	got, errs := PodRanges(nodes, []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("fd00:42::/48")})
	if s := fmt.Sprint(got); s != "map[a:[10.42.1.0/24 fd00:42:0:1::/64] b:[10.42.2.0/24]]" {
		t.Errorf("ranges %s", s)
	}
	said := fmt.Sprint(errs)
	for _, want := range []string{"node evil claims", "node wide claims", "8.8.8.0/24, which is outside", "10.0.0.0/8, which is outside", "node bad: pod range"} {
		if !strings.Contains(said, want) {
			t.Errorf("%s lacks %q", said, want)
		}
	}
	if len(errs) != 5 {
		t.Errorf("%d errors: %v", len(errs), errs)
	}
}

func TestRival(t *testing.T) {
	proof := func(a string, age int) []Proof {
		return []Proof{{Address: addr(a), Since: begin.Add(time.Duration(age) * time.Second)}}
	}
	nodes := []*corev1.Node{
		object("own", 0, proof("192.0.2.1", 9), "192.0.2.1"), object("a", 1, proof("192.0.2.1", 5), "192.0.2.1"),
		object("b", 2, proof("192.0.2.11", 7), "192.0.2.11"), object("old", 3, nil, "192.0.2.3"),
	}
	for address, want := range map[string]string{"192.0.2.1": "192.0.2.1@5", "192.0.2.11": "192.0.2.11@7", "192.0.2.9": ""} {
		p, ok := Rival(nodes, "own")(addr(address))
		got := ""
		if ok {
			got = text([]Proof{p})
		}
		if got != want {
			t.Errorf("%s: %q, want %q", address, got, want)
		}
	}
	if _, ok := Rival(nodes, "own")(addr("192.0.2.3")); !ok {
		t.Error("a node of before the proofs is no rival")
	}
}
