package services

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"kedge/network/nft"
)

// Names of the chains that always exist; the chains of classes are added to them.
const (
	chainPrerouting  = "prerouting"
	chainOutput      = "output"
	chainPostrouting = "postrouting"

	chainServices  = "services"
	chainClusterIP = "no-such-port"
	chainRefuse    = "refuse"
)

// Services are translated before the chains of other programs, so that connections to
// cluster IPs do not pass foreign rules first, and choose the source address before the
// pods' table.
var (
	destinationPriority = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest - 10)
	sourcePriority      = nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource - 10)
)

// chains renders the rules that do not depend on services:
//
//	prerouting, output
//	    from a pod of another node on this machine: that node's rules decide.
//	    from a pod of another node to an address of this node: a mark, for postrouting.
//	    otherwise: services.
//	services
//	    to a cluster IP that a process of the node serves: return.
//	    to an address and port of a service: the chain of its class.
//	    to a node port at one of the selected addresses: the chain of its class.
//	    to another port of a cluster IP, or of a load balancer address of a pool: refuse.
//	    to another address of a service range: drop, because a router might send it back.
//	postrouting
//	    from a pod to itself through a service: the gateway's address, because the pod
//	        would drop a packet from its own address.
//	    to a pod of this machine, or to the machine itself: the client's address,
//	        because the reply passes this node anyway.
//	    from a pod of another node through a node port to an endpoint on another node:
//	        the node's address. A reply to the pod's own address would not pass this
//	        node, and the pod would not recognise its source.
//	    from a pod: its address, to which every node has a route.
//	    from elsewhere through a service to an endpoint on another node: the node's.
//
// All chains are of type nat, which see only the first packet of a connection: later
// packets pass no rule of this table.
func (c Config) chains() []nft.Chain {
	pre := nft.Chain{Name: chainPrerouting, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookPrerouting, Priority: destinationPriority}
	out := nft.Chain{Name: chainOutput, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookOutput, Priority: destinationPriority}
	post := nft.Chain{Name: chainPostrouting, Type: nftables.ChainTypeNAT,
		Hook: nftables.ChainHookPostrouting, Priority: sourcePriority}
	services := nft.Chain{Name: chainServices}
	unused := nft.Chain{Name: chainClusterIP}
	refuse := nft.Chain{Name: chainRefuse}

	pre.Add("pods of another node on this machine",
		nft.LinkStartsWith(expr.MetaKeyIIFNAME, c.ForeignPrefix), linkOther(expr.MetaKeyIIFNAME, c.LinkPrefix), nft.Return())
	for _, p := range c.ClusterRanges {
		f := familyOf(p.Addr())
		pre.Add("pods of other nodes at this node's address: "+p.String(), f.Is(), linkOther(expr.MetaKeyIIFNAME, c.LinkPrefix),
			f.AddrIn(f.SourceOffset, p, expr.CmpOpEq), nft.ToThisNode(), setMark(markFromOtherNode))
	}
	pre.Add("services", nft.Jump(chainServices))
	out.Add("services", nft.Jump(chainServices))

	for _, a := range c.Own {
		f := familyOf(a)
		services.Add("the node answers "+a.String()+" itself", f.Is(), f.AddrIn(f.DestinationOffset, netip.PrefixFrom(a, a.BitLen()), expr.CmpOpEq), nft.Return())
	}
	for _, f := range []family{v4, v6} {
		services.Add("addresses of services", f.Is(), f.loadDestination(nft.Word0), f.follow(kindServices))
		for _, p := range c.NodePortsOn {
			if familyOf(p.Addr()).Proto == f.Proto {
				services.Add("node ports at "+p.String(), f.Is(), f.AddrIn(f.DestinationOffset, p, expr.CmpOpEq),
					f.AddrIn(f.DestinationOffset, f.Loopback, expr.CmpOpNeq), nft.ToThisNode(),
					nft.Exprs{nft.LoadProtocol(nft.Word0), nft.LoadPort(nft.Word0 + 1)}, f.follow(kindNodePorts))
			}
		}
		services.Add("other ports of the services' own addresses", f.Is(), nft.Exprs{f.LoadAddr(f.DestinationOffset, nft.Word0), f.in(nft.Word0, kindClusterIPs)}, jumpTo(chainClusterIP))
	}
	unused.Add("the node answers it itself", nft.ToThisNode(), nft.Return())
	unused.Add("the service has no such port", jumpTo(chainRefuse))
	for _, p := range c.ServiceRanges {
		f := familyOf(p.Addr())
		services.Add("no service has the cluster IP: "+p.String(), f.Is(), f.AddrIn(f.DestinationOffset, p, expr.CmpOpEq), notToThisNode(), nft.Drop())
	}
	refuse.Rules = refusal()

	for _, f := range []family{v4, v6} {
		post.Add("a pod that reaches itself through a service", f.Is(), nft.LinkStartsWith(expr.MetaKeyOIFNAME, c.LinkPrefix),
			translated(), f.PairIn(f.set(kindHairpin).describe()), nft.Masquerade())
	}
	post.Add("to a pod of this machine", nft.LinkStartsWith(expr.MetaKeyOIFNAME, c.ForeignPrefix), nft.Return())
	post.Add("not through a service", untranslated(), nft.Return())
	post.Add("to the machine itself", nft.ToThisNode(), nft.Return())
	post.Add("from a pod of another node", marked(markFromOtherNode), nft.Masquerade())
	for _, p := range c.ClusterRanges {
		f := familyOf(p.Addr())
		post.Add("from a pod: "+p.String(), f.Is(), f.AddrIn(f.SourceOffset, p, expr.CmpOpEq), nft.Return())
	}
	for _, f := range []family{v4, v6} {
		post.Add("from outside to an endpoint elsewhere", f.Is(), f.loadDestination(nft.Word0), nft.Exprs{f.in(nft.Word0, kindRemote)}, nft.Masquerade())
	}
	return []nft.Chain{pre, out, post, services, unused, refuse}
}

