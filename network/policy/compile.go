package policy

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/labels"

	"kedge/network/nft/policies"
)

// set is a set of the table with its members. Sets are named by their content, so policies
// with equal parts share them.
type set struct {
	name    string
	desc    policies.Set
	follows *podSelector       // selects the member pods; nil for a constant set
	port    *namedPort         // with this port of the pods
	within  []addrRange        // restricts the pods' addresses; nil for all
	itself  bool               // contains the addresses of this node's pods
	fixed   []policies.Element // constant elements
	refs    int
}

// elements returns the elements of a pod that the set follows.
func (s *set) elements(p *pod) []policies.Element {
	if !p.peer {
		return nil
	}
	var out []policies.Element
	for _, a := range p.addrs {
		switch {
		case a.Is6() != s.desc.V6:
		case s.within != nil && !slices.ContainsFunc(s.within, func(b addrRange) bool { return b.contains(a) }):
		case s.port == nil:
			out = append(out, policies.AddrElement(a))
		default:
			for _, n := range p.resolve(s.port.protocol, s.port.name) {
				out = append(out, policies.AddrPortElement(a, s.port.protocol, n))
			}
		}
	}
	return out
}

// acquireSet returns the set of that name and increments its references.
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
					e.table.Insert(s.name, policies.SameAddrElement(addr))
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

// hashedName returns a name that depends on content. 96 bits prevent a selector from being
// crafted to share the name of another.
func hashedName(prefix, content string) string {
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
		name: hashedName("pods"+familySuffix(v6), text), follows: &s,
		desc: policies.Set{Kind: policies.Addresses, V6: v6, Comment: text},
	}
}

func podPortsSet(s podSelector, port namedPort, v6 bool) *set {
	text := port.String() + " of " + s.String()
	return &set{
		name: hashedName("pod-ports"+familySuffix(v6), text), follows: &s, port: &port,
		desc: policies.Set{Kind: policies.AddressPorts, V6: v6, Comment: text},
	}
}

// blockPortsSet returns the set of all pods in ranges of addresses.
func blockPortsSet(spans []addrRange, port namedPort, v6 bool) *set {
	text := port.String() + " of pods in " + describe(spans)
	s := podPortsSet(allPods(), port, v6)
	s.name, s.within, s.desc.Comment = hashedName("pod-ports"+familySuffix(v6), text), spans, text
	return s
}

// allPods selects all pods.
func allPods() podSelector {
	return podSelector{namespaces: labels.Everything(), pods: labels.Everything()}
}

func blocksSet(spans []addrRange, v6 bool) *set {
	text := describe(spans)
	s := &set{name: hashedName("blocks"+familySuffix(v6), text), desc: policies.Set{Kind: policies.Blocks, V6: v6, Comment: text}}
	for _, b := range spans {
		s.fixed = append(s.fixed, policies.BlockElement(b.first, b.last))
	}
	return s
}

func portsSet(ports []portRange) *set {
	text := describe(ports)
	s := &set{name: hashedName("ports", text), desc: policies.Set{Kind: policies.Ports, Comment: text}}
	for _, p := range ports {
		s.fixed = append(s.fixed, policies.PortElement(p.protocol, p.first, p.last))
		s.desc.Ranges = s.desc.Ranges || p.first != p.last
	}
	return s
}

func itselfName(v6 bool) string { return "itself" + familySuffix(v6) }

func itselfSet(v6 bool) *set {
	return &set{
		name: itselfName(v6), itself: true,
		desc: policies.Set{Kind: policies.SameAddresses, V6: v6, Comment: "this node's pods, as both ends of a connection"},
	}
}

// chainKey distinguishes the chains of one policy. Pods with different numbers for a named
// port need different chains.
type chainKey struct {
	direction policies.Direction
	v6        bool
	ports     string // numbers of the policy's named ports for the pod; ingress only
}

// chain is the chain of a policy for the pods with the same named ports, or of the policies
// of a cluster-wide tier for the pods that they select.
type chain struct {
	name   string
	key    chainKey
	policy *policy          // or
	tier   []*clusterPolicy // in order
	ports  map[namedPort][]uint16
	sets   []*set
	refs   int
}

// portsFor resolves the named ports of rules for the server pod of connections, and
// describes the result.
func portsFor(d policies.Direction, rules []rule, p *pod) (map[namedPort][]uint16, string) {
	ports := map[namedPort][]uint16{}
	var text strings.Builder
	for _, r := range rules {
		for _, n := range r.named {
			if _, done := ports[n]; d == policies.Ingress && !done {
				ports[n] = p.resolve(n.protocol, n.name)
				fmt.Fprint(&text, n, ports[n], ";")
			}
		}
	}
	return ports, text.String()
}

