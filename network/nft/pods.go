package nft

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// PodRules is what the table of a node's pods should do.
type PodRules struct {
	LinkPrefix string         // how the names of the pods' host interfaces begin
	PodRanges  []netip.Prefix // of this node's pods
	Inside     []netip.Prefix // destinations that see a pod's own address
	Nodes      []netip.Addr   // other nodes, which do so too: they have a route back
	Tunnels    []string       // interfaces by which they are reached; see TunnelTOS
	HostPorts  []HostPort
}

// TunnelTOS is the type of service of IPv4 packets that go between pods and other nodes' own
// addresses through a tunnel: the kernel finds the routes for them by it, without a routing
// rule, which would cost every packet of the machine. All kernels compare these three bits,
// and no class of service in use has all of them set. What the sender has set is lost.
const TunnelTOS = 0x1c

// HostPort says that a port of the node is one of a pod.
type HostPort struct {
	HostIP   netip.Addr // the zero Addr for every address of the node
	Port     uint16
	Protocol uint8 // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	Pod      netip.AddrPort
}

// PodTable is the table of one node's pods: source translation on the way out,
// host ports, and the guard against pods that forge addresses.
type PodTable struct {
	name string

	mu      sync.Mutex // one transaction at a time; guards what follows
	now     ruleset
	rules   PodRules
	written bool
	socket  socket
}

// NewPodTable returns the table of a node without touching the kernel.
func NewPodTable(node string) *PodTable {
	return &PodTable{name: TableName(node, "pods")}
}

// Close ends the connection to the kernel. Rules stay, and the next use opens
// another.
func (t *PodTable) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.socket.close()
}

// Name returns the table's name; its family is inet.
func (t *PodTable) Name() string { return t.name }

// Set makes the rules true. Where only host ports and nodes differ from what this
// process wrote before, chains and interfaces are not touched.
func (t *PodTable) Set(rules PodRules) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	next := rules.ruleset()
	if t.written && t.rules.sameButSets(rules) {
		if err := t.socket.refill(t.name, next.sets); err == nil {
			t.rules, t.now = rules, next
			return nil
		}
		// Somebody removed the table: write all of it.
	}
	if err := t.socket.replace(t.name, next); err != nil {
		return err
	}
	t.rules, t.now, t.written = rules, next, true
	return nil
}

// Repair writes the table again when something of it is missing or changed, and
// says whether it had to.
func (t *PodTable) Repair() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.written {
		return false, nil
	}
	ok, err := intact(t.name, t.now)
	if ok && err == nil {
		return false, nil
	}
	// Unreadable is treated as damaged: writing does no harm.
	if err := t.socket.replace(t.name, t.now); err != nil {
		return false, fmt.Errorf("repair: %w", err)
	}
	return true, nil
}

func (r PodRules) sameButSets(o PodRules) bool {
	return r.LinkPrefix == o.LinkPrefix && slices.Equal(r.PodRanges, o.PodRanges) && slices.Equal(r.Inside, o.Inside) &&
		slices.Equal(r.Tunnels, o.Tunnels)
}

// Names of the table's parts.
const (
	chainGuard       = "guard"
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainPostrouting = "postrouting"
	chainHostPorts   = "host-ports"
	chainOutbound    = "outbound"
	chainToTunnel    = "to-tunnel"
	chainNodeToPods  = "node-to-pods"

	setNodes         = "nodes-"          // addresses of nodes with routes to our pods
	setHostPorts     = "host-ports-"     // protocol, port -> pod
	setHostAddrPorts = "host-ip-ports-"  // node address, protocol, port -> pod
	setToItself      = "pods-to-itself-" // pod, pod: those that may reach themselves through a host port
)

