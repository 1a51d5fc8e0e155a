package nft

import (
	"net/netip"
	"slices"
)

// Direction says on whose behalf a connection is judged.
type Direction uint8

const (
	Egress  Direction = iota // of the pod that opens the connection
	Ingress                  // of the pod that it is opened to
)

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Verdict is what a rule does with a connection that it matches.
type Verdict uint8

const (
	Allow Verdict = iota // in this direction; the other one is judged as well
	Deny
	Pass // go on with the rule after the one that led to this chain
	Call // go on in the chain Rule.Chain, and come back if it decides nothing
)

// PolicyRule is one rule of a chain. All its conditions must hold; the empty
// ones always do.
type PolicyRule struct {
	Comment   string // for those who read the rules
	Peers     string // name of a set of Addresses or Blocks with the connection's other end
	Ports     string // name of a set of Ports with the connection's protocol and destination port
	PeerPorts string // name of a set of AddressPorts, for ports that depend on the peer
	Itself    string // name of a set of SameAddresses: the pod connects to itself
	Then      Verdict
	Chain     string // of Call
}

// PolicyChain is a sequence of rules for one direction and address family. A
// connection that reaches the end of the outermost chain is allowed.
type PolicyChain struct {
	Direction Direction
	V6        bool
	Rules     []PolicyRule
}

func (c PolicyChain) equal(o PolicyChain) bool {
	return c.Direction == o.Direction && c.V6 == o.V6 && slices.Equal(c.Rules, o.Rules)
}

// SetKind is what the elements of a policy set are.
type SetKind uint8

const (
	Addresses     SetKind = iota // single addresses of one family: AddrElement
	Blocks                       // ranges of addresses of one family: BlockElement
	Ports                        // ranges of ports: PortElement
	AddressPorts                 // address, protocol and port: AddrPortElement
	SameAddresses                // an address, twice: SameAddrElement
)

// PolicySet describes a set. Elements of Blocks may neither overlap nor
// be neighbours.
type PolicySet struct {
	Kind    SetKind
	V6      bool // not for Ports
	Ranges  bool // of Ports: elements may be more than one port
	Comment string
}

// Element is one element of a set, as the kernel compares it.
type Element struct{ key, end string }

// AddrElement is an element of a set of Addresses.
func AddrElement(a netip.Addr) Element { return Element{key: string(a.AsSlice())} }

// BlockElement is an element of a set of Blocks: from the first to the last address.
func BlockElement(first, last netip.Addr) Element {
	return Element{key: string(first.AsSlice()), end: string(last.AsSlice())}
}

// PortElement is an element of a set of Ports: from the first to the last port.
func PortElement(protocol uint8, first, last uint16) Element {
	key := func(p uint16) string { return string(slices.Concat(word(protocol), word(portBytes(p)...))) }
	return Element{key: key(first), end: key(last)}
}

// AddrPortElement is an element of a set of AddressPorts.
func AddrPortElement(a netip.Addr, protocol uint8, port uint16) Element {
	return Element{key: string(slices.Concat(a.AsSlice(), word(protocol), word(portBytes(port)...)))}
}

// SameAddrElement is an element of a set of SameAddresses.
func SameAddrElement(a netip.Addr) Element {
	return Element{key: string(slices.Concat(a.AsSlice(), a.AsSlice()))}
}

// Refuse in place of a chain's name refuses every connection.
const Refuse = "\x00refuse"

// subject is an address of a pod of this node that is judged in one direction.
type subject struct {
	direction Direction
	addr      netip.Addr
}

