package pods

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// Rules is the content of the table of a node's pods, except for host ports.
type Rules struct {
	LinkPrefix string         // how the names of the pods' host interfaces begin
	PodRanges  []netip.Prefix // of this node's pods
	Inside     []netip.Prefix // destinations that see a pod's own address
	Nodes      []netip.Addr   // other nodes, which see it as well: they have a route to the pod
	Tunnels    []string       // interfaces through which nodes are reached; see TunnelTOS
}

// TunnelTOS is the type of service of IPv4 packets between pods and the addresses of other
// nodes that take a tunnel. The kernel selects the routes of these packets by it, without a
// routing rule, which would cost every packet of the machine. All kernels compare these
// three bits, and no class of service in use sets all of them. The value that the sender
// set is lost.
const TunnelTOS = 0x1c

// HostPort maps a port of the node to a pod.
type HostPort struct {
	HostIP   netip.Addr // the zero Addr: all addresses of the node
	Port     uint16
	Protocol uint8 // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	Pod      netip.AddrPort
}

// Table is the table of one node's pods: source translation on the way out, host ports, and
// the guard against forged source addresses.
type Table struct {
	name string

	mu      sync.Mutex // one transaction at a time; guards what follows
	ports   []HostPort // of the last SetHostPorts
	rules   Rules      // of the last successful Set
	now     nft.Ruleset
	written bool
	socket  nft.Socket
}

// NewTable returns the table of a node without touching the kernel.
func NewTable(node string) *Table {
	return &Table{name: nft.TableName(node, "pods")}
}

// Close closes the connection to the kernel. Rules stay, and the next write opens another
// connection.
func (t *Table) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.socket.Close()
}

// Name returns the table's name; its family is inet.
func (t *Table) Name() string { return t.name }

// Set writes the rules, with the host ports of the last SetHostPorts. If only the addresses
// of nodes differ from the last write of this process, chains and interfaces are not
// touched.
func (t *Table) Set(rules Rules) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.write(rules)
}

// SetHostPorts replaces the host ports and changes nothing else. Before the first Set
// nothing is written, and after an error the next Set writes them too.
func (t *Table) SetHostPorts(ports []HostPort) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ports = ports
	if !t.written {
		return nil
	}
	return t.write(t.rules)
}

// write brings the kernel to the rules and t.ports. Caller holds mu.
func (t *Table) write(rules Rules) error {
	next := rules.ruleset(t.ports)
	if t.written && t.rules.sameButSets(rules) {
		if err := t.socket.Refill(t.name, next.Sets); err == nil {
			t.rules, t.now = rules, next
			return nil
		}
		// Another program removed the table: write all of it.
	}
	if err := t.socket.Replace(t.name, next); err != nil {
		return err
	}
	t.rules, t.now, t.written = rules, next, true
	return nil
}

// HostPorts returns the host ports in the kernel, including those of an earlier process. A
// table that does not exist has no host ports.
func (t *Table) HostPorts() ([]HostPort, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	table, err := conn.ListTableOfFamily(t.name, nftables.TableFamilyINet)
	if err != nil {
		return nil, nft.IgnoreNotFound(err)
	}
	var ports []HostPort
	for _, f := range []nft.Family{nft.V4, nft.V6} {
		byPort, byAddr, _ := hostPortSets(nil, f)
		for _, s := range []nft.Set{byPort, byAddr} {
			elements, err := conn.GetSetElements(s.In(table))
			if err != nil {
				return nil, fmt.Errorf("read host ports of nftables table %s: %w", t.name, err)
			}
			for _, e := range elements {
				ports = append(ports, readHostPort(e))
			}
		}
	}
	return ports, nil
}

// readHostPort decodes an element of hostPortSets.
func readHostPort(e nftables.SetElement) HostPort {
	addr, port := e.Key[:len(e.Key)-8], e.Key[len(e.Key)-8:]
	hostIP, _ := netip.AddrFromSlice(addr) // empty for all addresses
	pod, _ := netip.AddrFromSlice(e.Val[:len(e.Val)-4])
	podPort := e.Val[len(e.Val)-4:]
	return HostPort{
		HostIP: hostIP, Protocol: port[0], Port: binary.BigEndian.Uint16(port[4:]),
		Pod: netip.AddrPortFrom(pod, binary.BigEndian.Uint16(podPort)),
	}
}