// ruleset spells the rules out:
//
//	guard (before connection tracking, for packets from pods)
//	    to a loopback address: drop. Host ports on 127.0.0.1 need route_localnet
//	        on the pod's interface, which would otherwise open the node's
//	        loopback services to the pod.
//	    from an address that is not the pod's: drop.
//	prerouting, output
//	    to an address of the node and a host port: to the pod. Not from ::1, which
//	        the kernel lets nobody outside answer: a refusal there makes clients
//	        try 127.0.0.1 at once.
//	postrouting
//	    from loopback to a pod: the gateway's address, which the pod can answer.
//	    from a pod to itself through a host port: likewise, or the pod would
//	        drop a packet from its own address.
//	    from this node's pods to the outside, which other nodes are not: the node's address.
//	to-tunnel, node-to-pods
//	    see tunnelChains.
func (r PodRules) ruleset() ruleset {
	var rs ruleset
	guard := chain{name: chainGuard, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRaw}
	pre := chain{name: chainPrerouting, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityNATDest}
	out := chain{name: chainOutput, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityNATDest}
	post := chain{name: chainPostrouting, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPostrouting, priority: nftables.ChainPriorityNATSource}
	ports := chain{name: chainHostPorts}
	outbound := chain{name: chainOutbound}

	fromPod := linkStartsWith(expr.MetaKeyIIFNAME, r.LinkPrefix)
	guard.add("pods must not reach the node's loopback", fromPod, v4.is(), v4.addrIn(v4.daddr, v4.loopback, expr.CmpOpEq), drop())
	guard.add("a pod sends from its own address only", fromPod, sourceUnreachable(), drop())
	pre.add("host ports", jump(chainHostPorts))
	out.add("host ports", jump(chainHostPorts))

	post.add("from the node's loopback to a pod",
		linkStartsWith(expr.MetaKeyOIFNAME, r.LinkPrefix), v4.is(), v4.addrIn(v4.saddr, v4.loopback, expr.CmpOpEq), masquerade())
	ports.add("answers could not come back to ::1", v6.is(), v6.addrIn(v6.daddr, v6.loopback, expr.CmpOpEq), leave())

	for _, f := range []family{v4, v6} {
		byPort, byAddr, toItself := r.hostPortSets(f)
		rs.sets = append(rs.sets, byPort, byAddr, toItself)
		ports.add("host ports of one node address", f.is(), f.translate(byAddr, true))
		ports.add("host ports of all node addresses", f.is(), toThisNode(), f.translate(byPort, false))
		post.add("a pod that reaches itself through a host port", f.is(), f.pairIn(toItself), masquerade())
	}
	for _, p := range r.PodRanges {
		f := familyOf(p.Addr())
		post.add("from this node's pods "+p.String(), f.is(), f.addrIn(f.saddr, p, expr.CmpOpEq), jump(chainOutbound))
	}
	multicast := []netip.Prefix{netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8")}
	for _, p := range slices.Concat(r.Inside, multicast) {
		f := familyOf(p.Addr())
		outbound.add("inside: "+p.String(), f.is(), f.addrIn(f.daddr, p, expr.CmpOpEq), leave())
	}
	for _, f := range []family{v4, v6} {
		nodes := r.nodeSet(f)
		rs.sets = append(rs.sets, nodes)
		outbound.add("another node: "+nodes.name, f.is(), rule{f.load(f.daddr, reg1), &expr.Lookup{SourceRegister: reg1, SetName: nodes.name}}, leave())
	}
	outbound.add("the outside sees the node's address", masquerade())

	rs.chains = append([]chain{guard, pre, out, post, ports, outbound}, r.tunnelChains(fromPod)...)
	return rs
}

// tunnelChains mark what has to go through a tunnel although its destination is an address
// of another node, and the answers, which come from such an address: what checks sources
// looks for the way back by the mark too. There are none without tunnels. The mark is not
// taken off at the other end: chains for that cost all packets more than it is worth, since
// nobody looks at it there.
func (r PodRules) tunnelChains(fromPod rule) []chain {
	if len(r.Tunnels) == 0 {
		return nil
	}
	// After services have chosen the destination, and before the kernel looks for the way.
	to := chain{name: chainToTunnel, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookPrerouting, priority: nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 1)}
	to.add("from a pod to another node", fromPod, v4.is(),
		rule{v4.load(v4.daddr, reg1), &expr.Lookup{SourceRegister: reg1, SetName: r.nodeSet(v4).name}}, setTOS(TunnelTOS))
	// The way is known there, and for pods' addresses it does not depend on the mark.
	own := chain{name: chainNodeToPods, kind: nftables.ChainTypeFilter,
		hook: nftables.ChainHookOutput, priority: nftables.ChainPriorityFilter}
	for _, link := range r.Tunnels {
		own.add("from this node through "+link, linkIs(expr.MetaKeyOIFNAME, link), v4.is(), setTOS(TunnelTOS))
	}
	return []chain{to, own}
}

