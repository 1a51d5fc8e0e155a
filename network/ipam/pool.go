package ipam

import (
	"encoding/binary"
	"hash/fnv"
	"math/big"
	"net/netip"
)

// maxPool bounds how many addresses of a range are ever used. An IPv6 range has
// more than any memory of freed addresses could hold, and no node runs more pods.
const maxPool = 1 << 14

// pool is one range of addresses. It knows their order, not who has them.
type pool struct {
	prefix netip.Prefix
	first  netip.Addr // of the usable ones
	size   int        // number of usable addresses
	next   int        // where the search for a fresh address goes on
	dry    bool       // no fresh address is left, nor will there be one again
}

// Gateway returns the address of a range that is the node's own: the first one
// after the network address. It is never handed out.
func Gateway(p netip.Prefix) netip.Addr { return p.Masked().Addr().Next() }

// newPool skips the network address, the gateway and, for IPv4, the broadcast
// address. seed chooses where fresh addresses begin.
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

// contains says whether addr is one that the pool may hand out.
func (p *pool) contains(addr netip.Addr) bool {
	return p.prefix.Contains(addr) && !addr.Less(p.first) && addr.Less(p.addr(p.size))
}

// fresh finds an address that was never used, going on from where the last
// search ended; busy says which were. An address once used never counts as
// fresh again.
func (p *pool) fresh(busy func(netip.Addr) bool) (netip.Addr, bool) {
	if p.dry {
		return netip.Addr{}, false
	}
	for range p.size {
		a := p.addr(p.next)
		p.next = (p.next + 1) % p.size
		if !busy(a) {
			return a, true
		}
	}
	p.dry = true
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
