package ipam

import (
	"encoding/binary"
	"hash/fnv"
	"math/big"
	"net/netip"
)

// maxPool is the maximum number of addresses of a range that are used. An IPv6 range has
// more addresses than the list of freed addresses could hold, and no node runs more pods.
const maxPool = 1 << 14

// pool is a range of addresses. It defines their order, and does not know their owners.
type pool struct {
	prefix    netip.Prefix
	first     netip.Addr // of the usable ones
	size      int        // number of usable addresses
	next      int        // index at which the search for an unused address continues
	exhausted bool       // every address has been used; this is permanent
}

// Gateway returns the node's own address in a range: the first one after the network
// address. It is never assigned to a pod.
func Gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// newPool skips the network address, the gateway and, for IPv4, the broadcast address. seed
// determines the first address to be assigned.
func newPool(p netip.Prefix, seed string) *pool {
	p = p.Masked()
	hostBits := p.Addr().BitLen() - p.Bits()
	size := maxPool
	if hostBits < 15 {
		size = 1<<hostBits - 2 // without network address and gateway
		if p.Addr().Is4() {
			size-- // nor broadcast
		}
	}
	size = min(max(size, 0), maxPool)
	pl := &pool{prefix: p, first: Gateway(p).Next(), size: size}
	if size > 0 {
		h := fnv.New64a()
		h.Write([]byte(seed))
		h.Write([]byte(p.String()))
		pl.next = int(h.Sum64() % uint64(size))
	}
	return pl
}

func (p *pool) addr(i int) netip.Addr { return addOffset(p.first, i) }

// contains reports whether addr is an address of the pool.
func (p *pool) contains(addr netip.Addr) bool {
	return p.prefix.Contains(addr) && !addr.Less(p.first) && addr.Less(p.addr(p.size))
}

// fresh returns an address that was never used, starting where the last search ended; busy
// reports the used ones. An address that was used once never counts as fresh again.
func (p *pool) fresh(busy func(netip.Addr) bool) (netip.Addr, bool) {
	if p.exhausted {
		return netip.Addr{}, false
	}
	for range p.size {
		a := p.addr(p.next)
		p.next = (p.next + 1) % p.size
		if !busy(a) {
			return a, true
		}
	}
	p.exhausted = true
	return netip.Addr{}, false
}

func addOffset(a netip.Addr, n int) netip.Addr {
	if a.Is4() {
		b := a.As4()
		binary.BigEndian.PutUint32(b[:], binary.BigEndian.Uint32(b[:])+uint32(n))
		return netip.AddrFrom4(b)
	}
	b := a.As16()
	sum := new(big.Int).SetBytes(b[:])
	sum.Add(sum, big.NewInt(int64(n)))
	sum.FillBytes(b[:])
	return netip.AddrFrom16(b)
}
