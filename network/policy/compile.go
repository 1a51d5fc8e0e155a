package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"kedge/network/nft"
)

// set is a set of the table and who is in it. Sets are named by what is in them,
// so policies that say the same share them.
type set struct {
	name    string
	desc    nft.PolicySet
	follows *podSelector  // the pods that are in it; nil if it does not change
	port    *namedPort    // with this port of theirs
	within  []span        // with those of their addresses only; nil for all
	itself  bool          // the addresses of this node's pods are in it
	fixed   []nft.Element // what else is in it
	refs    int
}

// elements returns what a pod that the set follows contributes.
func (s *set) elements(p *pod) []nft.Element {
	if !p.peer {
		return nil
	}
	var out []nft.Element
	for _, a := range p.addrs {
		switch {
		case a.Is6() != s.desc.V6:
		case s.within != nil && !slices.ContainsFunc(s.within, func(b span) bool { return b.contains(a) }):
		case s.port == nil:
			out = append(out, nft.AddrElement(a))
		default:
			for _, n := range p.resolve(s.port.protocol, s.port.name) {
				out = append(out, nft.AddrPortElement(a, s.port.protocol, n))
			}
		}
	}
	return out
}

// acquireSet returns the set of that name with one reference more.
func (e *engine) acquireSet(s *set) *set {
	if known := e.sets[s.name]; known != nil {
		known.refs++
		return known
	}
	s.refs = 1
	e.sets[s.name] = s
	e.table.AddSet(s.name, s.desc)
	for _, el := range s.fixed {
		e.table.Insert(s.name, el)
	}
	if s.itself {
		for _, a := range e.owners {
			for _, addr := range a.addrs {
				if addr.Is6() == s.desc.V6 {
					e.table.Insert(s.name, nft.SameAddrElement(addr))
				}
			}
		}
	}
	if s.follows == nil {
		return s
	}
	add := func(name string, ns *namespace) {
		for _, p := range ns.pods {
			if p.now != nil && s.follows.matches(name, ns.labels, p.now) {
				for _, el := range s.elements(p.now) {
					e.table.Insert(s.name, el)
				}
			}
		}
	}
	if s.follows.namespaces == nil {
		if ns := e.namespaces[s.follows.namespace]; ns != nil {
			add(s.follows.namespace, ns)
		}
		return s
	}
	for name, ns := range e.namespaces {
		add(name, ns)
	}
	return s
}

func (e *engine) releaseSet(s *set) {
	if s.refs--; s.refs == 0 {
		delete(e.sets, s.name)
		e.table.RemoveSet(s.name)
	}
}

// named names something by its content. 96 bits keep anybody from finding a
// selector that shares the name of another's.
func named(prefix, content string) string {
	sum := sha256.Sum256([]byte(content))
	return prefix + "-" + hex.EncodeToString(sum[:12])
}

func familySuffix(v6 bool) string {
	if v6 {
		return "6"
	}
	return "4"
}

func podsSet(s podSelector, v6 bool) *set {
	text := s.String()
	return &set{
		name: named("pods"+familySuffix(v6), text), follows: &s,
		desc: nft.PolicySet{Kind: nft.Addresses, V6: v6, Comment: text},
	}
}

func podPortsSet(s podSelector, port namedPort, v6 bool) *set {
	text := port.String() + " of " + s.String()
	return &set{
		name: named("pod-ports"+familySuffix(v6), text), follows: &s, port: &port,
		desc: nft.PolicySet{Kind: nft.AddressPorts, V6: v6, Comment: text},
	}
}

// blockPortsSet is the pods in ranges of addresses, whoever they are.
func blockPortsSet(spans []span, port namedPort, v6 bool) *set {
	text := port.String() + " of pods in " + describe(spans)
	s := podPortsSet(everybody(), port, v6)
	s.name, s.within, s.desc.Comment = named("pod-ports"+familySuffix(v6), text), spans, text
	return s
}

// everybody selects all pods.
func everybody() podSelector {
	return podSelector{namespaces: labels.Everything(), pods: labels.Everything()}
}

func blocksSet(spans []span, v6 bool) *set {
	text := describe(spans)
	s := &set{name: named("blocks"+familySuffix(v6), text), desc: nft.PolicySet{Kind: nft.Blocks, V6: v6, Comment: text}}
	for _, b := range spans {
		s.fixed = append(s.fixed, nft.BlockElement(b.first, b.last))
	}
	return s
}

