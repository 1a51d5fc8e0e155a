package policies

import (
	"net/netip"
	"slices"

	"kedge/network/nft"
)

// Direction is the direction in which a policy applies to a connection.
type Direction uint8

const (
	Egress  Direction = iota // for the pod that opens the connection
	Ingress                  // for the pod that accepts the connection
)

func (d Direction) String() string {
	if d == Egress {
		return "egress"
	}
	return "ingress"
}

// Verdict is the effect of a rule on a connection that it matches.
type Verdict uint8

const (
	Allow Verdict = iota // in this direction; the rules of the other direction still apply
	Deny
	Pass // continue with the rule after the one that jumped to this chain
	Call // jump to the chain Rule.Chain, and continue here if it has no verdict
)

// Rule is one rule of a chain. A connection must meet all conditions that are set.
type Rule struct {
	Comment   string // for readers of the nftables ruleset
	Peers     string // name of a set of Addresses or Blocks with the connection's other end
	Ports     string // name of a set of Ports with the connection's protocol and destination port
	PeerPorts string // name of a set of AddressPorts, for ports that depend on the peer
	Itself    string // name of a set of SameAddresses: the pod connects to itself
	Then      Verdict
	Chain     string // of Call
}

// Chain is a sequence of rules for one direction and address family. A connection that
// reaches the end of the first chain is allowed.
type Chain struct {
	Direction Direction
	V6        bool
	Rules     []Rule
}

func (c Chain) equal(o Chain) bool {
	return c.Direction == o.Direction && c.V6 == o.V6 && slices.Equal(c.Rules, o.Rules)
}

// SetKind is the type of the elements of a set.
type SetKind uint8

const (
	Addresses     SetKind = iota // single addresses of one family: AddrElement
	Blocks                       // ranges of addresses of one family: BlockElement
	Ports                        // ranges of ports: PortElement
	AddressPorts                 // address, protocol and port: AddrPortElement
	SameAddresses                // an address, twice: SameAddrElement
)

// Set describes a set. Elements of Blocks neither overlap nor touch.
type Set struct {
	Kind    SetKind
	V6      bool // not for Ports
	Ranges  bool // of Ports: elements may be more than one port
	Comment string
}

// Element is an element of a set, encoded as in the kernel.
type Element struct{ key, end string }

// AddrElement is an element of a set of Addresses.
func AddrElement(a netip.Addr) Element { return Element{key: string(a.AsSlice())} }

// BlockElement is an element of a set of Blocks: from the first to the last address.
func BlockElement(first, last netip.Addr) Element {
	return Element{key: string(first.AsSlice()), end: string(last.AsSlice())}
}

// PortElement is an element of a set of Ports: from the first to the last port.
func PortElement(protocol uint8, first, last uint16) Element {
	key := func(p uint16) string { return string(slices.Concat(nft.Word(protocol), nft.Word(nft.PortBytes(p)...))) }
	return Element{key: key(first), end: key(last)}
}

// AddrPortElement is an element of a set of AddressPorts.
func AddrPortElement(a netip.Addr, protocol uint8, port uint16) Element {
	return Element{key: string(slices.Concat(a.AsSlice(), nft.Word(protocol), nft.Word(nft.PortBytes(port)...)))}
}

// SameAddrElement is an element of a set of SameAddresses.
func SameAddrElement(a netip.Addr) Element {
	return Element{key: string(slices.Concat(a.AsSlice(), a.AsSlice()))}
}

// DenyAll in place of a chain's name denies all connections.
const DenyAll = "\x00refuse"

// subject is an address of a pod of this node and a direction in which policies apply to
// it.
type subject struct {
	direction Direction
	addr      netip.Addr
}

// Table is the table of a node's network policies. Its methods stage changes; Commit writes
// them in one transaction whose size depends on the changes, not on the content. While no
// policy applies to a pod of the node, the table does not exist, and packets pay nothing
// for it.
//
// A Table must not be used from several goroutines at the same time.
type Table struct {
	name   string
	socket nft.Socket

	// The content after the next Commit.
	sets     map[string]*set
	chains   map[string]Chain
	subjects map[subject]string // chain

	// The content at the last Commit, where it differs.
	oldSets     map[string]bool             // existed
	oldElements map[string]map[Element]bool // existed, for sets that did and still do
	oldChains   map[string]bool             // existed
	oldSubjects map[subject]string          // chain; empty for none

	known   bool  // the kernel is assumed to have the content of the last Commit
	present bool  // the table is assumed to exist; valid if known
	damage  error // see Damaged
}

type set struct {
	Set
	elements map[Element]int // number of insertions
}

// NewTable returns the table of a node without touching the kernel.
func NewTable(node string) *Table {
	t := &Table{
		name: nft.TableName(node, "policy"),
		sets: map[string]*set{}, chains: map[string]Chain{}, subjects: map[subject]string{},
	}
	t.resetChanges()
	return t
}

// Name returns the table's name; its family is inet.
func (t *Table) Name() string { return t.name }

// resetChanges clears the recorded differences to the last Commit.
func (t *Table) resetChanges() {
	t.oldSets, t.oldElements = map[string]bool{}, map[string]map[Element]bool{}
	t.oldChains, t.oldSubjects = map[string]bool{}, map[subject]string{}
}

// AddSet adds an empty set. A name always has the same description.
func (t *Table) AddSet(name string, s Set) {
	if t.sets[name] != nil {
		return
	}
	if _, touched := t.oldSets[name]; !touched {
		t.oldSets[name] = false
	}
	t.sets[name] = &set{s, map[Element]int{}}
}

// RemoveSet removes a set that no rule uses.
func (t *Table) RemoveSet(name string) {
	s := t.sets[name]
	if s == nil {
		return
	}
	for e := range s.elements {
		t.recordElement(name, e, true)
	}
	if _, touched := t.oldSets[name]; !touched {
		t.oldSets[name] = true
	}
	delete(t.sets, name)
}

// Insert adds an element to a set. An element that was inserted twice must be deleted
// twice.
func (t *Table) Insert(set string, e Element) {
	s := t.sets[set]
	if s.elements[e] == 0 {
		t.recordElement(set, e, false)
	}
	s.elements[e]++
}

// Delete removes an element from a set.
func (t *Table) Delete(set string, e Element) {
	s := t.sets[set]
	switch s.elements[e] {
	case 0:
	case 1:
		t.recordElement(set, e, true)
		delete(s.elements, e)
	default:
		s.elements[e]--
	}
}

func (t *Table) recordElement(set string, e Element, existed bool) {
	old := t.oldElements[set]
	if old == nil {
		old = map[Element]bool{}
		t.oldElements[set] = old
	}
	if _, touched := old[e]; !touched {
		old[e] = existed
	}
}

// SetChain adds a chain or replaces the rules of an existing one.
func (t *Table) SetChain(name string, c Chain) {
	before, exists := t.chains[name]
	if exists && before.equal(c) {
		return
	}
	if _, touched := t.oldChains[name]; !touched {
		t.oldChains[name] = exists
	}
	t.chains[name] = c
}

// RemoveChain removes a chain that no rule and no subject uses.
func (t *Table) RemoveChain(name string) {
	if _, exists := t.chains[name]; !exists {
		return
	}
	if _, touched := t.oldChains[name]; !touched {
		t.oldChains[name] = true
	}
	delete(t.chains, name)
}

// Apply sets the chain that decides about the connections of an address of a pod of this
// node. DenyAll denies all connections, and the empty name allows all.
func (t *Table) Apply(d Direction, a netip.Addr, chain string) {
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