func (c *chain) add(comment string, parts ...rule) {
	c.rules = append(c.rules, commented{comment, join(parts...)})
}

// nodeSet holds the addresses of other nodes of one family.
func (r PodRules) nodeSet(f family) set {
	s := set{name: setNodes + f.suffix, key: f.addrType, comment: "other nodes: they see pods' own addresses"}
	for _, a := range r.Nodes {
		if familyOf(a).proto == f.proto {
			s.elements = append(s.elements, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	return s
}

// hostPortSets builds the three sets of one family.
func (r PodRules) hostPortSets(f family) (byPort, byAddr, toItself set) {
	target := nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
	byPort = set{
		name: setHostPorts + f.suffix, isMap: true, data: target, comment: "node ports that are a pod's",
		key: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
	}
	byAddr = set{
		name: setHostAddrPorts + f.suffix, isMap: true, data: target, comment: "node ports of one address that are a pod's",
		key: nftables.MustConcatSetType(f.addrType, nftables.TypeInetProto, nftables.TypeInetService),
	}
	toItself = set{
		name: setToItself + f.suffix, comment: "pods with host ports",
		key: nftables.MustConcatSetType(f.addrType, f.addrType),
	}
	var pods []netip.Addr
	for _, p := range r.HostPorts {
		pod := p.Pod.Addr()
		if familyOf(pod).proto != f.proto {
			continue
		}
		key := slices.Concat(word(p.Protocol), word(portBytes(p.Port)...))
		val := slices.Concat(pod.AsSlice(), word(portBytes(p.Pod.Port())...))
		if p.HostIP.IsValid() {
			byAddr.elements = append(byAddr.elements, nftables.SetElement{Key: slices.Concat(p.HostIP.AsSlice(), key), Val: val})
		} else {
			byPort.elements = append(byPort.elements, nftables.SetElement{Key: key, Val: val})
		}
		if !slices.Contains(pods, pod) {
			pods = append(pods, pod)
			toItself.elements = append(toItself.elements, nftables.SetElement{Key: slices.Concat(pod.AsSlice(), pod.AsSlice())})
		}
	}
	return byPort, byAddr, toItself
}

// translate looks the destination up in a map and sends the packet to the pod
// that it finds.
func (f family) translate(m set, withAddr bool) rule {
	var r rule
	next := uint32(word0)
	if withAddr {
		r = append(r, f.load(f.daddr, reg1))
		next += f.words()
	}
	return append(r,
		loadProtocol(next),
		loadPort(next+1),
		&expr.Lookup{SourceRegister: reg1, DestRegister: reg1, IsDestRegSet: true, SetName: m.name},
		&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(f.proto),
			RegAddrMin: reg1, RegProtoMin: word0 + f.words(), Specified: true,
		},
	)
}

// pairIn matches packets whose source and destination together are in a set.
func (f family) pairIn(s set) rule {
	second := uint32(reg2)
	if f.addrLen == 4 {
		second = word0 + 1
	}
	return rule{
		f.load(f.saddr, reg1),
		f.load(f.daddr, second),
		&expr.Lookup{SourceRegister: reg1, SetName: s.name},
	}
}
