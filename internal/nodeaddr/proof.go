package nodeaddr

import (
	"cmp"
	"encoding/json"
	"net/netip"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Annotations of Node objects.
const (
	// Proven lists the addresses that a server has accepted, as JSON (see [Proof]).
	// Only servers write it.
	Proven = "kedge.io/addresses"
	// Allowed lists addresses and ranges that the node may have without a call from them,
	// separated by commas. Only administrators write it.
	Allowed = "kedge.io/allowed-addresses"
	// Announced has the node's settings for the way to its pods. Addresses in it need
	// proofs, as addresses in the node's status do.
	Announced = "kedge.io/backend"
)

// Proof is an address that a server has accepted for a node.
type Proof struct {
	Address netip.Addr `json:"address"`
	// Since is the time, by the server's clock, at which a server first saw the node call
	// from the address after the last call of another node from it.
	Since time.Time `json:"since"`
	// Allowed says that an administrator has allowed the address.
	Allowed bool `json:"allowed,omitempty"`
}

// before orders proofs of an address by weight: an administrator's permission, then the latest
// call. Renumbered machines can get each other's addresses, so the node that called last has
// the address now.
func (p Proof) before(q Proof) bool {
	if p.Allowed != q.Allowed {
		return p.Allowed
	}
	return p.Since.After(q.Since)
}

// Proofs reads the annotation of a Node object. known is false for a node without the
// annotation, which no server of this version has seen yet.
func Proofs(annotations map[string]string) (proofs []Proof, known bool) {
	text, known := annotations[Proven]
	if known && json.Unmarshal([]byte(text), &proofs) != nil {
		return nil, true // only servers and administrators write it; an invalid one proves nothing
	}
	return proofs, known
}

// Format is the value of the annotation [Proven].
func Format(proofs []Proof) string {
	if len(proofs) == 0 {
		return "[]"
	}
	text, err := json.Marshal(proofs)
	if err != nil {
		panic(err) // addresses and times can be marshalled
	}
	return string(text)
}

// Claims returns the addresses that a node claims, each once: those in its status, and those in
// its annotations to which packets for its pods are sent.
func Claims(status []string, annotations map[string]string) []netip.Addr {
	var out []netip.Addr
	add := func(a netip.Addr) {
		if a = a.Unmap(); a.IsValid() && !slices.Contains(out, a) {
			out = append(out, a)
		}
	}
	for _, s := range status {
		if a, err := netip.ParseAddr(s); err == nil {
			add(a)
		}
	}
	for _, a := range announced(annotations) {
		add(a)
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return out
}

func announced(annotations map[string]string) []netip.Addr {
	var claimed struct {
		Addresses []netip.Addr `json:"addresses"`
	}
	if json.Unmarshal([]byte(annotations[Announced]), &claimed) != nil {
		return nil // readers of the annotation report the damage
	}
	return claimed.Addresses
}

// Call is the part of a write of a Node object that matters for proofs.
type Call struct {
	Source netip.Addr // from which a node's user called; invalid for other users
	// Trusted is a call by a server's own node, whose claims need no proof.
	Trusted bool
	Now     time.Time
	// Rival returns the weightiest proof of another node for the address, and false if
	// there is none.
	Rival func(netip.Addr) (Proof, bool)
}

// Prove returns the proofs that a node has after a call. They are for those of its claims that
// were proven before, that an administrator allows, or that the node calls from.
func Prove(claims []netip.Addr, before []Proof, allowed []netip.Prefix, call Call) []Proof {
	var out []Proof
	for _, a := range claims {
		p := Proof{Address: a, Since: call.Now.UTC().Truncate(time.Second), Allowed: contains(allowed, a)}
		calls := call.Trusted || a == call.Source
		i := slices.IndexFunc(before, func(p Proof) bool { return p.Address == a })
		switch {
		case calls && i >= 0 && beaten(before[i], call.Rival):
			// Another node has called from there since: this call is the latest again.
		case i >= 0 && (calls || p.Allowed || !before[i].Allowed):
			p.Since = before[i].Since // the same proof, so that a heartbeat changes nothing
		case !calls && !p.Allowed:
			continue // never proven, or no longer allowed
		}
		out = append(out, p)
	}
	return out
}

func beaten(p Proof, rival func(netip.Addr) (Proof, bool)) bool {
	other, ok := rival(p.Address)
	return ok && !p.before(other)
}

func contains(ranges []netip.Prefix, a netip.Addr) bool {
	return slices.ContainsFunc(ranges, func(r netip.Prefix) bool { return r.Contains(a) })
}

// AllowedRanges reads the annotation [Allowed]. Invalid entries allow nothing, and are returned
// to be reported.
func AllowedRanges(annotations map[string]string) (ranges []netip.Prefix, unreadable []string) {
	for item := range strings.SplitSeq(annotations[Allowed], ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		if a, err := netip.ParseAddr(item); err == nil {
			ranges = append(ranges, netip.PrefixFrom(a.Unmap(), a.Unmap().BitLen()))
		} else if p, err := netip.ParsePrefix(item); err == nil {
			ranges = append(ranges, p.Masked())
		} else {
			unreadable = append(unreadable, item)
		}
	}
	return ranges, unreadable
}

// Owner is the node that has an address.
type Owner struct {
	Node  string
	Proof Proof
}

// Owners gives each address that nodes have proven to one node. If two nodes have proven an
// address, the weightier proof counts, then the older node. A node without the annotation is
// from before the servers recorded proofs: its claims count like proofs that are older than
// all others, until its next heartbeat.
func Owners(nodes []*corev1.Node) map[netip.Addr]Owner {
	byAge := slices.SortedFunc(slices.Values(nodes), Older)
	out := map[netip.Addr]Owner{}
	for _, n := range byAge {
		for _, p := range proofsOf(n) {
			if have, ok := out[p.Address]; !ok || p.before(have.Proof) {
				out[p.Address] = Owner{n.Name, p}
			}
		}
	}
	return out
}

// proofsOf returns those of a node's proofs that it still claims.
func proofsOf(n *corev1.Node) []Proof {
	claims := Claims(StatusAddresses(n), n.Annotations)
	proofs, known := Proofs(n.Annotations)
	if !known {
		for _, a := range claims {
			proofs = append(proofs, Proof{Address: a})
		}
		return proofs
	}
	return slices.DeleteFunc(proofs, func(p Proof) bool { return !slices.Contains(claims, p.Address) })
}

// StatusAddresses returns the addresses in a node's status that are valid for a machine.
func StatusAddresses(n *corev1.Node) []string {
	var out []string
	for _, a := range n.Status.Addresses {
		if a.Type == corev1.NodeInternalIP || a.Type == corev1.NodeExternalIP {
			out = append(out, a.Address)
		}
	}
	return out
}

// Older orders nodes by their time of creation, and by name within a second. Of two nodes that
// claim a range of pods the older one has it.
func Older(a, b *corev1.Node) int {
	return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), cmp.Compare(a.Name, b.Name))
}

// Rival returns a function for [Call] that searches all nodes but the named one. It is called
// at each heartbeat of each node, so it reads only the proofs that can matter.
func Rival(nodes []*corev1.Node, name string) func(netip.Addr) (Proof, bool) {
	return func(a netip.Addr) (Proof, bool) {
		o, ok := Owners(slices.DeleteFunc(slices.Clone(nodes), func(n *corev1.Node) bool {
			text, known := n.Annotations[Proven]
			return n.Name == name || known && !strings.Contains(text, a.String())
		}))[a]
		return o.Proof, ok
	}
}
