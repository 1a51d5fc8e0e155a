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

// Registers. The kernel has four of 16 bytes (reg1 and following), which are
// the same memory as sixteen of 4 bytes (word0 and following). A concatenated
// key lies in neighbouring words.
const (
	reg1  = unix.NFT_REG_1
	reg2  = unix.NFT_REG_2
	word0 = unix.NFT_REG32_00
)

// family is one of the two address families as rules see it.
type family struct {
	proto    byte // NFPROTO_*
	suffix   string
	addrLen  uint32
	saddr    uint32 // offset in the network header
	daddr    uint32
	addrType nftables.SetDatatype
	loopback netip.Prefix
}

var (
	v4 = family{
		proto: unix.NFPROTO_IPV4, suffix: "4", addrLen: 4, saddr: 12, daddr: 16,
		addrType: nftables.TypeIPAddr, loopback: netip.MustParsePrefix("127.0.0.0/8"),
	}
	v6 = family{
		proto: unix.NFPROTO_IPV6, suffix: "6", addrLen: 16, saddr: 8, daddr: 24,
		addrType: nftables.TypeIP6Addr, loopback: netip.MustParsePrefix("::1/128"),
	}
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return v4
	}
	return v6
}

// words is how many 4-byte registers an address fills.
func (f family) words() uint32 { return f.addrLen / 4 }

// rule is a sequence of conditions and one action.
type rule []expr.Any

func (f family) is() rule {
	return rule{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{f.proto}},
	}
}

// linkStartsWith matches interfaces by the beginning of their names: the
// comparison covers only as many bytes as it is given.
func linkStartsWith(key expr.MetaKey, prefix string) rule {
	return rule{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte(prefix)},
	}
}

// linkIs matches one interface.
func linkIs(key expr.MetaKey, name string) rule {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return rule{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: padded},
	}
}

// tosBits are those of an IPv4 header's second byte that are not about congestion.
const tosBits = 0xfc

// setTOS writes the type of service of an IPv4 packet, as the two bytes with which its
// checksum can be mended.
func setTOS(tos byte) rule {
	return rule{
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2, DestRegister: reg1},
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 2, Mask: []byte{0xff, 0xff &^ tosBits}, Xor: []byte{0, tos}},
		&expr.Payload{
			OperationType: expr.PayloadWrite, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2, SourceRegister: reg1,
			CsumType: expr.CsumTypeInet, CsumOffset: 10,
		},
	}
}

// addrIn matches the address at an offset of the network header.
func (f family) addrIn(offset uint32, p netip.Prefix, op expr.CmpOp) rule {
	p = p.Masked()
	r := rule{f.load(offset, reg1)}
	if p.Bits() < p.Addr().BitLen() {
		r = append(r, &expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: f.addrLen,
			Mask: maskBytes(p), Xor: make([]byte, f.addrLen),
		})
	}
	return append(r, &expr.Cmp{Op: op, Register: reg1, Data: p.Addr().AsSlice()})
}

func (f family) load(offset, register uint32) expr.Any {
	return &expr.Payload{
		OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader,
		Offset: offset, Len: f.addrLen, DestRegister: register,
	}
}

func loadProtocol(register uint32) expr.Any {
	return &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: register}
}

// loadPort loads the destination port, which TCP, UDP and SCTP keep in the same place.
func loadPort(register uint32) expr.Any {
	return &expr.Payload{
		OperationType: expr.PayloadLoad, Base: expr.PayloadBaseTransportHeader,
		Offset: 2, Len: 2, DestRegister: register,
	}
}

// toThisNode matches packets whose destination is an address of the node.
func toThisNode() rule {
	return rule{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// setMark sets a bit of the packet's mark and leaves the others as they are.
func setMark(bit uint32) rule {
	return rule{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		&expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^bit), Xor: binaryutil.NativeEndian.PutUint32(bit),
		},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true},
	}
}

// marked matches packets whose mark has a bit set.
func marked(bit uint32) rule {
	return rule{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1},
		&expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bit), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: make([]byte, 4)},
	}
}

// sourceUnreachable matches packets whose sender would not be answered through
// the interface they came in by.
func sourceUnreachable() rule {
	return rule{
		&expr.Fib{Register: reg1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{0, 0, 0, 0}},
	}
}

func drop() rule  { return rule{&expr.Verdict{Kind: expr.VerdictDrop}} }
func leave() rule { return rule{&expr.Verdict{Kind: expr.VerdictReturn}} }

// masquerade gives the packet the address of the interface it leaves by. Ports
// are drawn at random: with the default, two connections made at the same
// moment may be given the same port, and one loses its first packet.
func masquerade() rule {
	return rule{&expr.Masq{FullyRandom: true}}
}

func jump(chain string) rule {
	return rule{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func join(parts ...rule) rule { return slices.Concat(parts...) }

func maskBytes(p netip.Prefix) []byte {
	mask := make([]byte, p.Addr().BitLen()/8)
	for i := range p.Bits() {
		mask[i/8] |= 0x80 >> (i % 8)
	}
	return mask
}

// word pads one part of a concatenated key to 4 bytes.
func word(b ...byte) []byte {
	return append(b, make([]byte, (4-len(b)%4)%4)...)
}

func portBytes(port uint16) []byte { return []byte{byte(port >> 8), byte(port)} }

func protocolName(p uint8) string {
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
