package policy

import (
	"context"
	"fmt"

	"kedge/network/nft/policies"
	"kedge/network/trace"
)

var _ trace.Part = (*Policy)(nil)

// Trace implements trace.Part: it returns the policies that a connection meets, rule by
// rule, and which of them allows or denies it. The rules are those in memory; the kernel's
// rules are compared with them.
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
	conn := policies.Connection{From: pkt.From.Addr.Addr(), To: pkt.To.Addr.Addr(), Protocol: pkt.Protocol, Port: pkt.To.Addr.Port()}
	var out []trace.Step
	for _, d := range directions {
		subject, end := pkt.From, "from"
		if d == policies.Ingress {
			subject, end = pkt.To, "to"
		}
		step := trace.Step{Table: table.Name(), Problem: problem}
		switch {
		case d == policies.Ingress && pkt.From.Place == trace.Node:
			step.Effect = "allowed: a node always reaches its pods"
			out = append(out, step)
			continue
		case subject.Place != trace.Pod:
			continue // policies apply on that node, or not at all
		}
		rules, allowed := table.Trace(d, conn)
		if len(rules) == 0 {
			step.Effect = fmt.Sprintf("allowed: no policy selects %[2]s for %[1]s", d, name(subject))
			out = append(out, step)
			continue
		}
		for _, r := range rules {
			s := step
			s.Chain, s.Rule, s.Element = r.Chain, r.Rule, r.Why
			switch {
			case !r.Matched:
				s.Effect = "does not match"
			case r.Then == policies.Call:
				s.Effect = "continues in this policy's chain"
			case r.Then == policies.Pass:
				s.Effect = "passes to the next tier"
			case r.Then == policies.Allow:
				s.Effect = fmt.Sprintf("allows the connection %s %s", end, name(subject))
			default:
				s.Effect = fmt.Sprintf("refuses the connection %s %s", end, name(subject))
			}
			out = append(out, s)
		}
		if last := rules[len(rules)-1]; allowed && (!last.Matched || last.Then != policies.Allow) {
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
