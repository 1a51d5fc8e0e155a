package nft

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// class says what happens to connections to a frontend. All frontends of the same
// class share one chain, so the number of chains does not depend on the number
// of services but on how much they differ. Only services with session affinity,
// and those that take turns, have chains of their own.
type class struct {
	do         action
	restricted bool   // only some sources are allowed
	cluster    uint32 // how many endpoints traffic to any node has
	local      uint32 // how many endpoints traffic that stays on this node has
	turn       uint32 // which counter of RoundRobin is used; 0 with other schedulers
	sticky     *stickyPort
}

// action is the kind of a class.
type action uint8

const (
	actReject        action = iota
	actDrop                 // Local policies, and no endpoint here
	actCluster              // to any node
	actLocal                // to this node
	actExternalLocal        // to this node, unless it comes from here
)

func (a action) String() string {
	return []string{"reject", "drop", "cluster", "local", "external-local"}[a]
}

// stickyPort is what the chains of a port with session affinity need to know.
type stickyPort struct {
	service        frontend // its cluster IP
	timeout        time.Duration
	cluster, local []netip.AddrPort
}

// kind says where the endpoints of a frontend are looked up.
type kind bool

const (
	byAddress  kind = false
	byNodePort kind = true
)

// chain names the chain of the class, as in "external-local.c3.l1-4": three
// endpoints anywhere, one of them here, IPv4.
func (c class) chain(f family, k kind) string {
	var b strings.Builder
	if k == byNodePort && c.sticky == nil && c.do != actReject && c.do != actDrop {
		b.WriteString("node-port-") // with session affinity it makes no difference
	}
	b.WriteString(c.do.String())
	if c.restricted {
		b.WriteString("-restricted")
	}
	if c.cluster > 0 {
		fmt.Fprintf(&b, ".c%d", c.cluster)
	}
	if c.local > 0 {
		fmt.Fprintf(&b, ".l%d", c.local)
	}
	switch {
	case c.sticky != nil:
		b.WriteString("." + c.sticky.name())
	case c.turn != 0:
		fmt.Fprintf(&b, ".t%d", c.turn)
	}
	return b.String() + "-" + f.suffix
}

// name is part of names of chains, in the characters that nft allows there.
func (s *stickyPort) name() string {
	ip := strings.ReplaceAll(s.service.addr.String(), ":", "_")
	return fmt.Sprintf("%s_%s_%d", ip, strings.ToLower(protocolName(s.service.protocol)), s.service.port)
}

// fingerprint tells chains of the same name apart that differ in their rules.
func (c class) fingerprint() string {
	if c.sticky == nil {
		return ""
	}
	return fmt.Sprint(c.sticky.timeout, c.sticky.cluster, c.sticky.local)
}

// fromInside is the class of connections from this node to addresses that bring
// others to this node's endpoints only: as if they had gone out and come back.
func (c class) fromInside() class {
	c.do, c.local, c.restricted = actCluster, 0, false
	return c
}

// withThoseItLeadsTo is the class and those to whose chains its chain leads.
func (c class) withThoseItLeadsTo() []class {
	if c.do == actExternalLocal && c.cluster > 0 {
		return []class{c, c.fromInside()}
	}
	return []class{c}
}

// classes says what happens at the port's cluster IP and at its other frontends.
func (p *ServicePort) classes(s Scheduler) (internal, external class) {
	if !p.Ready {
		return class{do: actReject}, class{do: actReject}
	}
	var common class
	switch {
	case p.StickyFor > 0:
		common.sticky = &stickyPort{service: p.clusterFrontend(), timeout: p.StickyFor, cluster: p.Cluster, local: p.Local}
	case s == RoundRobin:
		common.turn = p.turn()
	}
	internal, external = common, common
	if p.InternalLocal {
		internal.do, internal.local = actLocal, uint32(len(p.Local))
	} else {
		internal.do, internal.cluster = actCluster, uint32(len(p.Cluster))
	}
	external.do, external.cluster = actCluster, uint32(len(p.Cluster))
	if p.ExternalLocal {
		external.do, external.local = actExternalLocal, uint32(len(p.Local))
	}
	for _, c := range []*class{&internal, &external} {
		if c.cluster+c.local == 0 {
			*c = class{do: actDrop}
		}
	}
	return internal, external
}

// turns is how many counters there are for each number of endpoints.
const turns = 1 << 20

// turn numbers the port's counter. Two ports with the same number and as many
// endpoints take turns together, which does no harm.
func (p *ServicePort) turn() uint32 {
	h := fnv.New32a()
	h.Write(p.ClusterIP.AsSlice())
	h.Write([]byte{p.Protocol, byte(p.Port >> 8), byte(p.Port)})
	return 1 + h.Sum32()%turns
}

// pools are the groups of endpoints among which the chain of the class chooses.
func (c class) pools() []pool {
	var out []pool
	if c.cluster > 0 && c.do == actCluster {
		out = append(out, pool{count: c.cluster})
	}
	if c.local > 0 {
		out = append(out, pool{count: c.local, first: localPlaces})
	}
	return out
}

// pool is a group of endpoints: how many, and the place of the first.
type pool struct{ count, first uint32 }

func (p pool) endpoints(s *stickyPort) []netip.AddrPort {
	if p.first == localPlaces {
		return s.local
	}
	return s.cluster
}

// endpointChain names the chain that sends clients of a port with session affinity
// to one endpoint.
func (s *stickyPort) endpointChain(f family, e netip.AddrPort) string {
	return fmt.Sprintf("endpoint.%s_%s_%d-%s", s.name(), strings.ReplaceAll(e.Addr().String(), ":", "_"), e.Port(), f.suffix)
}

// every returns all endpoints of the port, each once.
func (s *stickyPort) every() []netip.AddrPort {
	out := slices.Concat(s.cluster, s.local)
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
