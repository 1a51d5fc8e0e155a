package hostfirewall

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// answer is whether a packet fulfils a condition.
type answer int

const (
	no answer = iota
	maybe
	yes
)

// registers has the values that a rule has loaded; unknown values are absent. The kernel's first
// four registers of 16 bytes are the same memory as sixteen registers of 4 bytes.
type registers map[uint32][]byte

func slot(register uint32) uint32 {
	if register >= unix.NFT_REG_1 && register <= unix.NFT_REG_4 {
		return unix.NFT_REG32_00 + 4*(register-unix.NFT_REG_1)
	}
	return register
}

func (r registers) put(register uint32, value []byte) {
	if value == nil {
		delete(r, slot(register))
		return
	}
	r[slot(register)] = value
}

func (r registers) get(register uint32, length int) []byte {
	v := r[slot(register)]
	if len(v) < length {
		return nil
	}
	return v[:length]
}

// rule returns whether a packet fulfils a rule's conditions, and the rule's verdict; there is
// none if the rule only counts or changes something.
func (w *walk) rule(r *nftables.Rule) (match answer, verdict *expr.Verdict, err error) {
	match = yes
	regs := registers{}
	for _, e := range r.Exprs {
		is := yes
		switch e := e.(type) {
		case *expr.Meta:
			if !e.SourceRegister {
				regs.put(e.Register, w.meta(e.Key))
			}
		case *expr.Payload:
			if e.OperationType == expr.PayloadLoad {
				regs.put(e.DestRegister, w.payload(e))
			}
		case *expr.Ct:
			var value []byte
			if e.Key == expr.CtKeySTATE {
				value = binaryutil.NativeEndian.PutUint32(expr.CtStateBitNEW)
			}
			if !e.SourceRegister {
				regs.put(e.Register, value)
			}
		case *expr.Bitwise:
			regs.put(e.DestRegister, bitwise(regs.get(e.SourceRegister, int(e.Len)), e.Mask, e.Xor))
		case *expr.Cmp:
			is = compare(e.Op, regs.get(e.Register, len(e.Data)), e.Data)
		case *expr.Range:
			is = inRange(regs.get(e.Register, len(e.FromData)), e.FromData, e.ToData)
			if e.Op == expr.CmpOpNeq {
				is = yes - is
			}
		case *expr.Lookup:
			var v *expr.Verdict
			is, v = w.lookup(e, regs)
			if e.IsDestRegSet && e.DestRegister != unix.NFT_REG_VERDICT {
				regs.put(e.DestRegister, nil)
			} else if v != nil {
				verdict = v
			}
		case *expr.Match:
			is = w.match(e)
		case *expr.Target:
			if e.Name == "REJECT" {
				verdict = &expr.Verdict{Kind: expr.VerdictDrop}
			}
		case *expr.Reject:
			verdict = &expr.Verdict{Kind: expr.VerdictDrop}
		case *expr.Verdict:
			verdict = e
		case *expr.Immediate:
			regs.put(e.Register, e.Data)
		case *expr.Limit, *expr.Connlimit, *expr.Quota:
			is = maybe
		case *expr.Fib:
			regs.put(e.Register, nil)
		case *expr.Rt:
			regs.put(e.Register, nil)
		case *expr.Socket:
			regs.put(e.Register, nil)
		case *expr.Exthdr:
			regs.put(e.DestRegister, nil)
		case *expr.Numgen:
			regs.put(e.Register, nil)
		case *expr.Hash:
			regs.put(e.DestRegister, nil)
		case *expr.Byteorder:
			regs.put(e.DestRegister, nil)
		case *expr.Counter, *expr.Log, *expr.Objref, *expr.Notrack, *expr.Dynset:
		default:
			is = maybe
		}
		if match = min(match, is); match == no {
			return no, nil, nil
		}
	}
	return match, verdict, nil
}

func (w *walk) meta(key expr.MetaKey) []byte {
	p := w.packet
	name := func(link string) []byte {
		if link == "" {
			return nil
		}
		return append([]byte(link), make([]byte, unix.IFNAMSIZ-len(link))...)
	}
	switch key {
	case expr.MetaKeyIIFNAME:
		if p.Hook == Output {
			return make([]byte, unix.IFNAMSIZ)
		}
		return name(p.In)
	case expr.MetaKeyOIFNAME:
		if p.Hook == Input {
			return make([]byte, unix.IFNAMSIZ)
		}
		return name(p.Out)
	case expr.MetaKeyL4PROTO:
		if p.Protocol != 0 {
			return []byte{p.Protocol}
		}
	case expr.MetaKeyNFPROTO:
		if p.To.Is4() {
			return []byte{unix.NFPROTO_IPV4}
		}
		return []byte{unix.NFPROTO_IPV6}
	}
	return nil
}

