package nft

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/addresspool"
)

// setKind is one of the sets that the table has for each family.
type setKind uint8

const (
	kindServices      setKind = iota // address . protocol . port : verdict
	kindNodePorts                    // protocol . port : verdict
	kindEndpoints                    // address . protocol . port . place : endpoint . port
	kindNodeEndpoints                // protocol . port . place : endpoint . port
	kindStickyPlaces                 // cluster IP . protocol . port . place : verdict
	kindClients                      // client . cluster IP . protocol . port . endpoint
	kindClusterIPs                   // cluster IP
	kindItself                       // endpoint . endpoint, of this node's
	kindElsewhere                    // endpoint . protocol . port, of other nodes'
	kindSources                      // address . protocol . port . range of sources
	setKinds

	// kindChains is no set of the kernel's: its elements are the chains of classes,
	// by their names, with what tells their rules apart.
	kindChains
)

// maxClients is how many clients of services with session affinity a family can
// remember; those beyond it are served without.
const maxClients = 1 << 18

// localPlaces is where the places of local endpoints begin.
const localPlaces = 1 << 16

// setID is a set of a family.
type setID struct {
	kind setKind
	is6  bool
}

func (f family) set(k setKind) setID { return setID{k, f.proto == unix.NFPROTO_IPV6} }

func (id setID) family() family {
	if id.is6 {
		return v6
	}
	return v4
}

func (id setID) name() string { return id.describe().name }

// describe returns the set without elements.
//
// What a map yields is never part of another key: versions of the nft program that
// are in use abort when they list such a rule, and with them every program that
// looks at all rules of the machine.
func (id setID) describe() set {
	f := id.family()
	concat := nftables.MustConcatSetType
	addr, proto, port, number, verdict := f.addrType, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark, nftables.TypeVerdict
	var s set
	switch id.kind {
	case kindServices:
		s = set{name: "services", comment: "what happens at an address of a service", isMap: true,
			key: concat(addr, proto, port), data: verdict}
	case kindNodePorts:
		s = set{name: "node-ports", comment: "what happens at a node port", isMap: true,
			key: concat(proto, port), data: verdict}
	case kindEndpoints:
		s = set{name: "endpoints", comment: "numbered endpoints of services; from 0x10000 on those for local traffic", isMap: true,
			key: concat(addr, proto, port, number), data: concat(addr, port)}
	case kindNodeEndpoints:
		s = set{name: "node-port-endpoints", comment: "the same for node ports", isMap: true,
			key: concat(proto, port, number), data: concat(addr, port)}
	case kindStickyPlaces:
		s = set{name: "sticky-endpoints", comment: "the same for services with session affinity", isMap: true,
			key: concat(addr, proto, port, number), data: verdict}
	case kindClients:
		s = set{name: "clients", comment: "which endpoint of a service a client had", grows: maxClients,
			key: concat(addr, addr, proto, port, addr)}
	case kindClusterIPs:
		s = set{name: "cluster-ips", comment: "cluster IPs in use, and addresses of pools", key: addr}
	case kindItself:
		s = set{name: "endpoints-to-themselves", comment: "pods that may reach themselves through a service", key: concat(addr, addr)}
	case kindElsewhere:
		s = set{name: "endpoints-elsewhere", comment: "endpoints that are not on this node", key: concat(addr, proto, port)}
	case kindSources:
		s = set{name: "sources", comment: "who may use an address with source ranges", ranges: true,
			key: concat(addr, proto, port, addr)}
	}
	s.name += "-" + f.suffix
	return s
}

// hasVerdicts says whether the values of a map are chains.
func (k setKind) hasVerdicts() bool {
	return k == kindServices || k == kindNodePorts || k == kindStickyPlaces
}

// element is one of a set. Its key and value are as the kernel has them; the key of
// a range is its beginning followed by its end, and a verdict is the name of a chain.
type element struct {
	ref
	val string
}

// ref names an element.
type ref struct {
	set setID
	key string
}

// from is the element of a set that the kernel tells of.
func (id setID) from(e nftables.SetElement) element {
	out := element{ref{id, string(e.Key)}, string(e.Val)}
	switch {
	case id.kind == kindSources:
		out.key += string(e.KeyEnd)
	case id.kind.hasVerdicts():
		out.val = verdictChain(e.Val)
	}
	return out
}

// verdictChain reads the chain of a verdict as the kernel encodes it.
func verdictChain(b []byte) string {
	attrs, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return ""
	}
	for attrs.Next() {
		if attrs.Type() == unix.NFTA_VERDICT_CHAIN {
			return attrs.String()
		}
	}
	return ""
}

// kernel is the element as the library wants it.
func (e element) kernel() nftables.SetElement {
	switch {
	case e.set.kind == kindSources:
		half := len(e.key) / 2
		return nftables.SetElement{Key: []byte(e.key[:half]), KeyEnd: []byte(e.key[half:])}
	case e.set.kind.hasVerdicts():
		return nftables.SetElement{Key: []byte(e.key), VerdictData: verdictGoto(e.val)}
	}
	return nftables.SetElement{Key: []byte(e.key), Val: []byte(e.val)}
}

