package nft

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Names of the chains that are always there; those of classes are beside them.
const (
	chainServices  = "services"
	chainClusterIP = "no-such-port"
	chainRefuse    = "refuse"
)

// Services translate before others do, so that connections to cluster IPs pass
// no foreign rules first, and choose the source address before the pods' table.
var (
	serviceDestPriority   = nftables.ChainPriorityRef(*nftables.ChainPriorityNATDest - 10)
	serviceSourcePriority = nftables.ChainPriorityRef(*nftables.ChainPriorityNATSource - 10)
)

// chains spells out the rules that do not depend on services:
//
//	prerouting, output
//	    from a pod of another node on this machine: that node's rules decide.
//	    from a pod of another node to an address of this one: a mark, for postrouting.
//	    otherwise: services.
//	services
//	    to a cluster IP that the node answers itself: leave.
//	    to an address and port of a service: what its class says.
//	    to a node port at one of the chosen addresses: what its class says.
//	    to another port of a cluster IP, or of a load balancer's of a pool: refuse.
//	    to a service range otherwise: drop, or it might come back from a router.
//	postrouting
//	    from a pod to itself through a service: the gateway's address, or the pod
//	        would drop a packet from its own address.
//	    to a pod of this machine, or to the machine itself: the client's address,
//	        since the answer passes here anyway.
//	    from a pod of another node through a node port, on to an endpoint elsewhere:
//	        the node's address. The endpoint's answer to the pod's own would not pass
//	        here, and the pod would not know who it is from.
//	    from a pod: its address, to which every node has a route.
//	    from elsewhere through a service to an endpoint elsewhere: the node's.
//
// Everything happens in chains of type nat, which see the first packet of a
// connection only: no packet after it passes any rule of this table.
func (c ServiceConfig) chains() []chain {
	pre := chain{name: chainPrerouting, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPrerouting, priority: serviceDestPriority}
	out := chain{name: chainOutput, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookOutput, priority: serviceDestPriority}
	post := chain{name: chainPostrouting, kind: nftables.ChainTypeNAT,
		hook: nftables.ChainHookPostrouting, priority: serviceSourcePriority}
	services := chain{name: chainServices}
	unused := chain{name: chainClusterIP}
	refuse := chain{name: chainRefuse}

	pre.add("pods of another node on this machine",
		linkStartsWith(expr.MetaKeyIIFNAME, c.ForeignPrefix), linkOther(expr.MetaKeyIIFNAME, c.LinkPrefix), leave())
	for _, p := range c.ClusterRanges {
		f := familyOf(p.Addr())
		pre.add("pods of other nodes at this node's address: "+p.String(), f.is(), linkOther(expr.MetaKeyIIFNAME, c.LinkPrefix),
			f.addrIn(f.saddr, p, expr.CmpOpEq), toThisNode(), setMark(markFromOtherNode))
	}
	pre.add("services", jump(chainServices))
	out.add("services", jump(chainServices))

	for _, a := range c.Own {
		f := familyOf(a)
		services.add("the node answers "+a.String()+" itself", f.is(), f.addrIn(f.daddr, netip.PrefixFrom(a, a.BitLen()), expr.CmpOpEq), leave())
	}
	for _, f := range []family{v4, v6} {
		services.add("addresses of services", f.is(), f.loadDestination(word0), f.follow(kindServices))
		for _, p := range c.NodePortsOn {
			if familyOf(p.Addr()).proto == f.proto {
				services.add("node ports at "+p.String(), f.is(), f.addrIn(f.daddr, p, expr.CmpOpEq),
					f.addrIn(f.daddr, f.loopback, expr.CmpOpNeq), toThisNode(),
					rule{loadProtocol(word0), loadPort(word0 + 1)}, f.follow(kindNodePorts))
			}
		}
		services.add("other ports of the services' own addresses", f.is(), rule{f.load(f.daddr, word0), f.in(word0, kindClusterIPs)}, jumpTo(chainClusterIP))
	}
	unused.add("the node answers it itself", toThisNode(), leave())
	unused.add("the service has no such port", jumpTo(chainRefuse))
	for _, p := range c.ServiceRanges {
		f := familyOf(p.Addr())
		services.add("no service has the cluster IP: "+p.String(), f.is(), f.addrIn(f.daddr, p, expr.CmpOpEq), notToThisNode(), drop())
	}
	refuse.rules = refusal()

	for _, f := range []family{v4, v6} {
		post.add("a pod that reaches itself through a service", f.is(), linkStartsWith(expr.MetaKeyOIFNAME, c.LinkPrefix),
			translated(), f.pairIn(f.set(kindItself).describe()), masquerade())
	}
	post.add("to a pod of this machine", linkStartsWith(expr.MetaKeyOIFNAME, c.ForeignPrefix), leave())
	post.add("not through a service", untranslated(), leave())
	post.add("to the machine itself", toThisNode(), leave())
	post.add("from a pod of another node", marked(markFromOtherNode), masquerade())
	for _, p := range c.ClusterRanges {
		f := familyOf(p.Addr())
		post.add("from a pod: "+p.String(), f.is(), f.addrIn(f.saddr, p, expr.CmpOpEq), leave())
	}
	for _, f := range []family{v4, v6} {
		post.add("from outside to an endpoint elsewhere", f.is(), f.loadDestination(word0), rule{f.in(word0, kindElsewhere)}, masquerade())
	}
	return []chain{pre, out, post, services, unused, refuse}
}

