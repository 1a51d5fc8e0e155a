package services

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strings"
	"time"

	"kedge/network/nft"
)

// class describes the treatment of connections to a frontend. All frontends of the same
// class share one chain, so the number of chains depends on how much services differ, not
// on their number. Only services with session affinity or round robin have chains of their
// own.
type class struct {
	action     action
	restricted bool   // only some sources are allowed
	cluster    uint32 // number of endpoints for traffic to any node
	local      uint32 // number of endpoints for traffic that stays on this node
	counter    uint32 // counter of RoundRobin; 0 with other schedulers
	sticky     *stickyPort
}

// action is the action of a class.
type action uint8

const (
	actReject        action = iota
	actDrop                 // traffic policy Local without an endpoint on this node
	actCluster              // to any node
	actLocal                // to this node
	actExternalLocal        // to this node, for connections from other machines
)

func (a action) String() string {
	return []string{"reject", "drop", "cluster", "local", "external-local"}[a]
}

// stickyPort is the part of a port with session affinity that its chains need.
type stickyPort struct {
	service        frontend // its cluster IP
	timeout        time.Duration
	cluster, local []netip.AddrPort
}

// kind is the kind of frontend for which endpoints are looked up.
type kind bool

const (
	byAddress  kind = false
	byNodePort kind = true
)

// chain returns the name of the chain of the class, as in "external-local.c3.l1-4": three
// endpoints anywhere, one of them on this node, IPv4.
func (c class) chain(f family, k kind) string {
	var b strings.Builder
	if k == byNodePort && c.sticky == nil && c.action != actReject && c.action != actDrop {
		b.WriteString("node-port-") // with session affinity it makes no difference
	}
	b.WriteString(c.action.String())
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
	case c.counter != 0:
		fmt.Fprintf(&b, ".t%d", c.counter)
	}
	return b.String() + "-" + f.Suffix
}

// name is the part of chain names that identifies the port, in the characters that nft
// allows there.
func (s *stickyPort) name() string {
	ip := strings.ReplaceAll(s.service.addr.String(), ":", "_")
	return fmt.Sprintf("%s_%s_%d", ip, strings.ToLower(nft.ProtocolName(s.service.protocol)), s.service.port)
}

// fingerprint distinguishes chains that have the same name and different rules.
func (c class) fingerprint() string {
	if c.sticky == nil {
		return ""
	}
	return fmt.Sprint(c.sticky.timeout, c.sticky.cluster, c.sticky.local)
}

// internalClass is the class for connections from this node to frontends with
// externalTrafficPolicy Local: they are treated as if they had left the node and come back.
func (c class) internalClass() class {
	c.action, c.local, c.restricted = actCluster, 0, false
	return c
}

// withTargets returns the class and the classes to whose chains its chain jumps.
func (c class) withTargets() []class {
	if c.action == actExternalLocal && c.cluster > 0 {
		return []class{c, c.internalClass()}
	}
	return []class{c}
}

// classes returns the class of the port's cluster IP and the class of its other frontends.
func (p *Port) classes(s Scheduler) (internal, external class) {
	if !p.Ready {
		return class{action: actReject}, class{action: actReject}
	}
	var common class
	switch {
	case p.StickyFor > 0:
		common.sticky = &stickyPort{service: p.clusterFrontend(), timeout: p.StickyFor, cluster: p.Cluster, local: p.Local}
	case s == RoundRobin:
		common.counter = p.counter()
	}
	internal, external = common, common
	if p.InternalLocal {
		internal.action, internal.local = actLocal, uint32(len(p.Local))
	} else {
		internal.action, internal.cluster = actCluster, uint32(len(p.Cluster))
	}
	external.action, external.cluster = actCluster, uint32(len(p.Cluster))
	if p.ExternalLocal {
		external.action, external.local = actExternalLocal, uint32(len(p.Local))
	}
	for _, c := range []*class{&internal, &external} {
		if c.cluster+c.local == 0 {
			*c = class{action: actDrop}
		}
	}
	return internal, external
}

// counters is the number of round robin counters for each number of endpoints.
const counters = 1 << 20

// counter returns the number of the port's counter. Two ports with the same counter and the
// same number of endpoints share their turns, which does no harm.
func (p *Port) counter() uint32 {
	h := fnv.New32a()
	h.Write(p.ClusterIP.AsSlice())
	h.Write([]byte{p.Protocol, byte(p.Port >> 8), byte(p.Port)})
	return 1 + h.Sum32()%counters
}

// pools returns the groups of endpoints from which the chain of the class chooses.
func (c class) pools() []pool {
	var out []pool
	if c.cluster > 0 && c.action == actCluster {
		out = append(out, pool{count: c.cluster})
	}
	if c.local > 0 {
		out = append(out, pool{count: c.local, first: localIndexes})
	}
	return out
}

// pool is a group of endpoints: their number and the index of the first.
type pool struct{ count, first uint32 }

func (p pool) endpoints(s *stickyPort) []netip.AddrPort {
	if p.first == localIndexes {
		return s.local
	}
	return s.cluster
}

// endpointChain returns the name of the chain that sends clients of a port with session
// affinity to one endpoint.
func (s *stickyPort) endpointChain(f family, e netip.AddrPort) string {
	return fmt.Sprintf("endpoint.%s_%s_%d-%s", s.name(), strings.ReplaceAll(e.Addr().String(), ":", "_"), e.Port(), f.Suffix)
}

// endpoints returns all endpoints of the port without duplicates.
func (s *stickyPort) endpoints() []netip.AddrPort {
	out := slices.Concat(s.cluster, s.local)
	slices.SortFunc(out, netip.AddrPort.Compare)
	return slices.Compact(out)
}