// payload loads addresses, protocol and port. Rules load each of them as a whole or, for
// prefixes of whole bytes, from its beginning.
func (w *walk) payload(e *expr.Payload) []byte {
	p := w.packet
	part := func(offset uint32, value []byte) []byte {
		if e.Offset == offset && int(e.Len) <= len(value) {
			return value[:e.Len]
		}
		return nil
	}
	first := func(values ...[]byte) []byte {
		for _, v := range values {
			if v != nil {
				return v
			}
		}
		return nil
	}
	var from, to, protocol, port []byte
	if p.From.IsValid() {
		from = p.From.AsSlice()
	}
	if p.To.IsValid() {
		to = p.To.AsSlice()
	}
	if p.Protocol != 0 {
		protocol = []byte{p.Protocol}
	}
	if p.Port != 0 {
		port = binary.BigEndian.AppendUint16(nil, p.Port)
	}
	switch {
	case e.Base == expr.PayloadBaseTransportHeader:
		return part(2, port)
	case e.Base == expr.PayloadBaseNetworkHeader && p.To.Is4():
		return first(part(12, from), part(16, to), part(9, protocol))
	case e.Base == expr.PayloadBaseNetworkHeader:
		return first(part(8, from), part(24, to), part(6, protocol))
	}
	return nil
}

func bitwise(value, mask, xor []byte) []byte {
	if value == nil || len(mask) != len(value) || len(xor) != len(value) {
		return nil
	}
	out := make([]byte, len(value))
	for i := range value {
		out[i] = value[i]&mask[i] ^ xor[i]
	}
	return out
}

func compare(op expr.CmpOp, value, with []byte) answer {
	if value == nil {
		return maybe
	}
	c := bytes.Compare(value, with)
	holds := map[expr.CmpOp]bool{
		expr.CmpOpEq: c == 0, expr.CmpOpNeq: c != 0,
		expr.CmpOpLt: c < 0, expr.CmpOpLte: c <= 0, expr.CmpOpGt: c > 0, expr.CmpOpGte: c >= 0,
	}[op]
	return sure(holds)
}

func inRange(value, from, to []byte) answer {
	if value == nil {
		return maybe
	}
	return sure(bytes.Compare(value, from) >= 0 && bytes.Compare(value, to) <= 0)
}

func sure(b bool) answer {
	if b {
		return yes
	}
	return no
}

// lookup looks a value up in an anonymous set of a rule. Named sets are not evaluated: programs
// may change them at any time, and they may be very large.
func (w *walk) lookup(e *expr.Lookup, regs registers) (answer, *expr.Verdict) {
	if !strings.HasPrefix(e.SetName, "__") {
		return maybe, nil
	}
	set, elements, err := w.source.set(w.table, e.SetName)
	if err != nil || set.Concatenation {
		return maybe, nil
	}
	value := regs.get(e.SourceRegister, int(set.KeyType.Bytes))
	if value == nil {
		// Any verdict of the map is possible; acceptance is the one that matters.
		for _, el := range elements {
			if el.VerdictData != nil && el.VerdictData.Kind != expr.VerdictDrop {
				return maybe, &expr.Verdict{Kind: expr.VerdictAccept}
			}
		}
		return maybe, nil
	}
	found := find(set, elements, value)
	if e.Invert {
		return sure(found == nil), nil
	}
	if found == nil {
		return no, nil
	}
	return yes, found.VerdictData
}

// find returns the element of a set for a value. A set of ranges is a list of their beginnings
// and ends.
func find(set *nftables.Set, elements []nftables.SetElement, value []byte) *nftables.SetElement {
	if !set.Interval {
		for i := range elements {
			if bytes.Equal(elements[i].Key, value) {
				return &elements[i]
			}
		}
		return nil
	}
	var last *nftables.SetElement
	for _, el := range slices.SortedFunc(slices.Values(elements), func(a, b nftables.SetElement) int {
		if c := bytes.Compare(a.Key, b.Key); c != 0 || a.IntervalEnd == b.IntervalEnd {
			return c
		}
		if a.IntervalEnd { // a range ends where the next begins
			return -1
		}
		return 1
	}) {
		if bytes.Compare(el.Key, value) > 0 {
			break
		}
		last = &el
	}
	if last == nil || last.IntervalEnd {
		return nil
	}
	return last
}

// match evaluates a condition of iptables.
func (w *walk) match(e *expr.Match) answer {
	switch e.Name {
	case "comment":
		return yes
	case "conntrack":
		const stateNew = 1 << 3 // XT_CONNTRACK_STATE_BIT(IP_CT_NEW)
		var flags, inverted, states uint16
		switch info := e.Info.(type) {
		case *xt.ConntrackMtinfo2:
			flags, inverted, states = info.MatchFlags, info.InvertFlags, info.StateMask
		case *xt.ConntrackMtinfo3:
			flags, inverted, states = info.MatchFlags, info.InvertFlags, info.StateMask
		default:
			return maybe
		}
		if flags&^uint16(xt.ConntrackStateAlias) != uint16(xt.ConntrackState) {
			return maybe
		}
		return sure((states&stateNew != 0) != (inverted&uint16(xt.ConntrackState) != 0))
	}
	return maybe
}
