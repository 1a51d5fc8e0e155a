package joining

import (
	"crypto/sha256"
	"net/netip"
)

// NodeAddresses is the range of [NodeAddress]: local addresses of IPv6 that nobody
// else has reason to choose.
var NodeAddresses = netip.MustParsePrefix("fd6b:6564::/32")

// NodeAddress stands for a node where software wants an address and kedge goes by the
// name: in the API server's URLs of kubelets, and therefore in the kubelets'
// certificates. It is made of the name alone, no packet carries it, and no interface
// has it.
func NodeAddress(name string) netip.Addr {
	sum := sha256.Sum256([]byte("kedge node\x00" + name))
	a := NodeAddresses.Addr().As16()
	copy(a[4:], sum[:])
	return netip.AddrFrom16(a)
}
