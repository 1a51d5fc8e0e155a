package services

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"kedge/internal/addresspool"
	"kedge/network/nft"
)

// setKind is one of the sets that the table has for each family.
type setKind uint8

const (
	kindServices        setKind = iota // address . protocol . port : verdict
	kindNodePorts                      // protocol . port : verdict
	kindEndpoints                      // address . protocol . port . place : endpoint . port
	kindNodeEndpoints                  // protocol . port . place : endpoint . port
	kindStickyEndpoints                // cluster IP . protocol . port . place : verdict
	kindClients                        // client . cluster IP . protocol . port . endpoint
	kindClusterIPs                     // cluster IP
	kindHairpin                        // endpoint . endpoint, of this node's
	kindRemote                         // endpoint . protocol . port, of other nodes'
	kindSources                        // address . protocol . port . range of sources
	setKinds

	// kindChains is not a set of the kernel: its elements are the names of the chains of
	// classes, with the fingerprints of their rules as values.
	kindChains
)

// maxClients is the number of clients of services with session affinity that are remembered
// for each family; further clients are served without affinity.
const maxClients = 1 << 18

// localIndexes is the first index of local endpoints.
const localIndexes = 1 << 16

// setID identifies a set: its kind and family.
type setID struct {
	kind setKind
	is6  bool
}

func (f family) set(k setKind) setID { return setID{k, f.Proto == unix.NFPROTO_IPV6} }

func (id setID) family() family {
	if id.is6 {
		return v6
	}
	return v4
}

func (id setID) name() string { return id.describe().Name }

// describe returns the set without its elements.
//
// The value of a map is never part of another key: versions of the nft program that are in
// use abort when they list such a rule, and so do programs that call nft to list all rules
// of the machine.
func (id setID) describe() nft.Set {
	f := id.family()
	concat := nftables.MustConcatSetType
	addr, proto, port, number, verdict := f.AddrType, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark, nftables.TypeVerdict
	var s nft.Set
	switch id.kind {
	case kindServices:
		s = nft.Set{Name: "services", Comment: "chains of service addresses", IsMap: true,
			Key: concat(addr, proto, port), Data: verdict}
	case kindNodePorts:
		s = nft.Set{Name: "node-ports", Comment: "chains of node ports", IsMap: true,
			Key: concat(proto, port), Data: verdict}
	case kindEndpoints:
		s = nft.Set{Name: "endpoints", Comment: "numbered endpoints of services; from 0x10000 on for local traffic", IsMap: true,
			Key: concat(addr, proto, port, number), Data: concat(addr, port)}
	case kindNodeEndpoints:
		s = nft.Set{Name: "node-port-endpoints", Comment: "the same for node ports", IsMap: true,
			Key: concat(proto, port, number), Data: concat(addr, port)}
	case kindStickyEndpoints:
		s = nft.Set{Name: "sticky-endpoints", Comment: "the same for services with session affinity", IsMap: true,
			Key: concat(addr, proto, port, number), Data: verdict}
	case kindClients:
		s = nft.Set{Name: "clients", Comment: "endpoints of clients with session affinity", DynamicSize: maxClients,
			Key: concat(addr, addr, proto, port, addr)}
	case kindClusterIPs:
		s = nft.Set{Name: "cluster-ips", Comment: "cluster IPs in use, and addresses of pools", Key: addr}
	case kindHairpin:
		s = nft.Set{Name: "endpoints-to-themselves", Comment: "pods that may reach themselves through a service", Key: concat(addr, addr)}
	case kindRemote:
		s = nft.Set{Name: "endpoints-elsewhere", Comment: "endpoints that are not on this node", Key: concat(addr, proto, port)}
	case kindSources:
		s = nft.Set{Name: "sources", Comment: "allowed sources of addresses with source ranges", Ranges: true,
			Key: concat(addr, proto, port, addr)}
	}
	s.Name += "-" + f.Suffix
	return s
}

// hasVerdicts reports whether the values of a map are chains.
func (k setKind) hasVerdicts() bool {
	return k == kindServices || k == kindNodePorts || k == kindStickyEndpoints
}

// element is an element of a set. Key and value are in the kernel's form; the key of a
// range is its first address followed by its last, and a verdict is the name of a chain.
type element struct {
	ref
	val string
}

// ref identifies an element.
type ref struct {
	set setID
	key string
}

// from converts an element that the kernel returned.
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

// verdictChain decodes the chain of a verdict in the kernel's form.
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

// kernel converts the element to the library's type.
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
	key := slices.Concat(nft.Word(f.protocol), nft.Word(nft.PortBytes(f.port)...))
	if f.addr.IsValid() {
		key = slices.Concat(f.addr.AsSlice(), key)
	}
	return string(key)
}

func addrPort(a netip.AddrPort) string {
	return string(slices.Concat(a.Addr().AsSlice(), nft.Word(nft.PortBytes(a.Port())...)))
}

func number(n uint32) string { return string(binary.NativeEndian.AppendUint32(nil, n)) }

