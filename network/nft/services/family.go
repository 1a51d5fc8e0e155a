package services

import (
	"net/netip"

	"kedge/network/nft"
)

// family adds the sets of services to an address family.
type family struct{ nft.Family }

var v4, v6 = family{nft.V4}, family{nft.V6}

func familyOf(a netip.Addr) family { return family{nft.FamilyOf(a)} }