// PolicyTable is the table of a node's network policies. Its methods stage
// changes; Commit makes them true in one transaction whose size depends on
// what changed, not on what there is. While no pod is judged the table does not
// exist, and packets pay nothing for it.
//
// It may not be used from several goroutines at a time.
type PolicyTable struct {
	name   string
	socket socket

	// What should be true after the next Commit.
	sets     map[string]*policySet
	chains   map[string]PolicyChain
	subjects map[subject]string // chain

	// What the kernel was told otherwise at the last Commit.
	oldSets     map[string]bool             // existed
	oldElements map[string]map[Element]bool // existed, for sets that did and still do
	oldChains   map[string]bool             // existed
	oldSubjects map[subject]string          // chain; empty for none

	known   bool  // the kernel holds what Commit wrote last, as far as we know
	present bool  // the table exists, as far as we know; valid if known
	damage  error // see Damaged
}

type policySet struct {
	PolicySet
	elements map[Element]int // how often it was inserted
}

// NewPolicyTable returns the table of a node without touching the kernel.
func NewPolicyTable(node string) *PolicyTable {
	t := &PolicyTable{
		name: TableName(node, "policy"),
		sets: map[string]*policySet{}, chains: map[string]PolicyChain{}, subjects: map[subject]string{},
	}
	t.forget()
	return t
}

// Name returns the table's name; its family is inet.
func (t *PolicyTable) Name() string { return t.name }

// forget empties the list of what was different before.
func (t *PolicyTable) forget() {
	t.oldSets, t.oldElements = map[string]bool{}, map[string]map[Element]bool{}
	t.oldChains, t.oldSubjects = map[string]bool{}, map[subject]string{}
}

// AddSet adds an empty set. A name always stands for the same description.
func (t *PolicyTable) AddSet(name string, s PolicySet) {
	if t.sets[name] != nil {
		return
	}
	if _, touched := t.oldSets[name]; !touched {
		t.oldSets[name] = false
	}
	t.sets[name] = &policySet{s, map[Element]int{}}
}

// RemoveSet removes a set that no rule names any more.
func (t *PolicyTable) RemoveSet(name string) {
	s := t.sets[name]
	if s == nil {
		return
	}
	for e := range s.elements {
		t.touch(name, e, true)
	}
	if _, touched := t.oldSets[name]; !touched {
		t.oldSets[name] = true
	}
	delete(t.sets, name)
}

// Insert adds an element to a set. One that was inserted twice must be deleted
// twice.
func (t *PolicyTable) Insert(set string, e Element) {
	s := t.sets[set]
	if s.elements[e] == 0 {
		t.touch(set, e, false)
	}
	s.elements[e]++
}

// Delete removes an element from a set.
func (t *PolicyTable) Delete(set string, e Element) {
	s := t.sets[set]
	switch s.elements[e] {
	case 0:
	case 1:
		t.touch(set, e, true)
		delete(s.elements, e)
	default:
		s.elements[e]--
	}
}

func (t *PolicyTable) touch(set string, e Element, existed bool) {
	old := t.oldElements[set]
	if old == nil {
		old = map[Element]bool{}
		t.oldElements[set] = old
	}
	if _, touched := old[e]; !touched {
		old[e] = existed
	}
}

// SetChain adds a chain or gives an existing one other rules.
func (t *PolicyTable) SetChain(name string, c PolicyChain) {
	before, exists := t.chains[name]
	if exists && before.equal(c) {
		return
	}
	if _, touched := t.oldChains[name]; !touched {
		t.oldChains[name] = exists
	}
	t.chains[name] = c
}

// RemoveChain removes a chain to which nothing leads any more.
func (t *PolicyTable) RemoveChain(name string) {
	if _, exists := t.chains[name]; !exists {
		return
	}
	if _, touched := t.oldChains[name]; !touched {
		t.oldChains[name] = true
	}
	delete(t.chains, name)
}

// Judge makes a chain decide about the connections of an address of a pod of
// this node: Refuse refuses all, and the empty name lets all pass.
func (t *PolicyTable) Judge(d Direction, a netip.Addr, chain string) {
	s := subject{d, a}
	before := t.subjects[s]
	if before == chain {
		return
	}
	if _, touched := t.oldSubjects[s]; !touched {
		t.oldSubjects[s] = before
	}
	if chain == "" {
		delete(t.subjects, s)
	} else {
		t.subjects[s] = chain
	}
}
