// Package addresspool describes the pools of addresses for services of type LoadBalancer: it
// parses them and finds addresses in them.
//
// It allocates nothing: that is server/servicelb. It may be imported by main, server and
// network.
package addresspool

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// DefaultName is the name of the pool of ranges without a name.
const DefaultName = "default"

// LeasePrefix, before a node's name, is the name of the lease by which the node says that it
// can announce addresses. A node's user may write the lease of its own node only.
const LeasePrefix = "kedge-lb-"

// Range is a range of addresses of one family, both ends included.
type Range struct{ First, Last netip.Addr }

// Pool is a named set of ranges.
type Pool struct {
	Name   string
	Ranges []Range
}

// Parse reads pools: each item is [NAME=]RANGE, a range is a CIDR, two addresses with a
// dash between them, or one address. Items with the same name are one pool; pools keep the
// order in which they are named first.
//
// A network's own address and its broadcast address are addresses like others: a range that is
// routed to the cluster can be used in full, and the dash form is for a part of a network.
func Parse(items []string) ([]Pool, error) {
	var pools []Pool
	for _, item := range items {
		name, text, named := strings.Cut(item, "=")
		if !named {
			name, text = DefaultName, item
		}
		if name == "" || strings.ContainsAny(name, " /") {
			return nil, fmt.Errorf("invalid pool name %q", name)
		}
		r, err := parseRange(text)
		if err != nil {
			return nil, err
		}
		for _, p := range pools {
			for _, o := range p.Ranges {
				if r.First.Is4() == o.First.Is4() && r.First.Compare(o.Last) <= 0 && o.First.Compare(r.Last) <= 0 {
					return nil, fmt.Errorf("the ranges %s and %s overlap", o, r)
				}
			}
		}
		i := slices.IndexFunc(pools, func(p Pool) bool { return p.Name == name })
		if i < 0 {
			i = len(pools)
			pools = append(pools, Pool{Name: name})
		}
		pools[i].Ranges = append(pools[i].Ranges, r)
	}
	return pools, nil
}

func parseRange(text string) (Range, error) {
	wrong := fmt.Errorf("%q is not a range of addresses such as 192.168.1.240/28 or 192.168.1.240-192.168.1.250", text)
	if first, last, ok := strings.Cut(text, "-"); ok {
		a, err := netip.ParseAddr(strings.TrimSpace(first))
		b, err2 := netip.ParseAddr(strings.TrimSpace(last))
		if err != nil || err2 != nil || a.Is4() != b.Is4() || a.Zone() != "" || b.Zone() != "" {
			return Range{}, wrong
		}
		if b.Less(a) {
			return Range{}, fmt.Errorf("the range %q ends before it begins", text)
		}
		return Range{a, b}, nil
	}
	if p, err := netip.ParsePrefix(text); err == nil {
		p = p.Masked()
		return Range{p.Addr(), lastOf(p)}, nil
	}
	a, err := netip.ParseAddr(text)
	if err != nil || a.Zone() != "" {
		return Range{}, wrong
	}
	return Range{a, a}, nil
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b) // of 4 or 16 bytes
	return a
}

// String is the range as users write it.
func (r Range) String() string {
	if r.First == r.Last {
		return r.First.String()
	}
	return r.First.String() + "-" + r.Last.String()
}

// Contains reports whether the range has an address.
func (r Range) Contains(a netip.Addr) bool {
	return a.Is4() == r.First.Is4() && r.First.Compare(a) <= 0 && a.Compare(r.Last) <= 0
}

// Contains reports whether one of the pool's ranges has an address.
func (p Pool) Contains(a netip.Addr) bool {
	return slices.ContainsFunc(p.Ranges, func(r Range) bool { return r.Contains(a) })
}

// Find returns the first address of a family that ok accepts, or the zero Addr. It looks
// at no more than [MaxLook] addresses of a range: no cluster has that many services.
func (p Pool) Find(ipv4 bool, ok func(netip.Addr) bool) netip.Addr {
	for _, r := range p.Ranges {
		if r.First.Is4() != ipv4 {
			continue
		}
		a := r.First
		for range MaxLook {
			if ok(a) {
				return a
			}
			if a == r.Last {
				break
			}
			a = a.Next()
		}
	}
	return netip.Addr{}
}

// MaxLook bounds the search of a range: a /64 has more addresses than can be tried.
const MaxLook = 1 << 16

// In returns the pool that has an address.
func In(pools []Pool, a netip.Addr) (Pool, bool) {
	for _, p := range pools {
		if p.Contains(a) {
			return p, true
		}
	}
	return Pool{}, false
}
