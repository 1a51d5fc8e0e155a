package nft

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names of the fixed parts of the policy table.
const (
	chainEgress      = "egress"
	chainEgressInput = "egress-to-node"
	chainIngress     = "ingress"

	mapEgress  = "egress-"  // address of a pod of this node -> what judges its connections to others
	mapIngress = "ingress-" // the same for connections of others to it
)

// policyHooks are the chains that the kernel calls:
//
//	egress (forward), egress-to-node (input)
//	    the connection's opener is a pod of this node that is judged: its chain.
//	ingress (forward, after egress)
//	    the connection's target is a pod of this node that is judged: its chain.
//
// A connection is judged, not a packet: addresses and ports are those of the
// connection's first packet, the opener's as it was before source translation
// and the target's after destination translation, whichever way the packet at
// hand goes. So answers need no rule of their own, an established connection is
// judged anew with every packet by the rules of the day, and an ICMP error is
// judged as the connection that it is about.
//
// What connection tracking does not know (out of window, or exempted by
// somebody) is judged by its own header: it can match no rule with conditions.
//
// Connections from the node itself are not judged: they do not pass here.
func policyHooks() []chain {
	egress := chain{name: chainEgress, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookForward, priority: nftables.ChainPriorityFilter}
	input := chain{name: chainEgressInput, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookInput, priority: nftables.ChainPriorityFilter}
	ingress := chain{name: chainIngress, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookForward, priority: nftables.ChainPriorityRef(*nftables.ChainPriorityFilter + 1)}

	for _, c := range []*chain{&egress, &input} {
		for _, f := range []family{v4, v6} {
			c.add("opened by a pod of this node", f.is(), opener(f, reg1), choose(subjectMap(Egress, f)))
		}
	}
	input.add("IPv6 neighbour discovery", neighbourDiscovery(), accept())
	for _, c := range []*chain{&egress, &input} {
		for _, f := range []family{v4, v6} {
			c.add("untracked, from a pod of this node", untracked(), f.is(), rule{f.load(f.saddr, reg1)}, choose(subjectMap(Egress, f)))
		}
	}
	for _, f := range []family{v4, v6} {
		ingress.add("opened to a pod of this node", f.is(), target(f, reg1), choose(subjectMap(Ingress, f)))
	}
	for _, f := range []family{v4, v6} {
		ingress.add("untracked, to a pod of this node", untracked(), f.is(), rule{f.load(f.daddr, reg1)}, choose(subjectMap(Ingress, f)))
	}
	return []chain{egress, input, ingress}
}

// render spells a chain's rules out.
func (t *PolicyTable) render(c PolicyChain) []commented {
	f := familyFor(c.V6)
	peer := opener
	if c.Direction == Egress {
		peer = target
	}
	var out []commented
	for _, r := range c.Rules {
		var parts rule
		if r.Peers != "" {
			parts = join(parts, peer(f, reg1), rule{&expr.Lookup{SourceRegister: reg1, SetName: r.Peers}})
		}
		if r.Ports != "" {
			parts = join(parts, trackedProtocol(word0), targetPort(word0+1), rule{&expr.Lookup{SourceRegister: reg1, SetName: r.Ports}})
		}
		if r.PeerPorts != "" {
			next := word0 + f.words()
			parts = join(parts, peer(f, reg1), trackedProtocol(next), targetPort(next+1), rule{&expr.Lookup{SourceRegister: reg1, SetName: r.PeerPorts}})
		}
		if r.Itself != "" {
			parts = join(parts, opener(f, reg1), target(f, word0+f.words()), rule{&expr.Lookup{SourceRegister: reg1, SetName: r.Itself}})
		}
		out = append(out, commented{r.Comment, join(parts, verdict(r))})
	}
	return out
}

func verdict(r PolicyRule) rule {
	switch r.Then {
	case Allow:
		return accept()
	case Pass:
		return leave()
	case Call:
		return jump(r.Chain)
	}
	return drop()
}

func accept() rule { return rule{&expr.Verdict{Kind: expr.VerdictAccept}} }

// choose goes on in the chain that a map has for the address in reg1.
func choose(m nftables.Set) rule {
	return rule{&expr.Lookup{SourceRegister: reg1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m.Name}}
}

// opener loads the address that the connection was opened from, as it was before
// source translation. Without a tracked connection the rule does not match.
func opener(f family, register uint32) rule { return sourceAddr(f, original, register) }

// target loads the address that the connection leads to, after destination translation.
func target(f family, register uint32) rule { return sourceAddr(f, reply, register) }

// targetPort loads the port that the connection leads to, after translation.
func targetPort(register uint32) rule {
	return rule{&expr.Ct{Key: expr.CtKeyPROTOSRC, Direction: reply, Register: register}}
}