// markFromOtherNode is a bit of the mark of a connection's first packet, from the
// prerouting chain to the postrouting chain of this node: there the kernel no longer
// says where a packet came in.
const markFromOtherNode = 1 << 21

// refusal answers at once. TCP is reset because the kernel sends few ICMP
// messages a second, and clients that get none wait.
func refusal() []commented {
	return []commented{
		{"TCP", rule{
			loadProtocol(reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{unix.IPPROTO_TCP}},
			&expr.Reject{Type: unix.NFT_REJECT_TCP_RST},
		}},
		{"the others", rule{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}},
	}
}

// classChains spells out what happens to connections of a class.
func (c ServiceConfig) classChains(f family, k class, at kind) []chain {
	ch := chain{name: k.chain(f, at)}
	if k.restricted {
		source := uint32(word0) + f.words() + 2
		ch.add("from sources that are not allowed", f.loadDestination(word0),
			rule{f.load(f.saddr, source), &expr.Lookup{SourceRegister: word0, SetName: f.set(kindSources).name(), Invert: true}}, drop())
	}
	switch k.do {
	case actReject:
		ch.rules = append(ch.rules, refusal()...)
		return []chain{ch}
	case actDrop:
		ch.add("no endpoint may be used here", drop())
		return []chain{ch}
	case actExternalLocal:
		if k.cluster > 0 {
			inside := jumpTo(k.fromInside().chain(f, at))
			ch.add("from a pod of this node", linkStartsWith(expr.MetaKeyIIFNAME, c.LinkPrefix), inside)
			ch.add("from the node itself", fromThisNode(), inside)
		}
		if k.local == 0 {
			ch.add("no endpoint on this node", drop())
			return []chain{ch}
		}
	}
	for _, p := range k.pools() {
		if k.sticky != nil {
			c.chooseSticky(&ch, f, k, p)
		} else {
			c.choose(&ch, f, k, at, p)
		}
	}
	// Sets and chains change in one transaction, but a packet may look into one
	// before it and into the other after it. The client sends it again.
	ch.add("its endpoints change at this moment", drop())
	return []chain{ch}
}

// choose adds the rule that sends a connection to one of the pool's endpoints.
func (c ServiceConfig) choose(ch *chain, f family, k class, at kind, p pool) {
	load, set, place := f.loadDestination(word0), kindEndpoints, uint32(word0)+f.words()+2
	if at == byNodePort {
		load, set, place = rule{loadProtocol(word0), loadPort(word0 + 1)}, kindNodeEndpoints, word0+2
	}
	ch.add("one of the endpoints", load, c.place(f, k, p, place), rule{f.get(word0, word0, set)}, f.send(word0))
}

// chooseSticky adds the rules for clients that had one of the endpoints, and the
// one for others. These chains are of one service, which they have in them.
func (c ServiceConfig) chooseSticky(ch *chain, f family, k class, p pool) {
	for _, e := range p.endpoints(k.sticky) {
		ch.add("was at "+e.String(), k.sticky.client(f, e), rule{f.in(word0, kindClients)}, jumpTo(k.sticky.endpointChain(f, e)))
	}
	place := uint32(word0) + f.words() + 2
	ch.add("one of the endpoints", k.sticky.service.load(f, word0), c.place(f, k, p, place),
		rule{f.get(word0, unix.NFT_REG_VERDICT, kindStickyPlaces)})
}