// Repair rewrites the table if a part of it is missing or changed, and reports whether it
// did.
func (t *Table) Repair() (bool, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.written {
		return false, nil
	}
	ok, err := nft.Intact(t.name, t.now)
	if ok && err == nil {
		return false, nil
	}
	// An unreadable table is treated as damaged: rewriting does no harm.
	if err := t.socket.Replace(t.name, t.now); err != nil {
		return false, fmt.Errorf("repair: %w", err)
	}
	return true, nil
}

func (r Rules) sameButSets(o Rules) bool {
	return r.LinkPrefix == o.LinkPrefix && slices.Equal(r.PodRanges, o.PodRanges) && slices.Equal(r.Inside, o.Inside) &&
		slices.Equal(r.Tunnels, o.Tunnels)
}

// Names of the table's parts.
const (
	chainGuard       = "guard"
	chainInvalid     = "invalid"
	chainInvalidHere = "invalid-to-node"
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainPostrouting = "postrouting"
	chainHostPorts   = "host-ports"
	chainOutbound    = "outbound"
	chainToTunnel    = "to-tunnel"
	chainNodeToPods  = "node-to-pods"

	setNodes         = "nodes-"          // addresses of nodes with routes to this node's pods
	setHostPorts     = "host-ports-"     // protocol, port -> pod
	setHostAddrPorts = "host-ip-ports-"  // node address, protocol, port -> pod
	setToItself      = "pods-to-itself-" // pod, pod: pods that may reach themselves through a host port
)

// ruleset renders the rules:
//
//	guard (before connection tracking, for packets from pods)
//	    to a loopback address: drop. Host ports on 127.0.0.1 need route_localnet
//	        on the pod's interface, which would otherwise open the node's
//	        loopback services to the pod.
//	    from a source address that is not the pod's: drop.
//	invalid, invalid-to-node (after connection tracking)
//	    from or to a pod, and of no connection although the kernel has looked for one,
//	        such as a TCP segment out of the window: drop. The kernel would not translate
//	        it back; the receiver would refuse a segment from an unknown address, and the
//	        reset would end the connection. Both directions of a pod's connections pass
//	        here, so the state invalid is reliable; of connections between other hosts the
//	        kernel may have seen one direction only.
//	prerouting, output
//	    to an address of the node and a host port: to the pod. Not from ::1, to
//	        which the kernel does not let a pod answer: a refusal there makes clients
//	        try 127.0.0.1 at once.
//	postrouting
//	    from loopback to a pod: the gateway's address, which the pod can answer.
//	    from a pod to itself through a host port: the gateway's address, because the pod
//	        would drop a packet from its own address.
//	    from this node's pods to the outside, except to other nodes: the node's address.
//	to-tunnel, node-to-pods
//	    see tunnelChains.
func (r Rules) ruleset(hostPorts []HostPort) nft.Ruleset {
	var rs nft.Ruleset
	guard := nft.Chain{Name: chainGuard, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw}
	pre := nft.Chain{Name: chainPrerouting, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityNATDest}
	out := nft.Chain{Name: chainOutput, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest}
	post := nft.Chain{Name: chainPostrouting, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource}
	ports := nft.Chain{Name: chainHostPorts}
	outbound := nft.Chain{Name: chainOutbound}

	fromPod := nft.LinkStartsWith(expr.MetaKeyIIFNAME, r.LinkPrefix)
	guard.Add("pods must not reach the node's loopback", fromPod, nft.V4.Is(), nft.V4.AddrIn(nft.V4.DestinationOffset, nft.V4.Loopback, expr.CmpOpEq), nft.Drop())
	guard.Add("a pod sends from its own address only", fromPod, sourceUnreachable(), nft.Drop())
	toPod := nft.LinkStartsWith(expr.MetaKeyOIFNAME, r.LinkPrefix)
	invalid := nft.Chain{Name: chainInvalid, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter}
	invalidHere := nft.Chain{Name: chainInvalidHere, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter}
	isInvalid := nft.InState(expr.CtStateBitINVALID)
	invalid.Add("from a pod, of no connection", isInvalid, fromPod, nft.Drop())
	invalid.Add("to a pod, of no connection", isInvalid, toPod, nft.Drop())
	invalidHere.Add("from a pod, of no connection", isInvalid, fromPod, nft.Drop())
	pre.Add("host ports", nft.Jump(chainHostPorts))
	out.Add("host ports", nft.Jump(chainHostPorts))

	post.Add("from the node's loopback to a pod",
		nft.LinkStartsWith(expr.MetaKeyOIFNAME, r.LinkPrefix), nft.V4.Is(), nft.V4.AddrIn(nft.V4.SourceOffset, nft.V4.Loopback, expr.CmpOpEq), nft.Masquerade())
	ports.Add("answers could not come back to ::1", nft.V6.Is(), nft.V6.AddrIn(nft.V6.DestinationOffset, nft.V6.Loopback, expr.CmpOpEq), nft.Return())

	for _, f := range []nft.Family{nft.V4, nft.V6} {
		byPort, byAddr, toItself := hostPortSets(hostPorts, f)
		rs.Sets = append(rs.Sets, byPort, byAddr, toItself)
		ports.Add("host ports of one node address", f.Is(), translate(f, byAddr, true))
		ports.Add("host ports of all node addresses", f.Is(), nft.ToThisNode(), translate(f, byPort, false))
		post.Add("a pod that reaches itself through a host port", f.Is(), f.PairIn(toItself), nft.Masquerade())
	}
	for _, p := range r.PodRanges {
		f := nft.FamilyOf(p.Addr())
		post.Add("from this node's pods "+p.String(), f.Is(), f.AddrIn(f.SourceOffset, p, expr.CmpOpEq), nft.Jump(chainOutbound))
	}
	multicast := []netip.Prefix{netip.MustParsePrefix("224.0.0.0/4"), netip.MustParsePrefix("ff00::/8")}
	for _, p := range slices.Concat(r.Inside, multicast) {
		f := nft.FamilyOf(p.Addr())
		outbound.Add("inside: "+p.String(), f.Is(), f.AddrIn(f.DestinationOffset, p, expr.CmpOpEq), nft.Return())
	}
	for _, f := range []nft.Family{nft.V4, nft.V6} {
		nodes := r.nodeSet(f)
		rs.Sets = append(rs.Sets, nodes)
		outbound.Add("another node: "+nodes.Name, f.Is(), nft.Exprs{f.LoadAddr(f.DestinationOffset, nft.Reg1), &expr.Lookup{SourceRegister: nft.Reg1, SetName: nodes.Name}}, nft.Return())
	}
	outbound.Add("the outside sees the node's address", nft.Masquerade())

	rs.Chains = append([]nft.Chain{guard, invalid, invalidHere, pre, out, post, ports, outbound}, r.tunnelChains(fromPod)...)
	return rs
}