// elements returns the elements that one port needs; holds reports whether a frontend
// belongs to the port's service. The chains that it uses are among the elements, and may be
// shared with other ports; their rules are stored in chains.
func (p *Port) elements(cfg Config, chains map[string]nft.Chain, holds func(frontend) bool) []element {
	main := p.clusterFrontend()
	if !holds(main) {
		return nil
	}
	l := &portElements{port: p, cfg: cfg, family: p.family(), chains: chains}
	l.add(kindClusterIPs, string(p.ClusterIP.AsSlice()), "")
	for _, a := range p.LoadBalancerIPs {
		if _, pooled := addresspool.In(cfg.Pools, a); pooled {
			l.add(kindClusterIPs, string(a.AsSlice()), "")
		}
	}
	internal, external := p.classes(cfg.Scheduler)
	for _, at := range p.frontends() {
		switch {
		case !holds(at):
		case at == main:
			l.addFrontend(at, internal)
		default:
			l.addFrontend(at, external)
		}
	}
	if !p.Ready {
		return l.out
	}
	if sticky := p.sticky(); sticky != nil {
		l.addAffinity(destination(main), sticky)
	}
	for _, a := range p.OnNode {
		l.add(kindHairpin, string(a.AsSlice())+string(a.AsSlice()), "")
	}
	for _, e := range p.Cluster {
		if !slices.Contains(p.OnNode, e.Addr()) {
			l.add(kindRemote, destination(frontend{addr: e.Addr(), protocol: p.Protocol, port: e.Port()}), "")
		}
	}
	return l.out
}

// portElements collects the elements of a port.
type portElements struct {
	port   *Port
	cfg    Config
	family family
	chains map[string]nft.Chain // rules of the chains among the elements
	out    []element
}

func (l *portElements) add(k setKind, key, val string) {
	l.out = append(l.out, element{ref{l.family.set(k), key}, val})
}

// use adds the chains of a class, and returns the name of the chain to enter.
func (l *portElements) use(c class, k kind) string {
	for _, class := range c.withTargets() {
		for _, ch := range l.cfg.classChains(l.family, class, k) {
			l.chains[ch.Name] = ch
			l.add(kindChains, ch.Name, class.fingerprint())
		}
	}
	return c.chain(l.family, k)
}

// addFrontend adds an address or node port with its class, its numbered endpoints and its allowed sources.
func (l *portElements) addFrontend(at frontend, c class) {
	key := destination(at)
	if !at.addr.IsValid() {
		l.add(kindNodePorts, key, l.use(c, byNodePort))
		l.addEndpoints(kindNodeEndpoints, key, c)
		return
	}
	if at != l.port.clusterFrontend() && len(l.port.Sources) > 0 && slices.Contains(l.port.LoadBalancerIPs, at.addr) {
		c.restricted = true
		for _, r := range outermost(l.port.Sources, l.family) {
			first, last := bounds(r)
			l.add(kindSources, key+string(first.AsSlice())+key+string(last.AsSlice()), "")
		}
	}
	l.add(kindServices, key, l.use(c, byAddress))
	l.addEndpoints(kindEndpoints, key, c)
}

// addEndpoints adds the numbered endpoints of a frontend without session affinity.
func (l *portElements) addEndpoints(set setKind, key string, c class) {
	if !l.port.Ready || c.sticky != nil {
		return
	}
	if c.cluster > 0 {
		for i, e := range l.port.Cluster {
			l.add(set, key+number(uint32(i)), addrPort(e))
		}
	}
	if c.local > 0 {
		for i, e := range l.port.Local {
			l.add(set, key+number(uint32(localIndexes+i)), addrPort(e))
		}
	}
}

// addAffinity adds the endpoints of a service with session affinity, each with a chain of its own.
func (l *portElements) addAffinity(service string, sticky *stickyPort) {
	for i, e := range l.port.Cluster {
		l.add(kindStickyEndpoints, service+number(uint32(i)), sticky.endpointChain(l.family, e))
	}
	for i, e := range l.port.Local {
		l.add(kindStickyEndpoints, service+number(uint32(localIndexes+i)), sticky.endpointChain(l.family, e))
	}
	for _, e := range sticky.endpoints() {
		ch := sticky.toEndpoint(l.family, e)
		l.chains[ch.Name] = ch
		l.add(kindChains, ch.Name, fmt.Sprint(sticky.timeout))
	}
}

// sticky returns the data for session affinity, or nil.
func (p *Port) sticky() *stickyPort {
	internal, external := p.classes(Random)
	if internal.sticky != nil {
		return internal.sticky
	}
	return external.sticky
}

// outermost returns the ranges of a family that are not inside another range: the kernel
// refuses overlapping ranges.
func outermost(ranges []netip.Prefix, f family) []netip.Prefix {
	var out []netip.Prefix
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b netip.Prefix) int { return a.Bits() - b.Bits() })
	for _, r := range sorted {
		r = r.Masked()
		inside := slices.ContainsFunc(out, func(o netip.Prefix) bool { return o.Overlaps(r) })
		if familyOf(r.Addr()).Proto == f.Proto && !inside {
			out = append(out, r)
		}
	}
	return out
}

// bounds returns the first and the last address of a range.
func bounds(r netip.Prefix) (first, last netip.Addr) {
	first = r.Masked().Addr()
	b, mask := first.AsSlice(), nft.MaskBytes(r)
	for i := range b {
		b[i] |= ^mask[i]
	}
	last, _ = netip.AddrFromSlice(b)
	return first, last
}

func parseNumber(b string) uint32 { return binary.NativeEndian.Uint32([]byte(b)) }