// markFromOtherNode is a bit of the mark of a connection's first packet, from the
// prerouting chain to the postrouting chain of this node: in postrouting the kernel no
// longer provides the inbound interface.
const markFromOtherNode = 1 << 21

// refusal rejects a connection at once. TCP is reset, because the kernel limits the rate of
// ICMP messages, and clients that receive none wait.
func refusal() []nft.Rule {
	return []nft.Rule{
		{Comment: "TCP", Exprs: nft.Exprs{
			nft.LoadProtocol(nft.Reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		}},
		{Comment: "the others", Exprs: nft.Exprs{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}},
	}
}

// classChains returns the chains for connections of a class.
func (c Config) classChains(f family, k class, at kind) []nft.Chain {
	ch := nft.Chain{Name: k.chain(f, at)}
	if k.restricted {
		source := uint32(nft.Word0) + f.Words() + 2
		ch.Add("from sources that are not allowed", f.loadDestination(nft.Word0),
			nft.Exprs{f.LoadAddr(f.SourceOffset, source), &expr.Lookup{SourceRegister: nft.Word0, SetName: f.set(kindSources).name(), Invert: true}}, nft.Drop())
	}
	switch k.action {
	case actReject:
		ch.Rules = append(ch.Rules, refusal()...)
		return []nft.Chain{ch}
	case actDrop:
		ch.Add("no endpoint may be used here", nft.Drop())
		return []nft.Chain{ch}
	case actExternalLocal:
		if k.cluster > 0 {
			inside := jumpTo(k.internalClass().chain(f, at))
			ch.Add("from a pod of this node", nft.LinkStartsWith(expr.MetaKeyIIFNAME, c.LinkPrefix), inside)
			ch.Add("from the node itself", fromThisNode(), inside)
		}
		if k.local == 0 {
			ch.Add("no endpoint on this node", nft.Drop())
			return []nft.Chain{ch}
		}
	}
	for _, p := range k.pools() {
		if k.sticky != nil {
			c.chooseSticky(&ch, f, k, p)
		} else {
			c.choose(&ch, f, k, at, p)
		}
	}
	// Sets and chains change in one transaction, but a packet may pass one before the
	// transaction and the other after it. The client sends the packet again.
	ch.Add("its endpoints change at this moment", nft.Drop())
	return []nft.Chain{ch}
}

// choose adds the rule that sends a connection to an endpoint of the pool.
func (c Config) choose(ch *nft.Chain, f family, k class, at kind, p pool) {
	load, set, place := f.loadDestination(nft.Word0), kindEndpoints, uint32(nft.Word0)+f.Words()+2
	if at == byNodePort {
		load, set, place = nft.Exprs{nft.LoadProtocol(nft.Word0), nft.LoadPort(nft.Word0 + 1)}, kindNodeEndpoints, nft.Word0+2
	}
	ch.Add("one of the endpoints", load, c.index(f, k, p, place), nft.Exprs{f.get(nft.Word0, nft.Word0, set)}, f.send(nft.Word0))
}

// chooseSticky adds the rules for clients with a remembered endpoint, and the rule for all
// other clients. The chains of session affinity belong to one service, whose address they
// contain.
func (c Config) chooseSticky(ch *nft.Chain, f family, k class, p pool) {
	for _, e := range p.endpoints(k.sticky) {
		ch.Add("was at "+e.String(), k.sticky.client(f, e), nft.Exprs{f.in(nft.Word0, kindClients)}, jumpTo(k.sticky.endpointChain(f, e)))
	}
	place := uint32(nft.Word0) + f.Words() + 2
	ch.Add("one of the endpoints", k.sticky.service.load(f, nft.Word0), c.index(f, k, p, place),
		nft.Exprs{f.get(nft.Word0, unix.NFT_REG_VERDICT, kindStickyEndpoints)})
}

// toEndpoint returns the chain that sends a client to an endpoint and remembers it.
func (s *stickyPort) toEndpoint(f family, e netip.AddrPort) nft.Chain {
	ch := nft.Chain{Name: s.endpointChain(f, e)}
	to := nft.Exprs{
		&expr.Immediate{Register: nft.Word0, Data: e.Addr().AsSlice()},
		&expr.Immediate{Register: nft.Word0 + f.Words(), Data: nft.PortBytes(e.Port())},
	}
	protocol := nft.Exprs{nft.LoadProtocol(nft.Reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: []byte{s.service.protocol}}}
	ch.Add("remember the client", s.client(f, e), nft.Exprs{&expr.Dynset{
		SrcRegKey: nft.Word0, SetName: f.set(kindClients).name(), Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: s.timeout,
	}})
	// A separate rule, because the one above fails when the set of clients is full.
	ch.Add("send it to "+e.String(), f.Is(), protocol, to, f.send(nft.Word0))
	return ch
}

// client loads the key under which a client is remembered: its address, service and
// endpoint.
func (s *stickyPort) client(f family, e netip.AddrPort) nft.Exprs {
	service := uint32(nft.Word0) + f.Words()
	return nft.Join(nft.Exprs{f.LoadAddr(f.SourceOffset, nft.Word0)}, s.service.load(f, service),
		nft.Exprs{&expr.Immediate{Register: service + f.Words() + 2, Data: e.Addr().AsSlice()}})
}

// load loads the frontend itself into registers, instead of a packet's destination.
func (at frontend) load(f family, register uint32) nft.Exprs {
	return nft.Exprs{
		&expr.Immediate{Register: register, Data: at.addr.AsSlice()},
		&expr.Immediate{Register: register + f.Words(), Data: []byte{at.protocol}},
		&expr.Immediate{Register: register + f.Words() + 1, Data: nft.PortBytes(at.port)},
	}
}

// index loads the index of an endpoint of the pool into a register.
func (c Config) index(f family, k class, p pool, register uint32) nft.Exprs {
	switch {
	case p.count == 1:
		return nft.Exprs{&expr.Immediate{Register: register, Data: []byte(number(p.first))}}
	case c.Scheduler == RoundRobin:
		return nft.Exprs{&expr.Numgen{Register: register, Modulus: p.count, Offset: p.first, Type: unix.NFT_NG_INCREMENTAL}}
	case c.Scheduler == SourceHash:
		const client = nft.Word0 + 12 // the last four words, which no other expression uses
		return nft.Exprs{f.LoadAddr(f.SourceOffset, client), &expr.Hash{
			SourceRegister: client, DestRegister: register, Length: f.AddrLen,
			Modulus: p.count, Offset: p.first, Type: expr.HashTypeJenkins,
			Seed: 0x6b656467, // arbitrary, but fixed: without a seed the kernel uses another one for each chain
		}}
	}
	return nft.Exprs{&expr.Numgen{Register: register, Modulus: p.count, Offset: p.first, Type: unix.NFT_NG_RANDOM}}
}

// loadDestination loads the packet's destination address, protocol and destination port.
func (f family) loadDestination(at uint32) nft.Exprs {
	return nft.Exprs{f.LoadAddr(f.DestinationOffset, at), nft.LoadProtocol(at + f.Words()), nft.LoadPort(at + f.Words() + 1)}
}

// get looks up the key at one register in a map and stores the value at another register.
func (f family) get(key, val uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, DestRegister: val, IsDestRegSet: true, SetName: f.set(k).name()}
}

