package nft

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The two directions of a tracked connection.
const (
	original = 0 // as the opener sees it
	reply    = 1 // as the target sees it
)

// Keys of the connection's source address in a table of both families
// (NFT_CT_SRC_IP and NFT_CT_SRC_IP6, Linux 4.17), which the library lacks. Its own
// key has no length in such a table, and the nft program aborts on a
// concatenation with it.
const (
	ctSourceIP  = 19
	ctSourceIP6 = 21
)

// sourceAddr loads the source address of a connection's direction. It goes
// through the library as its own key, with the right one beside the direction:
// finishConntrack puts it into its place.
func sourceAddr(f family, direction, register uint32) rule {
	key := uint32(ctSourceIP)
	if f.proto == unix.NFPROTO_IPV6 {
		key = ctSourceIP6
	}
	return rule{&expr.Ct{Key: expr.CtKeySRC, Direction: key<<8 | direction, Register: register}}
}

// finishConntrack mends the conntrack expressions of an encoded rule, in place.
// The library writes their direction as four bytes, of which the kernel, which
// wants one, reads the first: it would always be the original direction.
func finishConntrack(message []byte) {
	const nameAttr, dataAttr = 1, 2            // NFTA_EXPR_NAME, NFTA_EXPR_DATA
	const keyAttr, directionAttr = 2, 3        // NFTA_CT_KEY, NFTA_CT_DIRECTION
	const header, wrongLen, rightLen = 4, 8, 5 // of an attribute; with four bytes, with one
	for expressions := range attributes(message[4:], unix.NFTA_RULE_EXPRESSIONS) {
		for expression := range attributes(expressions[header:], unix.NFTA_LIST_ELEM) {
			name := ""
			for a := range attributes(expression[header:], nameAttr) {
				name = string(trimZero(a[header:]))
			}
			if name != "ct" {
				continue
			}
			for data := range attributes(expression[header:], dataAttr) {
				for direction := range attributes(data[header:], directionAttr) {
					if binary.NativeEndian.Uint16(direction) != wrongLen {
						continue // the library has been mended
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