func (e *engine) acquireChain(np *policy, d policies.Direction, v6 bool, p *pod) *chain {
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

// maxName keeps names of chains readable; the kernel allows longer ones.
const maxName = 100

// chainName returns a short, readable name: "ingress4/shop/db".
func chainName(np *policy, key chainKey) string {
	prefix := key.direction.String() + familySuffix(key.v6)
	name := prefix + "/" + np.key.String()
	if key.ports != "" {
		name = hashedName(name+"/ports", key.ports)
	}
	if len(name) > maxName {
		name = hashedName(prefix+"/"+np.key.namespace, name)
	}
	return name
}

// rewriteChain writes the rules of a chain.
func (e *engine) rewriteChain(c *chain) {
	before := c.sets
	c.sets = nil
	out := policies.Chain{Direction: c.key.direction, V6: c.key.v6}
	if c.policy != nil {
		for i, r := range c.policy.rules[c.key.direction] {
			out.Rules = append(out.Rules, e.compile(c, r, policies.Allow, fmt.Sprintf("%s rule %d: ", c.policy.key, i+1))...)
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

// compile returns the rules of the table for one rule of a policy, and records the sets
// that they use.
func (e *engine) compile(c *chain, r rule, then policies.Verdict, label string) []policies.Rule {
	use := func(s *set) string {
		s = e.acquireSet(s)
		c.sets = append(c.sets, s)
		return s.name
	}
	blocks := slices.DeleteFunc(slices.Clone(r.blocks), func(b addrRange) bool { return b.first.Is6() != c.key.v6 })
	ports := slices.Clone(r.ports)
	for _, n := range r.named {
		for _, number := range c.ports[n] {
			ports = append(ports, portRange{n.protocol, number, number})
		}
	}
	ports = mergePorts(ports)

	var out []policies.Rule
	add := func(nr policies.Rule, comment string) {
		nr.Comment, nr.Then = label+comment, then
		out = append(out, nr)
	}
	if r.anyPort || len(ports) > 0 {
		var portSet, by string
		if !r.anyPort {
			portSet, by = use(portsSet(ports)), ", "+describe(ports)
		}
		if r.anyPeer {
			add(policies.Rule{Ports: portSet}, "everybody"+by)
		}
		for _, s := range r.selectors {
			add(policies.Rule{Peers: use(podsSet(s, c.key.v6)), Ports: portSet}, s.String()+by)
		}
		if len(blocks) > 0 {
			add(policies.Rule{Peers: use(blocksSet(blocks, c.key.v6)), Ports: portSet}, describe(blocks)+by)
		}
	}
	if c.key.direction == policies.Egress {
		// The number of a named port depends on the pod that the connection goes to.
		selectors := r.selectors
		if r.anyPeer {
			selectors = []podSelector{allPods()}
		}
		for _, n := range r.named {
			for _, s := range selectors {
				add(policies.Rule{PeerPorts: use(podPortsSet(s, n, c.key.v6))}, s.String()+", "+n.String())
			}
			if len(blocks) > 0 {
				add(policies.Rule{PeerPorts: use(blockPortsSet(blocks, n, c.key.v6))}, describe(blocks)+", "+n.String())
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

// group is the chain for all pods that the same policies select:
//
//	admin tier     the first matching rule decides, or passes
//	policies       each in turn, then deny; without policies
//	baseline tier  the first matching rule decides
//
// A connection that reaches the end is allowed.
type group struct {
	name   string
	chains []*chain
	itself *set
	refs   int
}

// acquireGroup returns the group of a pod in a direction; nil if no policy selects it.
func (e *engine) acquireGroup(d policies.Direction, v6 bool, ns *namespace, p *pod) *group {
	admin := e.acquireTier(false, d, v6, ns, p)
	var ofPolicies []*chain
	for _, np := range ns.selecting(d, p) {
		ofPolicies = append(ofPolicies, e.acquireChain(np, d, v6, p))
	}
	var baseline *chain
	if len(ofPolicies) == 0 {
		baseline = e.acquireTier(true, d, v6, ns, p)
	}
	var chains []*chain
	rules := policies.Chain{Direction: d, V6: v6}
	call := func(c *chain, comment string) {
		chains = append(chains, c)
		rules.Rules = append(rules.Rules, policies.Rule{Comment: comment, Then: policies.Call, Chain: c.name})
	}
	itself := policies.Rule{Comment: "a pod may connect to itself", Itself: itselfName(v6), Then: policies.Allow}
	if admin != nil || baseline != nil {
		rules.Rules = append(rules.Rules, itself) // before anything may refuse it
	}
	if admin != nil {
		call(admin, "admin tier")
	}
	var names []string
	for _, c := range ofPolicies {
		names = append(names, c.policy.key.String())
		call(c, "policy "+c.policy.key.String())
	}
	switch {
	case len(ofPolicies) > 0 && admin != nil:
		rules.Rules = append(rules.Rules, policies.Rule{Comment: "allowed by none of " + strings.Join(names, ", "), Then: policies.Deny})
	case len(ofPolicies) > 0:
		rules.Rules = append(rules.Rules, itself, policies.Rule{Comment: "allowed by none of " + strings.Join(names, ", "), Then: policies.Deny})
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
	name := hashedName("judge-"+d.String()+familySuffix(v6), content.String())
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