// in matches if the key at a register is in a set.
func (f family) in(key uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, SetName: f.set(k).name()}
}

// follow continues in the chain that a map has for the key at the first register.
func (f family) follow(k setKind) nft.Exprs {
	return nft.Exprs{f.get(nft.Word0, unix.NFT_REG_VERDICT, k)}
}

// send changes the packet's destination to the address and port at a register.
func (f family) send(at uint32) nft.Exprs {
	return nft.Exprs{&expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(f.Proto),
		RegAddrMin: at, RegProtoMin: at + f.Words(), Specified: true,
	}}
}

func jumpTo(chain string) nft.Exprs { return nft.Exprs{verdictGoto(chain)} }

func verdictGoto(chain string) *expr.Verdict {
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
}

func linkOther(key expr.MetaKey, prefix string) nft.Exprs {
	return nft.Exprs{
		&expr.Meta{Key: key, Register: nft.Reg1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg1, Data: []byte(prefix)},
	}
}

func fromThisNode() nft.Exprs {
	return nft.Exprs{
		&expr.Fib{Register: nft.Reg1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: nft.Reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func notToThisNode() nft.Exprs {
	return nft.Exprs{
		&expr.Fib{Register: nft.Reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// translated matches connections whose destination was changed, and untranslated all
// others.
func translated() nft.Exprs   { return destinationChanged(expr.CmpOpNeq) }
func untranslated() nft.Exprs { return destinationChanged(expr.CmpOpEq) }

func destinationChanged(op expr.CmpOp) nft.Exprs {
	const dstNAT = 1 << 5 // IPS_DST_NAT of the kernel's enum ip_conntrack_status
	return nft.Exprs{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: nft.Reg1},
		&expr.Bitwise{
			SourceRegister: nft.Reg1, DestRegister: nft.Reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(dstNAT), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: op, Register: nft.Reg1, Data: make([]byte, 4)},
	}
}

// setMark sets a bit of the packet's mark and leaves the other bits unchanged.
func setMark(bit uint32) nft.Exprs {
	return nft.Exprs{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg1},
		&expr.Bitwise{
			SourceRegister: nft.Reg1, DestRegister: nft.Reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(^bit), Xor: binaryutil.NativeEndian.PutUint32(bit),
		},
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg1, SourceRegister: true},
	}
}

// marked matches packets with a bit of the mark set.
func marked(bit uint32) nft.Exprs {
	return nft.Exprs{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: nft.Reg1},
		&expr.Bitwise{
			SourceRegister: nft.Reg1, DestRegister: nft.Reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bit), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: nft.Reg1, Data: make([]byte, 4)},
	}
}