func destination(f frontend) string {
	key := slices.Concat(word(f.protocol), word(portBytes(f.port)...))
	if f.addr.IsValid() {
		key = slices.Concat(f.addr.AsSlice(), key)
	}
	return string(key)
}

func addrPort(a netip.AddrPort) string {
	return string(slices.Concat(a.Addr().AsSlice(), word(portBytes(a.Port())...)))
}

func number(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

// elements spells out what one port needs; holds says which of its frontends are
// its own. Chains that it uses are among them, and may be among those of others;
// what is in them is noted in chains.
func (p *ServicePort) elements(cfg ServiceConfig, chains map[string]chain, holds func(frontend) bool) []element {
	f, main := p.family(), p.clusterFrontend()
	if !holds(main) {
		return nil
	}
	var out []element
	add := func(k setKind, key, val string) { out = append(out, element{ref{f.set(k), key}, val}) }
	use := func(c class, k kind) string {
		for _, class := range c.withThoseItLeadsTo() {
			for _, ch := range cfg.classChains(f, class, k) {
				chains[ch.name] = ch
				add(kindChains, ch.name, class.fingerprint())
			}
		}
		return c.chain(f, k)
	}
	internal, external := p.classes(cfg.Scheduler)
	endpoints := func(set setKind, key string, c class) {
		if !p.Ready || c.sticky != nil {
			return
		}
		if c.cluster > 0 {
			for i, e := range p.Cluster {
				add(set, key+number(uint32(i)), addrPort(e))
			}
		}
		if c.local > 0 {
			for i, e := range p.Local {
				add(set, key+number(uint32(localPlaces+i)), addrPort(e))
			}
		}
	}
	add(kindClusterIPs, string(p.ClusterIP.AsSlice()), "")
	for _, a := range p.LoadBalancerIPs {
		if _, pooled := addresspool.In(cfg.Pools, a); pooled {
			add(kindClusterIPs, string(a.AsSlice()), "")
		}
	}
	for _, at := range p.frontends() {
		if !holds(at) {
			continue
		}
		key, c := destination(at), external
		switch {
		case at == main:
			c = internal
		case !at.addr.IsValid():
			add(kindNodePorts, key, use(c, byNodePort))
			endpoints(kindNodeEndpoints, key, c)
			continue
		case len(p.Sources) > 0 && slices.Contains(p.LoadBalancerIPs, at.addr):
			c.restricted = true
			for _, r := range outermost(p.Sources, f) {
				first, last := bounds(r)
				add(kindSources, key+string(first.AsSlice())+key+string(last.AsSlice()), "")
			}
		}
		add(kindServices, key, use(c, byAddress))
		endpoints(kindEndpoints, key, c)
	}
	if !p.Ready {
		return out
	}
	if sticky := p.sticky(); sticky != nil {
		service := destination(main)
		for i, e := range p.Cluster {
			add(kindStickyPlaces, service+number(uint32(i)), sticky.endpointChain(f, e))
		}
		for i, e := range p.Local {
			add(kindStickyPlaces, service+number(uint32(localPlaces+i)), sticky.endpointChain(f, e))
		}
		for _, e := range sticky.every() {
			ch := sticky.toEndpoint(f, e)
			chains[ch.name] = ch
			add(kindChains, ch.name, fmt.Sprint(sticky.timeout))
		}
	}
	for _, a := range p.Here {
		add(kindItself, string(a.AsSlice())+string(a.AsSlice()), "")
	}
	for _, e := range p.Cluster {
		if !slices.Contains(p.Here, e.Addr()) {
			add(kindElsewhere, destination(frontend{addr: e.Addr(), protocol: p.Protocol, port: e.Port()}), "")
		}
	}
	return out
}

// sticky is what the port's chains with session affinity need, or nil.
func (p *ServicePort) sticky() *stickyPort {
	internal, external := p.classes(Random)
	if internal.sticky != nil {
		return internal.sticky
	}
	return external.sticky
}

// outermost returns the ranges of a family without those inside of others: the
// kernel refuses ranges that overlap.
func outermost(ranges []netip.Prefix, f family) []netip.Prefix {
	var out []netip.Prefix
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	for _, r := range sorted {
		r = r.Masked()
		inside := slices.ContainsFunc(out, func(o netip.Prefix) bool { return o.Overlaps(r) })
		if familyOf(r.Addr()).proto == f.proto && !inside {
			out = append(out, r)
		}
	}
	return out
}

// bounds returns the first and the last address of a range.
func bounds(r netip.Prefix) (first, last netip.Addr) {
	first = r.Masked().Addr()
	b, mask := first.AsSlice(), maskBytes(r)
	for i := range b {
		b[i] |= ^mask[i]
	}
	last, _ = netip.AddrFromSlice(b)
	return first, last
}

func parseNumber(b string) uint32 { return binary.NativeEndian.Uint32([]byte(b)) }