// toEndpoint is the chain that sends a client to an endpoint and remembers it.
func (s *stickyPort) toEndpoint(f family, e netip.AddrPort) chain {
	ch := chain{name: s.endpointChain(f, e)}
	to := rule{
		&expr.Immediate{Register: word0, Data: e.Addr().AsSlice()},
		&expr.Immediate{Register: word0 + f.words(), Data: portBytes(e.Port())},
	}
	protocol := rule{loadProtocol(reg1), &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: []byte{s.service.protocol}}}
	ch.add("remember the client", s.client(f, e), rule{&expr.Dynset{
		SrcRegKey: word0, SetName: f.set(kindClients).name(), Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: s.timeout,
	}})
	// A rule of its own: when there is no room for more clients, the one above fails.
	ch.add("send it to "+e.String(), f.is(), protocol, to, f.send(word0))
	return ch
}

// client loads what is remembered of a client: its address, service and endpoint.
func (s *stickyPort) client(f family, e netip.AddrPort) rule {
	service := uint32(word0) + f.words()
	return join(rule{f.load(f.saddr, word0)}, s.service.load(f, service),
		rule{&expr.Immediate{Register: service + f.words() + 2, Data: e.Addr().AsSlice()}})
}

// load puts the frontend itself into registers, in place of a packet's destination.
func (at frontend) load(f family, register uint32) rule {
	return rule{
		&expr.Immediate{Register: register, Data: at.addr.AsSlice()},
		&expr.Immediate{Register: register + f.words(), Data: []byte{at.protocol}},
		&expr.Immediate{Register: register + f.words() + 1, Data: portBytes(at.port)},
	}
}

// place puts the number of an endpoint of the pool into a register.
func (c ServiceConfig) place(f family, k class, p pool, register uint32) rule {
	switch {
	case p.count == 1:
		return rule{&expr.Immediate{Register: register, Data: []byte(number(p.first))}}
	case c.Scheduler == RoundRobin:
		return rule{&expr.Numgen{Register: register, Modulus: p.count, Offset: p.first, Type: unix.NFT_NG_INCREMENTAL}}
	case c.Scheduler == SourceHash:
		const client = word0 + 12 // the last four words, which nothing else uses
		return rule{f.load(f.saddr, client), &expr.Hash{
			SourceRegister: client, DestRegister: register, Length: f.addrLen,
			Modulus: p.count, Offset: p.first, Type: expr.HashTypeJenkins,
			Seed: 0x6b656467, // any: without one the kernel takes another for each chain
		}}
	}
	return rule{&expr.Numgen{Register: register, Modulus: p.count, Offset: p.first, Type: unix.NFT_NG_RANDOM}}
}

// loadDestination loads address, protocol and port to which the packet goes.
func (f family) loadDestination(at uint32) rule {
	return rule{f.load(f.daddr, at), loadProtocol(at + f.words()), loadPort(at + f.words() + 1)}
}

// get looks the key at one register up in a map and puts what it finds at another.
func (f family) get(key, val uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, DestRegister: val, IsDestRegSet: true, SetName: f.set(k).name()}
}

// in matches when the key at a register is in a set.
func (f family) in(key uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, SetName: f.set(k).name()}
}

// follow goes to the chain that a map has for the key at the first register.
func (f family) follow(k setKind) rule { return rule{f.get(word0, unix.NFT_REG_VERDICT, k)} }

// send makes the address and port at a register the packet's destination.
func (f family) send(at uint32) rule {
	return rule{&expr.NAT{
		Type: expr.NATTypeDestNAT, Family: uint32(f.proto),
		RegAddrMin: at, RegProtoMin: at + f.words(), Specified: true,
	}}
}

func jumpTo(chain string) rule { return rule{verdictGoto(chain)} }

func verdictGoto(chain string) *expr.Verdict {
	return &expr.Verdict{Kind: expr.VerdictGoto, Chain: chain}
}

func linkOther(key expr.MetaKey, prefix string) rule {
	return rule{
		&expr.Meta{Key: key, Register: reg1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: []byte(prefix)},
	}
}

func fromThisNode() rule {
	return rule{
		&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func notToThisNode() rule {
	return rule{
		&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

// translated matches connections whose destination was changed; untranslated the
// others.
func translated() rule   { return destinationChanged(expr.CmpOpNeq) }
func untranslated() rule { return destinationChanged(expr.CmpOpEq) }

func destinationChanged(op expr.CmpOp) rule {
	const dstNAT = 1 << 5 // IPS_DST_NAT of the kernel's enum ip_conntrack_status
	return rule{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg1},
		&expr.Bitwise{
			SourceRegister: reg1, DestRegister: reg1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(dstNAT), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: op, Register: reg1, Data: make([]byte, 4)},
	}
}
