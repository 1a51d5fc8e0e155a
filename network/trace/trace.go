package trace

import (
	"context"
	"fmt"
	"net/netip"
)

// Stage is a point on a packet's way, in the order in which packets pass them.
type Stage int

// The stages.
const (
	Destination Stage = iota // before routing: hooks prerouting, or output for the node's own
	Filter                   // after routing: hooks forward, input or output
	Source                   // on the way out: hook postrouting
)

// Place is where one end of a connection is, seen from the node.
type Place string

// The places.
const (
	Pod     Place = "pod"     // of this node, behind a link of its own
	Node    Place = "node"    // the node itself, or a pod with the node's network
	Outside Place = "outside" // everything else, pods of other nodes included
)

// End is one end of a connection.
type End struct {
	Addr  netip.AddrPort `json:"addr"`
	Place Place          `json:"place"`
	Name  string         `json:"name,omitempty"` // of the pod, "namespace/name", where one has the address
}

// Packet is the first packet of a connection, as it is at a stage. Parts change
// it as their rules do.
type Packet struct {
	Protocol uint8          `json:"protocol"` // IPPROTO_TCP, IPPROTO_UDP or IPPROTO_SCTP
	From     End            `json:"from"`
	To       End            `json:"to"`
	Original netip.AddrPort `json:"original"` // where it was sent to
	Ended    bool           `json:"ended"`    // dropped or refused: no later stage sees it
}

// Step is one thing that happens to a packet.
type Step struct {
	Table   string `json:"table,omitempty"`
	Chain   string `json:"chain,omitempty"`
	Rule    string `json:"rule,omitempty"`    // the comment of the rule
	Element string `json:"element,omitempty"` // of a set or map that decided, "set: key -> value"
	Effect  string `json:"effect"`            // what happens by it, and why
	Problem string `json:"problem,omitempty"` // how the kernel differs from what should be
}

// Part is one that has rules: services, policies, pods.
type Part interface {
	// Trace says what the part's rules do to the packet at a stage, and does it
	// to the packet. It returns no steps for a stage at which it has no rules.
	Trace(ctx context.Context, stage Stage, p *Packet) ([]Step, error)
}

// Resolver says where an address is and whose it is.
type Resolver func(netip.Addr) (Place, string)

// Run follows a packet through the parts and returns its steps. Parts are asked
// in their order at each stage; the packet is as it came out at the end.
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
