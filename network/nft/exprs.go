package nft

import (
	"net/netip"
	"slices"
	"strconv"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Registers. The kernel has four registers of 16 bytes (Reg1 and following), which
// are the same memory as sixteen of 4 bytes (Word0 and following). A concatenated
// key lies in neighbouring words.
const (
	Reg1  = unix.NFT_REG_1
	Reg2  = unix.NFT_REG_2
	Word0 = unix.NFT_REG32_00
)

// Family is an address family as rules see it: V4 or V6.
type Family struct {
	Proto             byte // NFPROTO_*
	Suffix            string
	AddrLen           uint32
	SourceOffset      uint32 // offset in the network header
	DestinationOffset uint32
	AddrType          nftables.SetDatatype
	Loopback          netip.Prefix
}

var (
	V4 = Family{
		Proto: unix.NFPROTO_IPV4, Suffix: "4", AddrLen: 4, SourceOffset: 12, DestinationOffset: 16,
		AddrType: nftables.TypeIPAddr, Loopback: netip.MustParsePrefix("127.0.0.0/8"),
	}
	V6 = Family{
		Proto: unix.NFPROTO_IPV6, Suffix: "6", AddrLen: 16, SourceOffset: 8, DestinationOffset: 24,
		AddrType: nftables.TypeIP6Addr, Loopback: netip.MustParsePrefix("::1/128"),
	}
)

// FamilyOf returns the family of an address.
func FamilyOf(a netip.Addr) Family {
	if a.Is4() {
		return V4
	}
	return V6
}

// Words is the number of 4-byte registers that an address fills.
func (f Family) Words() uint32 { return f.AddrLen / 4 }

// Exprs are the expressions of a rule or of a part of it: conditions and an action.
type Exprs []expr.Any

// Is matches packets of the family.
func (f Family) Is() Exprs {
	return Exprs{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: Reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: Reg1, Data: []byte{f.Proto}},
	}
}

// LinkStartsWith matches interfaces by a prefix of their names: the kernel compares only as
// many bytes as it is given.
func LinkStartsWith(key expr.MetaKey, prefix string) Exprs {
	return Exprs{
		&expr.Meta{Key: key, Register: Reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: Reg1, Data: []byte(prefix)},
	}
}

// AddrIn compares the address at an offset of the network header with a range.
func (f Family) AddrIn(offset uint32, p netip.Prefix, op expr.CmpOp) Exprs {
	p = p.Masked()
	r := Exprs{f.LoadAddr(offset, Reg1)}
	if p.Bits() < p.Addr().BitLen() {
		r = append(r, &expr.Bitwise{
			SourceRegister: Reg1, DestRegister: Reg1, Len: f.AddrLen,
			Mask: MaskBytes(p), Xor: make([]byte, f.AddrLen),
		})
	}
	return append(r, &expr.Cmp{Op: op, Register: Reg1, Data: p.Addr().AsSlice()})
}

// LoadAddr loads the address at an offset of the network header.
func (f Family) LoadAddr(offset, register uint32) expr.Any {
	return &expr.Payload{
		OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader,
		Offset: offset, Len: f.AddrLen, DestRegister: register,
	}
}

// LoadProtocol loads the transport protocol.
func LoadProtocol(register uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}
}

// LoadPort loads the destination port, which TCP, UDP and SCTP keep in the same place.
func LoadPort(register uint32) expr.Any {
	return &expr.Payload{
		OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader,
		Offset: 2, Len: 2, DestRegister: register,
	}
}

// ToThisNode matches packets whose destination is an address of the node.
func ToThisNode() Exprs {
	return Exprs{
		&expr.Fib{Register: Reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: Reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// Accept ends the evaluation of the hook for the packet.
func Accept() Exprs { return Exprs{&expr.Verdict{Kind: expr.VerdictAccept}} }

// Drop drops the packet.
func Drop() Exprs { return Exprs{&expr.Verdict{Kind: expr.VerdictDrop}} }

// Return goes back to the chain that jumped here.
func Return() Exprs { return Exprs{&expr.Verdict{Kind: expr.VerdictReturn}} }

// Masquerade gives the packet the address of the interface it leaves by. Ports
// are drawn at random: with the default, two connections made at the same
// moment may be given the same port, and one loses its first packet.
func Masquerade() Exprs {
	return Exprs{&expr.Masq{FullyRandom: true}}
}

// Jump goes on in another chain and comes back at its end.
func Jump(chain string) Exprs {
	return Exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

// Join concatenates parts of a rule.
func Join(parts ...Exprs) Exprs { return slices.Concat(parts...) }

// MaskBytes returns the network mask of a range.
func MaskBytes(p netip.Prefix) []byte {
	mask := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return mask
}

// Word pads one part of a concatenated key to 4 bytes.
func Word(b ...byte) []byte {
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

// PortBytes returns a port in network byte order.
func PortBytes(port uint16) []byte { return []byte{byte(port >> 8), byte(port)} }

// ProtocolName returns the name of a transport protocol as the API spells it.
func ProtocolName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "TCP"
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	}
	return strconv.Itoa(int(p))
}

// PairIn matches packets whose pair of source and destination is in a set.
func (f Family) PairIn(s Set) Exprs {
	second := uint32(Reg2)
	if f.AddrLen == 4 {
		second = Word0 + 1
	}
	return Exprs{
		f.LoadAddr(f.SourceOffset, Reg1),
		f.LoadAddr(f.DestinationOffset, second),
		&expr.Lookup{SourceRegister: Reg1, SetName: s.Name},
	}
}

// InState matches packets in one of the states of connection tracking.
func InState(bits uint32) Exprs {
	states := binaryutil.NativeEndian.PutUint32(bits)
	none := make([]byte, len(states))
	return Exprs{
		&expr.Ct{Key: expr.CtKeySTATE, Register: Reg1},
		&expr.Bitwise{SourceRegister: Reg1, DestRegister: Reg1, Len: uint32(len(states)), Mask: states, Xor: none},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: Reg1, Data: none},
	}
}