// trackedProtocol loads the connection's protocol; that of an ICMP error is that
// of the connection it is about.
func trackedProtocol(register uint32) rule {
	return rule{&expr.Ct{Key: expr.CtKeyPROTOCOL, Register: register}}
}

// untracked matches packets that belong to no connection.
func untracked() rule { return inState(expr.CtStateBitINVALID | expr.CtStateBitUNTRACKED) }

// inState matches packets in one of the states of connection tracking.
func inState(bits uint32) rule {
	states := binaryutil.NativeEndian.PutUint32(bits)
	none := make([]byte, len(states))
	return rule{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(states)), Mask: states, Xor: none},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: none},
	}
}

// neighbourDiscovery matches router and neighbour messages and redirects (RFC 4861).
func neighbourDiscovery() rule {
	const routerSolicitation, redirect = 133, 137
	return join(v6.is(), rule{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1, DestRegister: reg1},
		&expr.Cmp{Op: expr.CmpOpGte, Register: reg1, Data: []byte{routerSolicitation}},
		&expr.Cmp{Op: expr.CmpOpLte, Register: reg1, Data: []byte{redirect}},
	})
}

func familyFor(v6Wanted bool) family {
	if v6Wanted {
		return v6
	}
	return v4
}

func subjectMap(d Direction, f family) nftables.Set {
	name := mapEgress
	if d == Ingress {
		name = mapIngress
	}
	return nftables.Set{
		Name: name + f.suffix, IsMap: true, KeyType: f.addrType, DataType: nftables.TypeVerdict,
		Comment: d.String() + " of this node's pods that is judged",
	}
}

// ref describes a set to the kernel.
func (s *policySet) ref(name string) nftables.Set {
	f := familyFor(s.V6)
	ref := nftables.Set{Name: name, Comment: comment(s.Comment)}
	switch s.Kind {
	case Addresses:
		ref.KeyType = f.addrType
	case Blocks:
		ref.KeyType, ref.Interval = f.addrType, true
	case Ports:
		ref.KeyType = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
		ref.Interval, ref.Concatenation = s.Ranges, s.Ranges
	case AddressPorts:
		ref.KeyType = nftables.MustConcatSetType(f.addrType, nftables.TypeInetProto, nftables.TypeInetService)
	case SameAddresses:
		ref.KeyType = nftables.MustConcatSetType(f.addrType, f.addrType)
	}
	return ref
}

// encode spells elements as the kernel has them: a block is its first address
// and, marked as an end, the one after its last.
func (s *policySet) encode(elements []Element) []nftables.SetElement {
	var out []nftables.SetElement
	for _, e := range elements {
		first := nftables.SetElement{Key: []byte(e.key)}
		if s.Kind == Ports && s.Ranges {
			first.KeyEnd = []byte(e.end)
		}
		out = append(out, first) // before its end, or the kernel sees an overlap
		if s.Kind == Blocks {
			last, _ := netip.AddrFromSlice([]byte(e.end))
			if next := last.Next(); next.IsValid() { // or the block reaches to the last address there is
				out = append(out, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
			}
		}
	}
	return out
}

// decode is the opposite of encode.
func (s *policySet) decode(elements []nftables.SetElement) []Element {
	var out []Element
	switch {
	case s.Kind == Ports && s.Ranges:
		for _, e := range elements {
			out = append(out, Element{key: string(e.Key), end: string(e.KeyEnd)})
		}
	case s.Kind == Ports:
		for _, e := range elements {
			out = append(out, Element{key: string(e.Key), end: string(e.Key)})
		}
	case s.Kind == Blocks:
		// Sorted, each first address is followed by its end, if it has one.
		slices.SortFunc(elements, func(a, b nftables.SetElement) int {
			if c := slices.Compare(a.Key, b.Key); c != 0 {
				return c
			}
			if a.IntervalEnd {
				return -1
			}
			return 1
		})
		for i, e := range elements {
			if e.IntervalEnd {
				continue
			}
			end := slices.Repeat([]byte{0xff}, len(e.Key))
			if i+1 < len(elements) && elements[i+1].IntervalEnd {
				next, _ := netip.AddrFromSlice(elements[i+1].Key)
				end = next.Prev().AsSlice()
			}
			out = append(out, Element{key: string(e.Key), end: string(end)})
		}
	default:
		for _, e := range elements {
			out = append(out, Element{key: string(e.Key)})
		}
	}
	return out
}

// chainOf reads from the kernel's form what an element of a map leads to.
func chainOf(val []byte) (string, bool) {
	const code, name = 1, 2 // NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN
	attrs, err := decodeAttributes(val)
	if err != nil || len(attrs[code]) < 4 {
		return "", false
	}
	switch int32(binary.BigEndian.Uint32(attrs[code])) {
	case int32(expr.VerdictDrop):
		return Refuse, true
	case int32(expr.VerdictGoto):
		return string(trimZero(attrs[name])), true
	}
	return "", false
}
