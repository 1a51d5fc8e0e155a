package services

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"kedge/internal/addresspool"
	"kedge/network/nft"
)

// Config is the configuration that all services of a node share.
type Config struct {
	LinkPrefix    string         // prefix of the names of the host interfaces of this node's pods
	ForeignPrefix string         // prefix of the same names for all nodes on this machine
	ClusterRanges []netip.Prefix // of all pods of the cluster
	ServiceRanges []netip.Prefix // of cluster IPs
	NodePortsOn   []netip.Prefix // addresses of the node at which node ports answer
	Own           []netip.Addr   // cluster IPs that processes of the node serve: no rule touches them
	// Pools are the address pools of load balancers. No machine answers for these
	// addresses, so connections to ports without a service must be refused by these rules.
	Pools     []addresspool.Pool
	Scheduler Scheduler
}

// Scheduler is the algorithm that chooses the endpoint of a new connection.
type Scheduler string

// The schedulers. RoundRobin has a counter for each service port; SourceHash sends a client
// to the same endpoint as long as the number of endpoints stays the same.
const (
	Random     Scheduler = "random"
	RoundRobin Scheduler = "round-robin"
	SourceHash Scheduler = "source-hash"
)

// Valid reports whether s is one of the schedulers.
func (s Scheduler) Valid() bool { return s == Random || s == RoundRobin || s == SourceHash }

// Service is a service as the rules need it.
type Service struct {
	Ports []Port
}

// Port is one port of a service in one address family. Its endpoints have been selected
// already: all that are listed are used, with equal weight.
type Port struct {
	Name      string // of the port, for readers
	ClusterIP netip.Addr
	Protocol  uint8 // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	Port      uint16

	ExternalIPs     []netip.Addr // "externalIPs" of the service
	LoadBalancerIPs []netip.Addr
	NodePort        uint16         // 0 for none
	Sources         []netip.Prefix // clients that may use LoadBalancerIPs; empty for all

	InternalLocal bool // traffic to the cluster IP goes to endpoints of this node only
	ExternalLocal bool // other traffic from outside goes to endpoints of this node only

	Ready   bool             // there are endpoints somewhere; otherwise connections are refused
	Cluster []netip.AddrPort // endpoints for traffic that may go to any node
	Local   []netip.AddrPort // endpoints for traffic that stays on this node
	OnNode  []netip.Addr     // the endpoints on this node

	StickyFor time.Duration // how long a client keeps its endpoint after its last connection; 0 for not at all
}

// frontend is an address and port at which a service port is reached, or a node port if the
// address is the zero Addr.
type frontend struct {
	addr     netip.Addr
	is6      bool // distinguishes the node ports of the two families
	protocol uint8
	port     uint16
}

func (f frontend) String() string {
	proto := nft.ProtocolName(f.protocol)
	if !f.addr.IsValid() {
		return fmt.Sprintf("node port %d/%s", f.port, proto)
	}
	return fmt.Sprintf("%s/%s", netip.AddrPortFrom(f.addr, f.port), proto)
}

func (p *Port) family() family { return familyOf(p.ClusterIP) }

func (p *Port) clusterFrontend() frontend {
	return frontend{addr: p.ClusterIP, is6: p.ClusterIP.Is6(), protocol: p.Protocol, port: p.Port}
}

func (p *Port) nodeFrontend() frontend {
	return frontend{is6: p.ClusterIP.Is6(), protocol: p.Protocol, port: p.NodePort}
}

// frontends returns all frontends of the port, without duplicates.
func (p *Port) frontends() []frontend {
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

// keepIndexes orders next so that endpoints keep their index in old: an endpoint that is
// added or removed then changes one or two elements, not all behind it.
func keepIndexes(old, next []netip.AddrPort) []netip.AddrPort {
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
