package nft

import (
	"net/netip"
	"time"

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
//	    otherwise: services.
//	services
//	    to a cluster IP that the node answers itself: leave.
//	    to an address and port of a service: what its class says.
//	    to a node port at one of the chosen addresses: what its class says.
//	    to another port of a cluster IP: refuse.
//	    to a service range otherwise: drop, or it might come back from a router.
//	postrouting
//	    from a pod to itself through a service: the gateway's address, or the pod
//	        would drop a packet from its own address.
//	    to a pod of this machine, or to the machine itself: the client's address,
//	        since the answer passes here anyway.
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
	pre.add("services", jump(chainServices))
	out.add("services", jump(chainServices))

	for _, a := range c.Own {
		f := familyOf(a)
		services.add("the node answers "+a.String()+" itself", f.is(), f.addrIn(f.daddr, netip.PrefixFrom(a, a.BitLen()), expr.CmpOpEq), leave())
	}
	for _, f := range []family{v4, v6} {
		services.add("addresses of services", f.is(), f.loadDestination(word0), f.decide(kindServices))
		for _, p := range c.NodePortsOn {
			if familyOf(p.Addr()).proto == f.proto {
				services.add("node ports at "+p.String(), f.is(), f.addrIn(f.daddr, p, expr.CmpOpEq),
					f.addrIn(f.daddr, f.loopback, expr.CmpOpNeq), toThisNode(),
					rule{loadProtocol(word0), loadPort(word0 + 1)}, f.decide(kindNodePorts))
			}
		}
		services.add("other ports of cluster IPs", f.is(), rule{f.load(f.daddr, word0), f.in(word0, kindClusterIPs)}, jumpTo(chainClusterIP))
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
	for _, p := range c.ClusterRanges {
		f := familyOf(p.Addr())
		post.add("from a pod: "+p.String(), f.is(), f.addrIn(f.saddr, p, expr.CmpOpEq), leave())
	}
	for _, f := range []family{v4, v6} {
		for _, k := range []setKind{kindClusterIPs, kindExternalIPs} {
			post.add("from outside through one of "+f.set(k).name(), f.is(),
				rule{&expr.Ct{Key: expr.CtKeyDST, Register: reg1}, f.in(reg1, k)}, masquerade())
		}
		post.add("from outside through a node port", f.is(), rule{loadProtocol(word0), loadOriginalPort(word0 + 1)},
			rule{f.get(word0, word0, kindNodePorts)}, masquerade())
	}
	return []chain{pre, out, post, services, unused, refuse}
}

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

// chain spells out what happens to connections of a class.
func (c ServiceConfig) classChain(f family, k class) chain {
	ch := chain{name: k.chain(f)}
	if k.do&actRestricted != 0 {
		source := uint32(word0) + f.words() + 2
		ch.add("from sources that are not allowed", f.loadDestination(word0),
			rule{f.load(f.saddr, source), &expr.Lookup{SourceRegister: word0, SetName: f.set(kindSources).name(), Invert: true}}, drop())
	}
	switch k.do &^ actRestricted {
	case actReject:
		ch.rules = append(ch.rules, refusal()...)
	case actDrop:
		ch.add("no endpoint may be used here", drop())
	case actInternal, actExternal, actNodePort:
		c.choose(&ch, f, k, pool{count: k.cluster, sticky: kindStickyCluster})
	case actExternalLocal, actNodePortLocal:
		if k.cluster > 0 {
			ch.add("from a pod of this node", linkStartsWith(expr.MetaKeyIIFNAME, c.LinkPrefix), jumpTo(k.fromInside().chain(f)))
			ch.add("from the node itself", fromThisNode(), jumpTo(k.fromInside().chain(f)))
		}
		fallthrough
	case actInternalLocal:
		if k.local > 0 {
			c.choose(&ch, f, k, pool{count: k.local, first: localPlaces, sticky: kindStickyLocal})
		} else {
			ch.add("no endpoint on this node", drop())
		}
	}
	return ch
}

// fromInside is the class of connections from this node to addresses that bring
// others to this node's endpoints only: as if they had gone out and come back.
func (k class) fromInside() class {
	return class{do: (k.do &^ actRestricted) - 1, cluster: k.cluster, sticky: k.sticky, turn: k.turn}
}

// pool is the endpoints among which one is chosen.
type pool struct {
	count, first uint32
	sticky       setKind // which of them are valid for clients that had one
}

// choose adds the rules that send a connection to an endpoint. In registers, a
// service is cluster IP, protocol and port in neighbouring words.
func (c ServiceConfig) choose(ch *chain, f family, k class, p pool) {
	if k.sticky > 0 {
		c.chooseSticky(ch, f, k, p)
	}
	service := uint32(word0)
	place := service + f.words() + 2
	ch.add("one of the endpoints", f.loadService(k.do, service), c.place(f, k, p, place),
		rule{f.get(service, word0, kindEndpoints)}, f.send(word0))
	// Rules and sets change in one transaction, but a packet may look into one
	// before it and into the other after it. The client sends it again.
	ch.add("its endpoints change at this moment", drop())
}

func (c ServiceConfig) chooseSticky(ch *chain, f family, k class, p pool) {
	client := uint32(word0)
	service := client + f.words()
	endpoint := service + f.words() + 2
	timeout := time.Duration(k.sticky) * time.Second
	remember := func(operation uint32) rule {
		return rule{&expr.Dynset{
			SrcRegKey: client, SrcRegData: endpoint, SetName: f.set(kindClients).name(),
			Operation: operation, Timeout: timeout,
		}}
	}
	known := join(rule{f.load(f.saddr, client)}, f.loadService(k.do, service))
	ch.add("the endpoint that the client had, if it is still one", known,
		rule{f.get(client, endpoint, kindClients), f.get(service, endpoint+f.words(), p.sticky)},
		remember(unix.NFT_DYNSET_OP_UPDATE), f.send(endpoint))
	// An update does not change the value, so what was remembered must go first.
	ch.add("one of the endpoints, from now on this client's", known, c.place(f, k, p, endpoint),
		rule{f.get(service, endpoint, kindEndpoints)},
		remember(dynsetDelete), remember(unix.NFT_DYNSET_OP_ADD), f.send(endpoint))
}

// dynsetDelete is NFT_DYNSET_OP_DELETE, which the library's constants lack.
const dynsetDelete = 2

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

// loadService loads the service behind the destination. External addresses have the
// port of the service, node ports have another.
func (f family) loadService(a action, at uint32) rule {
	switch a &^ actRestricted {
	case actExternal, actExternalLocal:
		return append(f.loadDestination(at), f.get(at, at, kindBehindAddress))
	case actNodePort, actNodePortLocal:
		port := at + f.words()
		return rule{loadProtocol(port), loadPort(port + 1), f.get(port, at, kindBehindNode), f.get(port, port+1, kindPortBehind)}
	}
	return f.loadDestination(at)
}

// loadOriginalPort loads the port to which a connection was opened.
func loadOriginalPort(register uint32) expr.Any {
	return &expr.Ct{Key: expr.CtKeyPROTODST, Register: register}
}

// get looks the key at one register up in a map and puts what it finds at another.
func (f family) get(key, val uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, DestRegister: val, IsDestRegSet: true, SetName: f.set(k).name()}
}

// in matches when the key at a register is in a set.
func (f family) in(key uint32, k setKind) expr.Any {
	return &expr.Lookup{SourceRegister: key, SetName: f.set(k).name()}
}

// decide looks the class of the frontend at the first register up and goes where
// connections of that class go.
func (f family) decide(k setKind) rule {
	return rule{f.get(word0, word0, k), f.get(word0, unix.NFT_REG_VERDICT, kindClasses)}
}

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
