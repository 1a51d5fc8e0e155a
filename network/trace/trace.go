package trace

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
)

// Stage is a point on a packet's path, in the order in which packets pass them.
type Stage int

// The stages.
const (
	Destination Stage = iota // before routing: hooks prerouting, or output for the node's own
	Filter                   // after routing: hooks forward, input or output
	Source                   // on the way out: hook postrouting
)

// Place is the location of one end of a connection, seen from the node.
type Place string

// The places.
const (
	Pod     Place = "pod"     // of this node, behind a link of its own
	Node    Place = "node"    // the node itself, or a pod in the host network
	Outside Place = "outside" // any other machine, and pods of other nodes
)

// End is one end of a connection.
type End struct {
	Addr  netip.AddrPort `json:"addr"`
	Place Place          `json:"place"`
	Name  string         `json:"name,omitempty"` // "namespace/name" of the pod with the address, if any
}

// Packet is the first packet of a connection, as it is at a stage. Parts change it as their
// rules do.
type Packet struct {
	Protocol uint8          `json:"protocol"` // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	From     End            `json:"from"`
	To       End            `json:"to"`
	Original netip.AddrPort `json:"original"` // destination that the client used
	Ended    bool           `json:"ended"`    // dropped or refused: no later stage sees it
}

// Step is the effect of one rule on a packet.
type Step struct {
	Table   string `json:"table,omitempty"`
	Chain   string `json:"chain,omitempty"`
	Rule    string `json:"rule,omitempty"`    // the comment of the rule
	Element string `json:"element,omitempty"` // of the set or map that decided, "set: key -> value"
	Effect  string `json:"effect"`            // the effect, and the reason
	Problem string `json:"problem,omitempty"` // difference between the kernel and the wanted rules
}

// RuleStep returns the step that a rule makes, with a problem if the rule is not among
// rules: the comments of the table's rules in the kernel, by chain.
func RuleStep(rules map[string][]string, table, chain, rule, element, effect string) Step {
	s := Step{Table: table, Chain: chain, Rule: rule, Element: element, Effect: effect}
	if !slices.Contains(rules[chain], rule) {
		s.Problem = "the kernel does not have this rule"
	}
	return s
}

// Part is a part of the network that has rules: services, policies, pods.
type Part interface {
	// Trace returns what the part's rules do to the packet at a stage, and changes the
	// packet accordingly. It returns no steps for a stage at which it has no rules.
	Trace(ctx context.Context, stage Stage, p *Packet) ([]Step, error)
}

// Resolver returns the place of an address, and the name of the pod that has it.
type Resolver func(netip.Addr) (Place, string)

// Run takes a packet through the parts and returns its steps. At each stage the parts are
// called in their order; afterwards the packet is in its final state.
func Run(ctx context.Context, parts []Part, resolve Resolver, p *Packet) ([]Step, error) {
	var steps []Step
	p.Original = p.To.Addr
	for _, stage := range []Stage{Destination, Filter, Source} {
		for _, part := range parts {
			p.From.Place, p.From.Name = resolve(p.From.Addr.Addr())
			p.To.Place, p.To.Name = resolve(p.To.Addr.Addr())
			more, err := part.Trace(ctx, stage, p)
			if err != nil {
				return steps, fmt.Errorf("trace: %w", err)
			}
			steps = append(steps, more...)
			if p.Ended {
				return steps, nil
			}
		}
	}
	return steps, nil
}