// tunnelChains mark the packets that take a tunnel although their destination is an address
// of another node, and the packets from such an address that answer: source validation
// looks up the reverse route by the mark as well. Without tunnels there are no such chains.
// The mark stays on the packet at the other end: chains that remove it would cost all
// packets more than it is worth, and the mark has no effect there.
func (r Rules) tunnelChains(fromPod nft.Exprs) []nft.Chain {
	if len(r.Tunnels) == 0 {
		return nil
	}
	// After the translation of services, and before the routing decision.
	to := nft.Chain{Name: chainToTunnel, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest + 1)}
	to.Add("from a pod to another node", fromPod, nft.V4.Is(),
		nft.Exprs{nft.V4.LoadAddr(nft.V4.DestinationOffset, nft.Reg1), &expr.Lookup{SourceRegister: nft.Reg1, SetName: r.nodeSet(nft.V4).Name}}, setTOS(TunnelTOS))
	// The route is known at this point, and for pods' addresses it does not depend on the
	// mark.
	own := nft.Chain{Name: chainNodeToPods, Type: nftables.ChainTypeFilter,
		Hook: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter}
	for _, link := range r.Tunnels {
		own.Add("from this node through "+link, linkIs(expr.MetaKeyOIFNAME, link), nft.V4.Is(), setTOS(TunnelTOS))
	}
	return []nft.Chain{to, own}
}

// nodeSet holds the addresses of other nodes of one family.
func (r Rules) nodeSet(f nft.Family) nft.Set {
	s := nft.Set{Name: setNodes + f.Suffix, Key: f.AddrType, Comment: "other nodes: they see pods' own addresses"}
	for _, a := range r.Nodes {
		if nft.FamilyOf(a).Proto == f.Proto {
			s.Elements = append(s.Elements, nftables.SetElement{Key: a.AsSlice()})
		}
	}
	return s
}

