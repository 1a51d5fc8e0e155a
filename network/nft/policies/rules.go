package policies

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// Names of the fixed parts of the policy table.
const (
	chainEgress      = "egress"
	chainEgressInput = "egress-to-node"
	chainIngress     = "ingress"

	mapEgress  = "egress-"  // address of a pod of this node -> chain for the connections that it opens
	mapIngress = "ingress-" // the same for the connections that it accepts
)

// hooks are the base chains:
//
//	egress (forward), egress-to-node (input)
//	    the connection's client is a pod of this node with policies: its chain.
//	ingress (forward, after egress)
//	    the connection's server is a pod of this node with policies: its chain.
//
// Policies apply to connections, not to packets: addresses and ports are those of the
// connection's first packet, the client's before source translation and the server's
// after destination translation, in whichever direction the packet goes. Replies need no
// rules of their own, every packet of an established connection is checked against the
// current rules, and an ICMP error is checked as the connection that it is about.
//
// A packet without a tracked connection (out of window, or exempted by a notrack rule) is
// checked by its own header: it can match no rule with conditions.
//
// Connections from the node itself do not pass these hooks.
func hooks() []nft.Chain {
	egress := nft.Chain{Name: chainEgress, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter}
	input := nft.Chain{Name: chainEgressInput, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter}
	ingress := nft.Chain{Name: chainIngress, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookForward, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityFilter + 1)}

	for _, c := range []*nft.Chain{&egress, &input} {
		for _, f := range []nft.Family{nft.V4, nft.V6} {
			c.Add("opened by a pod of this node", f.Is(), opener(f, nft.Reg1), choose(subjectMap(Egress, f)))
		}
	}
	input.Add("IPv6 neighbour discovery", neighbourDiscovery(), nft.Accept())
	for _, c := range []*nft.Chain{&egress, &input} {
		for _, f := range []nft.Family{nft.V4, nft.V6} {
			c.Add("untracked, from a pod of this node", untracked(), f.Is(), nft.Exprs{f.LoadAddr(f.SourceOffset, nft.Reg1)}, choose(subjectMap(Egress, f)))
		}
	}
	for _, f := range []nft.Family{nft.V4, nft.V6} {
		ingress.Add("opened to a pod of this node", f.Is(), target(f, nft.Reg1), choose(subjectMap(Ingress, f)))
	}
	for _, f := range []nft.Family{nft.V4, nft.V6} {
		ingress.Add("untracked, to a pod of this node", untracked(), f.Is(), nft.Exprs{f.LoadAddr(f.DestinationOffset, nft.Reg1)}, choose(subjectMap(Ingress, f)))
	}
	return []nft.Chain{egress, input, ingress}
}

// render returns the rules of a chain as nftables expressions.
func (t *Table) render(c Chain) []nft.Rule {
	f := familyFor(c.V6)
	peer := opener
	if c.Direction == Egress {
		peer = target
	}
	var out []nft.Rule
	for _, r := range c.Rules {
		var parts nft.Exprs
		if r.Peers != "" {
			parts = nft.Join(parts, peer(f, nft.Reg1), nft.Exprs{&expr.Lookup{SourceRegister: nft.Reg1, SetName: r.Peers}})
		}
		if r.Ports != "" {
			parts = nft.Join(parts, trackedProtocol(nft.Word0), targetPort(nft.Word0+1), nft.Exprs{&expr.Lookup{SourceRegister: nft.Reg1, SetName: r.Ports}})
		}
		if r.PeerPorts != "" {
			next := nft.Word0 + f.Words()
			parts = nft.Join(parts, peer(f, nft.Reg1), trackedProtocol(next), targetPort(next+1), nft.Exprs{&expr.Lookup{SourceRegister: nft.Reg1, SetName: r.PeerPorts}})
		}
		if r.Itself != "" {
			parts = nft.Join(parts, opener(f, nft.Reg1), target(f, nft.Word0+f.Words()), nft.Exprs{&expr.Lookup{SourceRegister: nft.Reg1, SetName: r.Itself}})
		}
		out = append(out, nft.Rule{Comment: r.Comment, Exprs: nft.Join(parts, verdict(r))})
	}
	return out
}

func verdict(r Rule) nft.Exprs {
	switch r.Then {
	case Allow:
		return nft.Accept()
	case Pass:
		return nft.Return()
	case Call:
		return nft.Jump(r.Chain)
	}
	return nft.Drop()
}

// choose jumps to the chain that a map has for the address in Reg1.
func choose(m nftables.Set) nft.Exprs {
	return nft.Exprs{&expr.Lookup{SourceRegister: nft.Reg1, DestRegister: unix.NFT_REG_VERDICT, IsDestRegSet: true, SetName: m.Name}}
}

