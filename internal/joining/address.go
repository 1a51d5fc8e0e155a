package joining

import (
	"crypto/sha256"
	"net/netip"
)

// NodeAddresses is the range of [NodeAddress]: unique local addresses of IPv6, which no other
// network is likely to use.
var NodeAddresses = netip.MustParsePrefix("fd6b:6564::/32")

// NodeAddress stands for a node where software needs an address and kedge goes by the name: in
// the API server's URLs of kubelets, and therefore in the kubelets' certificates. It depends
// on the name alone; no packet carries it, and no interface has it.
func NodeAddress(name string) netip.Addr {
	sum := sha256.Sum256([]byte("kedge node\x00" + name))
	a := NodeAddresses.Addr().As16()
	copy(a[4:], sum[:])
	return netip.AddrFrom16(a)
}