// hostPortSets returns the three sets of one family.
func hostPortSets(ports []HostPort, f nft.Family) (byPort, byAddr, toItself nft.Set) {
	target := nftables.MustConcatSetType(f.AddrType, nftables.TypeInetService)
	byPort = nft.Set{
		Name: setHostPorts + f.Suffix, IsMap: true, Data: target, Comment: "host ports of pods",
		Key: nftables.MustConcatSetType(nftables.TypeInetProto, nftables.TypeInetService),
	}
	byAddr = nft.Set{
		Name: setHostAddrPorts + f.Suffix, IsMap: true, Data: target, Comment: "host ports of pods on one node address",
		Key: nftables.MustConcatSetType(f.AddrType, nftables.TypeInetProto, nftables.TypeInetService),
	}
	toItself = nft.Set{
		Name: setToItself + f.Suffix, Comment: "pods with host ports",
		Key: nftables.MustConcatSetType(f.AddrType, f.AddrType),
	}
	var pods []netip.Addr
	for _, p := range ports {
		pod := p.Pod.Addr()
		if nft.FamilyOf(pod).Proto != f.Proto {
			continue
		}
		key := slices.Concat(nft.Word(p.Protocol), nft.Word(nft.PortBytes(p.Port)...))
		val := slices.Concat(pod.AsSlice(), nft.Word(nft.PortBytes(p.Pod.Port())...))
		if p.HostIP.IsValid() {
			byAddr.Elements = append(byAddr.Elements, nftables.SetElement{Key: slices.Concat(p.HostIP.AsSlice(), key), Val: val})
		} else {
			byPort.Elements = append(byPort.Elements, nftables.SetElement{Key: key, Val: val})
		}
		if !slices.Contains(pods, pod) {
			pods = append(pods, pod)
			toItself.Elements = append(toItself.Elements, nftables.SetElement{Key: slices.Concat(pod.AsSlice(), pod.AsSlice())})
		}
	}
	return byPort, byAddr, toItself
}

// translate looks up the destination in a map and sends the packet to the pod found there.
func translate(f nft.Family, m nft.Set, withAddr bool) nft.Exprs {
	var r nft.Exprs
	next := uint32(nft.Word0)
	if withAddr {
		r = append(r, f.LoadAddr(f.DestinationOffset, nft.Reg1))
		next += f.Words()
	}
	return append(r,
		nft.LoadProtocol(next),
		nft.LoadPort(next+1),
		&expr.Lookup{SourceRegister: nft.Reg1, DestRegister: nft.Reg1, IsDestRegSet: true, SetName: m.Name},
		&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: uint32(f.Proto),
			RegAddrMin: nft.Reg1, RegProtoMin: nft.Word0 + f.Words(), Specified: true,
		},
	)
}

// linkIs matches an interface by its name.
func linkIs(key expr.MetaKey, name string) nft.Exprs {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return nft.Exprs{
		&expr.Meta{Key: key, Register: nft.Reg1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: padded},
	}
}

// tosBits are the bits of the second byte of an IPv4 header that do not concern congestion.
const tosBits = 0xfc

// setTOS sets the type of service of an IPv4 packet. It writes two bytes, so that the
// kernel can update the checksum.
func setTOS(tos byte) nft.Exprs {
	return nft.Exprs{
		&expr.Payload{OperationType: expr.PayloadLoad, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2, DestRegister: nft.Reg1},
		&expr.Bitwise{SourceRegister: nft.Reg1, DestRegister: nft.Reg1, Len: 2, Mask: []byte{0xff, 0xff &^ tosBits}, Xor: []byte{0, tos}},
		&expr.Payload{
			OperationType: expr.PayloadWrite, Base: expr.PayloadBaseNetworkHeader, Offset: 0, Len: 2, SourceRegister: nft.Reg1,
			CsumType: expr.CsumTypeInet, CsumOffset: 10,
		},
	}
}

// sourceUnreachable matches packets whose source address is not routed through the
// interface on which they arrived.
func sourceUnreachable() nft.Exprs {
	return nft.Exprs{
		&expr.Fib{Register: nft.Reg1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: []byte{0, 0, 0, 0}},
	}
}
