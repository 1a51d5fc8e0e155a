package policies

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"kedge/network/nft"
)

// Connection is a connection to check: From is the client's address before source
// translation, To and Port are the server's after destination translation.
type Connection struct {
	From, To netip.Addr
	Protocol uint8 // IPPROTO_*
	Port     uint16
}

// Step is a rule that a connection meets on its way through the table.
type Step struct {
	Direction Direction
	Chain     string
	Rule      string // the rule's comment
	Matched   bool
	Why       string // which set contains which part of the connection, or does not
	Then      Verdict
}

// Trace returns the rules that a connection meets and whether the last of them allows it in
// that direction, according to the staged content. Without policies in a direction there
// are no steps, and the connection is allowed.
func (t *Table) Trace(d Direction, c Connection) (steps []Step, allowed bool) {
	subject := subject{d, c.From}
	if d == Ingress {
		subject.addr = c.To
	}
	name := t.subjects[subject]
	switch name {
	case "":
		return nil, true
	case DenyAll:
		return []Step{{Direction: d, Chain: subjectMap(d, nft.FamilyOf(subject.addr)).Name, Rule: "the pod is not known yet", Matched: true, Then: Deny}}, false
	}
	verdict, _ := t.follow(name, c, &steps)
	return steps, verdict == Allow
}

// follow walks through a chain; decided is false if the chain ends without a verdict.
func (t *Table) follow(name string, c Connection, steps *[]Step) (verdict Verdict, decided bool) {
	chain := t.chains[name]
	for _, r := range chain.Rules {
		matched, why := t.matches(chain.Direction, r, c)
		*steps = append(*steps, Step{chain.Direction, name, r.Comment, matched, why, r.Then})
		switch {
		case !matched:
		case r.Then == Pass:
			return Allow, false
		case r.Then == Call:
			if verdict, decided := t.follow(r.Chain, c, steps); decided {
				return verdict, true
			}
		default:
			return r.Then, true
		}
	}
	return Allow, false
}

func (t *Table) matches(d Direction, r Rule, c Connection) (matched bool, why string) {
	peer := c.From
	if d == Egress {
		peer = c.To
	}
	var whys []string
	for _, condition := range []struct {
		set, what string
		element   Element
	}{
		{r.Peers, peer.String(), AddrElement(peer)},
		{r.Ports, fmt.Sprintf("protocol %d port %d", c.Protocol, c.Port), PortElement(c.Protocol, c.Port, c.Port)},
		{r.PeerPorts, fmt.Sprintf("%s protocol %d port %d", peer, c.Protocol, c.Port), AddrPortElement(peer, c.Protocol, c.Port)},
		{r.Itself, fmt.Sprintf("%s to %s", c.From, c.To), Element{key: string(slices.Concat(c.From.AsSlice(), c.To.AsSlice()))}},
	} {
		if condition.set == "" {
			continue
		}
		if !t.sets[condition.set].holds(condition.element) {
			return false, fmt.Sprintf("%s is not in %s", condition.what, condition.set)
		}
		whys = append(whys, fmt.Sprintf("%s is in %s", condition.what, condition.set))
	}
	return true, strings.Join(whys, ", ")
}

// holds reports whether an element is in the set, or in one of its ranges.
func (s *set) holds(e Element) bool {
	if s.Kind != Blocks && s.Kind != Ports {
		return s.elements[e] > 0
	}
	for r := range s.elements {
		if len(r.key) == len(e.key) && r.key <= e.key && e.key <= r.end {
			return true
		}
	}
	return false
}

// Intact reports whether the kernel has the staged content.
func (t *Table) Intact() (bool, error) { return t.intact() }

// String lists the staged content in a fixed order: equal tables have equal strings.
func (t *Table) String() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(t.sets)) {
		s := t.sets[name]
		fmt.Fprintf(&b, "set %s %q\n", name, s.Comment)
		var lines []string
		for e := range s.elements {
			lines = append(lines, fmt.Sprintf("  %x %x\n", e.key, e.end))
		}
		slices.Sort(lines)
		b.WriteString(strings.Join(lines, ""))
	}
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		fmt.Fprintf(&b, "chain %s\n", name)
		for _, r := range t.chains[name].Rules {
			fmt.Fprintf(&b, "  %+v\n", r)
		}
	}
	var lines []string
	for s, chain := range t.subjects {
		lines = append(lines, fmt.Sprintf("%s of %s: %q\n", s.direction, s.addr, chain))
	}
	slices.Sort(lines)
	b.WriteString(strings.Join(lines, ""))
	return b.String()
}