// opener loads the address of the client, before source translation. Without a tracked
// connection the rule does not match.
func opener(f nft.Family, register uint32) nft.Exprs {
	return nft.LoadConnectionSource(f, nft.Original, register)
}

// target loads the address of the server, after destination translation.
func target(f nft.Family, register uint32) nft.Exprs {
	return nft.LoadConnectionSource(f, nft.Reply, register)
}

// targetPort loads the port of the server, after destination translation.
func targetPort(register uint32) nft.Exprs {
	return nft.Exprs{&expr.Ct{Key: expr.CtKeyPROTOSRC, Direction: nft.Reply, Register: register}}
}

// trackedProtocol loads the connection's protocol; an ICMP error has the protocol of the
// connection that it is about.
func trackedProtocol(register uint32) nft.Exprs {
	return nft.Exprs{&expr.Ct{Key: expr.CtKeyPROTOCOL, Register: register}}
}

// untracked matches packets without a tracked connection.
func untracked() nft.Exprs { return nft.InState(expr.CtStateBitINVALID | expr.CtStateBitUNTRACKED) }

// neighbourDiscovery matches router and neighbour messages and redirects (RFC 4861).
func neighbourDiscovery() nft.Exprs {
	const routerSolicitation, redirect = 133, 137
	return nft.Join(nft.V6.Is(), nft.Exprs{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: nft.Reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: []byte{unix.IPPROTO_ICMPV6}},
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1, DestRegister: nft.Reg1},
		&expr.Cmp{Op: expr.CmpOpGte, Register: nft.Reg1, Data: []byte{routerSolicitation}},
		&expr.Cmp{Op: expr.CmpOpLte, Register: nft.Reg1, Data: []byte{redirect}},
	})
}

func familyFor(v6Wanted bool) nft.Family {
	if v6Wanted {
		return nft.V6
	}
	return nft.V4
}

func subjectMap(d Direction, f nft.Family) nftables.Set {
	name := mapEgress
	if d == Ingress {
		name = mapIngress
	}
	return nftables.Set{
		Name: name + f.Suffix, IsMap: true, KeyType: f.AddrType, DataType: nftables.TypeVerdict,
		Comment: "chains for " + d.String() + " of this node's pods",
	}
}

// ref returns the library's description of a set.
func (s *set) ref(name string) nftables.Set {
	f := familyFor(s.V6)
	ref := nftables.Set{Name: name, Comment: nft.TrimComment(s.Comment)}
	switch s.Kind {
	case Addresses:
		ref.KeyType = f.AddrType
	case Blocks:
		ref.KeyType, ref.Interval = f.AddrType, true
	case Ports:
		ref.KeyType = nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService)
		ref.Interval, ref.Concatenation = s.Ranges, s.Ranges
	case AddressPorts:
		ref.KeyType = nftables.MustConcatSetType(f.AddrType, nftables.TypeInetProto, nftables.TypeInetService)
	case SameAddresses:
		ref.KeyType = nftables.MustConcatSetType(f.AddrType, f.AddrType)
	}
	return ref
}

// encode returns elements in the kernel's form: a block is its first address and, marked as
// an end, the address after its last.
func (s *set) encode(elements []Element) []nftables.SetElement {
	var out []nftables.SetElement
	for _, e := range elements {
		first := nftables.SetElement{Key: []byte(e.key)}
		if s.Kind == Ports && s.Ranges {
			first.KeyEnd = []byte(e.end)
		}
		out = append(out, first) // before its end, otherwise the kernel sees an overlap
		if s.Kind == Blocks {
			last, _ := netip.AddrFromSlice([]byte(e.end))
			if next := last.Next(); next.IsValid() { // otherwise the block ends at the last address of the family
				out = append(out, nftables.SetElement{Key: next.AsSlice(), IntervalEnd: true})
			}
		}
	}
	return out
}

// decode is the inverse of encode.
func (s *set) decode(elements []nftables.SetElement) []Element {
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
		// After sorting, each first address is followed by its end, if it has one.
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

// chainFromVerdict decodes the chain of a verdict in the kernel's form.
func chainFromVerdict(val []byte) (string, bool) {
	const code, name = 1, 2 // NFTA_VERDICT_CODE, NFTA_VERDICT_CHAIN
	attrs, err := nft.DecodeAttributes(val)
	if err != nil || len(attrs[code]) < 4 {
		return "", false
	}
	switch int32(binary.BigEndian.Uint32(attrs[code])) {
	case int32(expr.VerdictDrop):
		return DenyAll, true
	case int32(expr.VerdictGoto):
		return string(nft.TrimZero(attrs[name])), true
	}
	return "", false
}
