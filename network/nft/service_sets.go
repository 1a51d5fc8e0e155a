package nft

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// setKind is one of the sets that the table has for each family.
type setKind uint8

const (
	kindServices      setKind = iota // address . protocol . port : class
	kindNodePorts                    // protocol . port : class
	kindBehindAddress                // address . protocol . port : cluster IP
	kindBehindNode                   // protocol . port : cluster IP
	kindPortBehind                   // protocol . port : port of the cluster IP
	kindEndpoints                    // cluster IP . protocol . port . place : endpoint . port
	kindClusterIPs                   // cluster IP
	kindExternalIPs                  // address
	kindItself                       // endpoint . endpoint, of this node's
	kindSources                      // address . protocol . port . range of sources
	kindStickyCluster                // cluster IP . protocol . port . endpoint : port
	kindStickyLocal                  // the same
	kindClients                      // client . cluster IP . protocol . port : endpoint
	kindClasses                      // class : verdict
	setKinds
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

// describe returns the set without elements. What a map yields is of one type
// wherever it becomes part of another key: the nft program, with which people and
// firewalls look at all rules, aborts on anything else.
func (id setID) describe() set {
	f := id.family()
	concat := nftables.MustConcatSetType
	addr, proto, port, number := f.addrType, nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeMark
	classType := nftables.TypeIFName
	var s set
	switch id.kind {
	case kindServices:
		s = set{name: "services", comment: "what happens at an address of a service", isMap: true,
			key: concat(addr, proto, port), data: classType}
	case kindNodePorts:
		s = set{name: "node-ports", comment: "what happens at a node port", isMap: true,
			key: concat(proto, port), data: classType}
	case kindBehindAddress:
		s = set{name: "behind-addresses", comment: "cluster IP behind an external address", isMap: true,
			key: concat(addr, proto, port), data: addr}
	case kindBehindNode:
		s = set{name: "behind-node-ports", comment: "cluster IP behind a node port", isMap: true,
			key: concat(proto, port), data: addr}
	case kindPortBehind:
		s = set{name: "ports-behind-node-ports", comment: "port of the cluster IP behind a node port", isMap: true,
			key: concat(proto, port), data: port}
	case kindEndpoints:
		s = set{name: "endpoints", comment: "numbered endpoints of services; from 0x10000 on those for local traffic", isMap: true,
			key: concat(addr, proto, port, number), data: concat(addr, port)}
	case kindClusterIPs:
		s = set{name: "cluster-ips", comment: "cluster IPs in use", key: addr}
	case kindExternalIPs:
		s = set{name: "external-ips", comment: "external addresses of services in use", key: addr}
	case kindItself:
		s = set{name: "endpoints-to-themselves", comment: "pods that may reach themselves through a service", key: concat(addr, addr)}
	case kindSources:
		s = set{name: "sources", comment: "who may use an address with source ranges", ranges: true,
			key: concat(addr, proto, port, addr)}
	case kindStickyCluster:
		s = set{name: "sticky", comment: "endpoints of services with session affinity", isMap: true,
			key: concat(addr, proto, port, addr), data: port}
	case kindStickyLocal:
		s = set{name: "sticky-local", comment: "local endpoints of services with session affinity", isMap: true,
			key: concat(addr, proto, port, addr), data: port}
	case kindClients:
		s = set{name: "clients", comment: "which endpoint a client had", isMap: true, grows: maxClients,
			key: concat(addr, addr, proto, port), data: addr}
	case kindClasses:
		s = set{name: "classes", comment: "the chain for each kind of service", isMap: true, key: classType, data: nftables.TypeVerdict}
	}
	s.name += "-" + f.suffix
	return s
}

// element is one of a set. Its key and value are as the kernel has them; that of
// a range is its beginning followed by its end, that of a class its chain.
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
	switch id.kind {
	case kindSources:
		out.key += string(e.KeyEnd)
	case kindClasses:
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
	switch e.set.kind {
	case kindSources:
		half := len(e.key) / 2
		return nftables.SetElement{Key: []byte(e.key[:half]), KeyEnd: []byte(e.key[half:])}
	case kindClasses:
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
// its own. Classes that it uses are among them, and may be among those of others;
// they are noted in classes.
func (p *ServicePort) elements(s Scheduler, classes map[string]class, holds func(frontend) bool) []element {
	f, main := p.family(), p.clusterFrontend()
	if !holds(main) {
		return nil
	}
	var out []element
	add := func(k setKind, key, val string) { out = append(out, element{ref{f.set(k), key}, val}) }
	internal, external, nodePort := p.classes(s)
	note := func(c class) string {
		key := c.key()
		classes[key] = c
		add(kindClasses, key, c.chain(f))
		return key
	}
	use := func(k setKind, key string, c class) {
		add(k, key, note(c))
		if c.isExternalLocal() && c.cluster > 0 {
			note(c.fromInside())
		}
	}
	service := destination(main)
	add(kindClusterIPs, string(p.ClusterIP.AsSlice()), "")
	use(kindServices, service, internal)
	for _, at := range p.frontends()[1:] {
		if !holds(at) {
			continue
		}
		key := destination(at)
		if !at.addr.IsValid() {
			use(kindNodePorts, key, nodePort)
			add(kindBehindNode, key, string(p.ClusterIP.AsSlice()))
			add(kindPortBehind, key, string(portBytes(p.Port)))
			continue
		}
		c := external
		if len(p.Sources) > 0 && slices.Contains(p.LoadBalancerIPs, at.addr) {
			c.do |= actRestricted
			for _, r := range outermost(p.Sources, f) {
				first, last := bounds(r)
				add(kindSources, key+string(first.AsSlice())+key+string(last.AsSlice()), "")
			}
		}
		use(kindServices, key, c)
		add(kindBehindAddress, key, string(p.ClusterIP.AsSlice()))
		add(kindExternalIPs, string(at.addr.AsSlice()), "")
	}
	if !p.Ready {
		return out
	}
	for i, e := range p.Cluster {
		add(kindEndpoints, service+number(uint32(i)), addrPort(e))
		if p.StickyFor > 0 {
			add(kindStickyCluster, service+string(e.Addr().AsSlice()), string(portBytes(e.Port())))
		}
	}
	for i, e := range p.Local {
		add(kindEndpoints, service+number(uint32(localPlaces+i)), addrPort(e))
		if p.StickyFor > 0 {
			add(kindStickyLocal, service+string(e.Addr().AsSlice()), string(portBytes(e.Port())))
		}
	}
	for _, a := range p.Here {
		add(kindItself, string(a.AsSlice())+string(a.AsSlice()), "")
	}
	return out
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
