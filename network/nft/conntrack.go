package nft

import (
	"bytes"
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The two directions of a tracked connection.
const (
	Original = 0 // from the client
	Reply    = 1 // from the server
)

// Keys of the connection's source address in a table of both families (NFT_CT_SRC_IP and
// NFT_CT_SRC_IP6, Linux 4.17), which the library lacks. The library's key has no length in
// such a table, and the nft program aborts on a concatenation with it.
const (
	ctSourceIP  = 19
	ctSourceIP6 = 21
)

// LoadConnectionSource loads the source address of one direction of the connection. It
// passes the library under the library's own key, with the right key in the upper bits of
// the direction; finishConntrack moves it to its place.
func LoadConnectionSource(f Family, direction, register uint32) Exprs {
	key := uint32(ctSourceIP)
	if f.Proto == unix.NFPROTO_IPV6 {
		key = ctSourceIP6
	}
	return Exprs{&expr.Ct{Key: expr.CtKeySRC, Direction: key<<8 | direction, Register: register}}
}

// finishConntrack corrects the conntrack expressions of an encoded rule, in place. The
// library writes the direction as four bytes; the kernel expects one byte and reads the
// first, which would always be the original direction.
func finishConntrack(message []byte) {
	const nameAttr, dataAttr = 1, 2            // NFTA_EXPR_NAME, NFTA_EXPR_DATA
	const keyAttr, directionAttr = 2, 3        // NFTA_CT_KEY, NFTA_CT_DIRECTION
	const header, wrongLen, rightLen = 4, 8, 5 // of an attribute; with four bytes, with one
	for expressions := range attributes(message[4:], unix.NFTA_RULE_EXPRESSIONS) {
		for expression := range attributes(expressions[header:], unix.NFTA_LIST_ELEM) {
			name := ""
			for a := range attributes(expression[header:], nameAttr) {
				name = string(TrimZero(a[header:]))
			}
			if name != "ct" {
				continue
			}
			for data := range attributes(expression[header:], dataAttr) {
				for direction := range attributes(data[header:], directionAttr) {
					if binary.NativeEndian.Uint16(direction) != wrongLen {
						continue // the library has been fixed
					}
					if key := direction[header+2]; key != 0 {
						for k := range attributes(data[header:], keyAttr) {
							binary.BigEndian.PutUint32(k[header:], uint32(key))
						}
					}
					direction[header] = direction[header+3]
					clear(direction[header+1:])
					binary.NativeEndian.PutUint16(direction, rightLen)
				}
			}
		}
	}
}

// attributes iterates over the attributes of one type, each with its header.
func attributes(b []byte, wanted uint16) func(yield func([]byte) bool) {
	const header, flags = 4, unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER
	return func(yield func([]byte) bool) {
		for len(b) >= header {
			n := int(binary.NativeEndian.Uint16(b))
			if n < header || n > len(b) {
				return
			}
			if binary.NativeEndian.Uint16(b[2:])&^flags == wanted && !yield(b[:n]) {
				return
			}
			b = b[min(len(b), (n+3)&^3):]
		}
	}
}

// DecodeAttributes returns the attributes of a kernel message by their type.
func DecodeAttributes(b []byte) (map[uint16][]byte, error) {
	d, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, err
	}
	out := map[uint16][]byte{}
	for d.Next() {
		out[d.Type()] = d.Bytes()
	}
	return out, d.Err()
}

// TrimZero removes the terminating zeros of a string of the kernel.
func TrimZero(b []byte) []byte { return bytes.TrimRight(b, "\x00") }
