package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"kedge/internal/addresspool"
)

// ServiceConfig is what a node's services have in common.
type ServiceConfig struct {
	LinkPrefix    string         // how the names of this node's pods' host interfaces begin
	ForeignPrefix string         // how those of all nodes of this machine begin
	ClusterRanges []netip.Prefix // of all pods of the cluster
	ServiceRanges []netip.Prefix // of cluster IPs
	NodePortsOn   []netip.Prefix // addresses of the node at which node ports answer
	Own           []netip.Addr   // cluster IPs that the node answers itself: no rule touches them
	// Pools are addresses that only services have: no machine answers for them, so that
	// a port that no service has there is refused here, or it is by nobody.
	Pools     []addresspool.Pool
	Scheduler Scheduler
}

// Scheduler is how an endpoint is chosen for a new connection.
type Scheduler string

// The schedulers. RoundRobin counts for each service port; SourceHash sends a
// client to the same endpoint for as long as their number stays the same.
const (
	Random     Scheduler = "random"
	RoundRobin Scheduler = "round-robin"
	SourceHash Scheduler = "source-hash"
)

// Valid says whether s is one of the schedulers.
func (s Scheduler) Valid() bool { return s == Random || s == RoundRobin || s == SourceHash }

// Service is what the rules of one service in one address family should do.
type Service struct {
	Ports []ServicePort
}

// ServicePort is one port of a service in one address family. Its endpoints are
// decided on: those that are listed are used, in equal parts.
type ServicePort struct {
	Name      string // of the port, for people
	ClusterIP netip.Addr
	Protocol  uint8 // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	Port      uint16

	ExternalIPs     []netip.Addr // "externalIPs" of the service
	LoadBalancerIPs []netip.Addr
	NodePort        uint16         // 0 for none
	Sources         []netip.Prefix // that may use LoadBalancerIPs; none for all

	InternalLocal bool // traffic to the cluster IP goes to endpoints of this node only
	ExternalLocal bool // other traffic from outside goes to endpoints of this node only

	Ready   bool             // there are endpoints somewhere; otherwise connections are refused
	Cluster []netip.AddrPort // endpoints for traffic that may go to any node
	Local   []netip.AddrPort // endpoints for traffic that stays on this node
	Here    []netip.Addr     // which of the endpoints are on this node

	StickyFor time.Duration // how long a client keeps its endpoint after its last connection; 0 for not at all
}

// frontend is where a service port answers: an address, or a node port where the
// address is the zero Addr.
type frontend struct {
	addr     netip.Addr
	is6      bool // of node ports, which each family has for itself
	protocol uint8
	port     uint16
}

func (f frontend) String() string {
	proto := protocolName(f.protocol)
	if !f.addr.IsValid() {
		return fmt.Sprintf("node port %d/%s", f.port, proto)
	}
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.addr, f.port), proto)
}

func (p *ServicePort) family() family { return familyOf(p.ClusterIP) }

func (p *ServicePort) clusterFrontend() frontend {
	return frontend{addr: p.ClusterIP, is6: p.ClusterIP.Is6(), protocol: p.Protocol, port: p.Port}
}

func (p *ServicePort) nodeFrontend() frontend {
	return frontend{is6: p.ClusterIP.Is6(), protocol: p.Protocol, port: p.NodePort}
}

// frontends lists where the port answers, without repetition.
func (p *ServicePort) frontends() []frontend {
	list := []frontend{p.clusterFrontend()}
	for _, a := range slices.Concat(p.ExternalIPs, p.LoadBalancerIPs) {
		f := frontend{addr: a, is6: a.Is6(), protocol: p.Protocol, port: p.Port}
		if !slices.Contains(list, f) {
			list = append(list, f)
		}
	}
	if p.NodePort != 0 {
		list = append(list, p.nodeFrontend())
	}
	return list
}

// keepPlaces orders next so that what stays keeps its place in old: an endpoint
// that comes or goes then changes one or two elements and not all behind it.
func keepPlaces(old, next []netip.AddrPort) []netip.AddrPort {
	if len(old) == 0 {
		return next
	}
	places := make(map[netip.AddrPort]int, len(old))
	for i, a := range old {
		places[a] = i
	}
	placed := make([]netip.AddrPort, len(next))
	var rest []netip.AddrPort
	for _, a := range next {
		if i, ok := places[a]; ok && i < len(next) && !placed[i].IsValid() {
			placed[i] = a
		} else {
			rest = append(rest, a)
		}
	}
	for i := range placed {
		if !placed[i].IsValid() {
			placed[i], rest = rest[0], rest[1:]
		}
	}
	return placed
}