func portsSet(ports []portRange) *set {
	text := describe(ports)
	s := &set{name: named("ports", text), desc: nft.PolicySet{Kind: nft.Ports, Comment: text}}
	for _, p := range ports {
		s.fixed = append(s.fixed, nft.PortElement(p.protocol, p.first, p.last))
		s.desc.Ranges = s.desc.Ranges || p.first != p.last
	}
	return s
}

func itselfName(v6 bool) string { return "itself" + familySuffix(v6) }

func itselfSet(v6 bool) *set {
	return &set{
		name: itselfName(v6), itself: true,
		desc: nft.PolicySet{Kind: nft.SameAddresses, V6: v6, Comment: "this node's pods, as both ends of a connection"},
	}
}

// chainKey tells the chains of one policy apart. Pods that give a named port
// different numbers need different ones.
type chainKey struct {
	direction nft.Direction
	v6        bool
	ports     string // what the policy's named ports are for the pod; ingress only
}

// chain is a policy as a chain of the table, for the pods whose named ports are
// the same, or the policies of a cluster-wide tier for the pods that they select.
type chain struct {
	name   string
	key    chainKey
	policy *policy          // or
	tier   []*clusterPolicy // in order
	ports  map[namedPort][]uint16
	sets   []*set
	refs   int
}

// portsFor resolves the named ports of rules for the pod that connections are
// opened to, and describes the result.
func portsFor(d nft.Direction, rules []rule, p *pod) (map[namedPort][]uint16, string) {
	ports := map[namedPort][]uint16{}
	var text strings.Builder
	for _, r := range rules {
		for _, n := range r.named {
			if _, done := ports[n]; d == nft.Ingress && !done {
				ports[n] = p.resolve(n.protocol, n.name)
				fmt.Fprint(&text, n, ports[n], ";")
			}
		}
	}
	return ports, text.String()
}

func (e *engine) acquireChain(np *policy, d nft.Direction, v6 bool, p *pod) *chain {
	key := chainKey{direction: d, v6: v6}
	var ports map[namedPort][]uint16
	ports, key.ports = portsFor(d, np.rules[d], p)
	if c := np.chains[key]; c != nil {
		c.refs++
		return c
	}
	c := &chain{name: chainName(np, key), key: key, policy: np, ports: ports, refs: 1}
	np.chains[key] = c
	e.rewriteChain(c)
	return c
}

// maxName keeps names of chains readable; the kernel would take more.
const maxName = 100

// chainName is short for a reader: "ingress4/shop/db".
func chainName(np *policy, key chainKey) string {
	prefix := key.direction.String() + familySuffix(key.v6)
	name := prefix + "/" + np.key.String()
	if key.ports != "" {
		name = named(name+"/ports", key.ports)
	}
	if len(name) > maxName {
		name = named(prefix+"/"+np.key.namespace, name)
	}
	return name
}

// rewriteChain makes a chain say what its policies do.
func (e *engine) rewriteChain(c *chain) {
	before := c.sets
	c.sets = nil
	out := nft.PolicyChain{Direction: c.key.direction, V6: c.key.v6}
	if c.policy != nil {
		for i, r := range c.policy.rules[c.key.direction] {
			out.Rules = append(out.Rules, e.compile(c, r, nft.Allow, fmt.Sprintf("%s rule %d: ", c.policy.key, i+1))...)
		}
	}
	for _, cp := range c.tier {
		for i, r := range cp.rules[c.key.direction] {
			label := fmt.Sprintf("%s rule %d", cp.name, i+1)
			if r.name != "" {
				label += " (" + r.name + ")"
			}
			out.Rules = append(out.Rules, e.compile(c, r.rule, r.action, label+": ")...)
		}
	}
	e.table.SetChain(c.name, out)
	for _, s := range before {
		e.releaseSet(s)
	}
}

