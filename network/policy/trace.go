package policy

import (
	"context"
	"fmt"

	"kedge/network/nft"
	"kedge/network/trace"
)

var _ trace.Part = (*Policy)(nil)

// Trace implements trace.Part: it says which policies a connection meets, rule by
// rule, and which of them allows or what refuses it. What the rules are is known
// here; that the kernel has the same is looked at.
func (p *Policy) Trace(_ context.Context, stage trace.Stage, pkt *trace.Packet) ([]trace.Step, error) {
	if stage != trace.Filter {
		return nil, nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.engine.synced {
		return nil, ErrNotSynced
	}
	table := p.engine.table
	problem := ""
	if ok, err := table.Intact(); err != nil {
		problem = "the rules cannot be read: " + err.Error()
	} else if !ok {
		problem = "the kernel's rules differ from what they should be; they are repaired in a moment"
	}
	conn := nft.Connection{From: pkt.From.Addr.Addr(), To: pkt.To.Addr.Addr(), Protocol: pkt.Protocol, Port: pkt.To.Addr.Port()}
	var out []trace.Step
	for _, d := range directions {
		subject, end := pkt.From, "from"
		if d == nft.Ingress {
			subject, end = pkt.To, "to"
		}
		step := trace.Step{Table: table.Name(), Problem: problem}
		switch {
		case d == nft.Ingress && pkt.From.Place == trace.Node:
			step.Effect = "allowed: a node always reaches its pods"
			out = append(out, step)
			continue
		case subject.Place != trace.Pod:
			continue // judged where it is, or not at all
		}
		rules, allowed := table.Trace(d, conn)
		if len(rules) == 0 {
			step.Effect = fmt.Sprintf("allowed: no policy is about the %s of %s", d, name(subject))
			out = append(out, step)
			continue
		}
		for _, r := range rules {
			s := step
			s.Chain, s.Rule, s.Element = r.Chain, r.Rule, r.Why
			switch {
			case !r.Matched:
				s.Effect = "does not match"
			case r.Then == nft.Call:
				s.Effect = "looks into it"
			case r.Then == nft.Pass:
				s.Effect = "leaves it to the next tier"
			case r.Then == nft.Allow:
				s.Effect = fmt.Sprintf("allows the connection %s %s", end, name(subject))
			default:
				s.Effect = fmt.Sprintf("refuses the connection %s %s", end, name(subject))
			}
			out = append(out, s)
		}
		if last := rules[len(rules)-1]; allowed && (!last.Matched || last.Then != nft.Allow) {
			step.Effect = fmt.Sprintf("allowed: no rule refuses the connection %s %s", end, name(subject))
			out = append(out, step)
		}
		if !allowed {
			pkt.Ended = true
			return out, nil
		}
	}
	return out, nil
}

func name(e trace.End) string {
	if e.Name != "" {
		return e.Name
	}
	return e.Addr.Addr().String()
}