// compile spells one rule of a policy out, and notes the sets it needs.
func (e *engine) compile(c *chain, r rule, then nft.Verdict, label string) []nft.PolicyRule {
	use := func(s *set) string {
		s = e.acquireSet(s)
		c.sets = append(c.sets, s)
		return s.name
	}
	blocks := slices.DeleteFunc(slices.Clone(r.blocks), func(b span) bool { return b.first.Is6() != c.key.v6 })
	ports := slices.Clone(r.ports)
	for _, n := range r.named {
		for _, number := range c.ports[n] {
			ports = append(ports, portRange{n.protocol, number, number})
		}
	}
	ports = mergePorts(ports)

	var out []nft.PolicyRule
	add := func(nr nft.PolicyRule, comment string) {
		nr.Comment, nr.Then = label+comment, then
		out = append(out, nr)
	}
	if r.anyPort || len(ports) > 0 {
		var portSet, by string
		if !r.anyPort {
			portSet, by = use(portsSet(ports)), ", "+describe(ports)
		}
		if r.anyPeer {
			add(nft.PolicyRule{Ports: portSet}, "everybody"+by)
		}
		for _, s := range r.selectors {
			add(nft.PolicyRule{Peers: use(podsSet(s, c.key.v6)), Ports: portSet}, s.String()+by)
		}
		if len(blocks) > 0 {
			add(nft.PolicyRule{Peers: use(blocksSet(blocks, c.key.v6)), Ports: portSet}, describe(blocks)+by)
		}
	}
	if c.key.direction == nft.Egress {
		// Which port has the name depends on the pod that the connection goes to.
		selectors := r.selectors
		if r.anyPeer {
			selectors = []podSelector{everybody()}
		}
		for _, n := range r.named {
			for _, s := range selectors {
				add(nft.PolicyRule{PeerPorts: use(podPortsSet(s, n, c.key.v6))}, s.String()+", "+n.String())
			}
			if len(blocks) > 0 {
				add(nft.PolicyRule{PeerPorts: use(blockPortsSet(blocks, n, c.key.v6))}, describe(blocks)+", "+n.String())
			}
		}
	}
	return out
}

func (e *engine) releaseChain(c *chain) {
	if c.refs--; c.refs > 0 {
		return
	}
	if c.policy != nil {
		delete(c.policy.chains, c.key)
	} else {
		delete(e.tiers, c.name)
	}
	e.table.RemoveChain(c.name)
	for _, s := range c.sets {
		e.releaseSet(s)
	}
}

// group is what judges all pods that the same policies select:
//
//	admin tier     the first rule that matches decides, or passes on
//	policies       each in turn, and in the end refusal; if there are none
//	baseline tier  the first rule that matches decides
//
// What reaches the end is allowed.
type group struct {
	name   string
	chains []*chain
	itself *set
	refs   int
}

// acquireGroup returns who judges a pod in a direction; nil for nobody.
func (e *engine) acquireGroup(d nft.Direction, v6 bool, ns *namespace, p *pod) *group {
	admin := e.acquireTier(false, d, v6, ns, p)
	var policies []*chain
	for _, np := range ns.selecting(d, p) {
		policies = append(policies, e.acquireChain(np, d, v6, p))
	}
	var baseline *chain
	if len(policies) == 0 {
		baseline = e.acquireTier(true, d, v6, ns, p)
	}
	var chains []*chain
	rules := nft.PolicyChain{Direction: d, V6: v6}
	call := func(c *chain, comment string) {
		chains = append(chains, c)
		rules.Rules = append(rules.Rules, nft.PolicyRule{Comment: comment, Then: nft.Call, Chain: c.name})
	}
	itself := nft.PolicyRule{Comment: "a pod may connect to itself", Itself: itselfName(v6), Then: nft.Allow}
	if admin != nil || baseline != nil {
		rules.Rules = append(rules.Rules, itself) // before anything may refuse it
	}
	if admin != nil {
		call(admin, "admin tier")
	}
	var names []string
	for _, c := range policies {
		names = append(names, c.policy.key.String())
		call(c, "policy "+c.policy.key.String())
	}
	switch {
	case len(policies) > 0 && admin != nil:
		rules.Rules = append(rules.Rules, nft.PolicyRule{Comment: "allowed by none of " + strings.Join(names, ", "), Then: nft.Deny})
	case len(policies) > 0:
		rules.Rules = append(rules.Rules, itself, nft.PolicyRule{Comment: "allowed by none of " + strings.Join(names, ", "), Then: nft.Deny})
	case baseline != nil:
		call(baseline, "baseline tier")
	}
	if len(chains) == 0 {
		return nil
	}
	var content strings.Builder
	for _, c := range chains {
		content.WriteString(c.name + "\n")
	}
	name := named("judge-"+d.String()+familySuffix(v6), content.String())
	if g := e.groups[name]; g != nil {
		g.refs++
		for _, c := range chains {
			e.releaseChain(c) // the group holds them already
		}
		return g
	}
	g := &group{name: name, chains: chains, itself: e.acquireSet(itselfSet(v6)), refs: 1}
	e.groups[name] = g
	e.table.SetChain(name, rules)
	return g
}

func (e *engine) releaseGroup(g *group) {
	if g.refs--; g.refs > 0 {
		return
	}
	delete(e.groups, g.name)
	e.table.RemoveChain(g.name)
	e.releaseSet(g.itself)
	for _, c := range g.chains {
		e.releaseChain(c)
	}
}
