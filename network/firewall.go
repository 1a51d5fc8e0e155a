package network

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"kedge/internal/hostfirewall"
	"kedge/network/cni"
	"kedge/network/trace"
)

// checkFirewalls returns an error if a firewall of the host drops packets of pods. Caller
// holds mu.
func (n *Network) checkFirewalls() error {
	certain, _, err := n.firewallDrops()
	if err != nil || len(certain) == 0 {
		return err
	}
	return errors.New("a firewall is in the way of pods: " + strings.Join(certain, "; "))
}

// Describe lists the chains of other programs that may drop packets of pods.
func (n *Network) Describe() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	_, perhaps, err := n.firewallDrops()
	if n.plugin == nil || err != nil {
		return "" // Check reports it
	}
	return strings.Join(perhaps, "; ")
}

// firewallDrops returns the chains that drop packets of pods, and the chains that may.
// Caller holds mu.
func (n *Network) firewallDrops() (certain, perhaps []string, err error) {
	drops, err := hostfirewall.Against(hostfirewall.OfPods(cni.LinkPrefix(n.cfg.NodeName), n.podCIDRs, n.cfg.Resolver))
	if err != nil {
		return nil, nil, fmt.Errorf("read the host's firewall rules: %w", err)
	}
	for _, d := range drops {
		if d.Perhaps {
			perhaps = append(perhaps, d.String())
		} else {
			certain = append(certain, d.String())
		}
	}
	return certain, perhaps, nil
}

// firewall evaluates the chains of other programs for a connection.
type firewall struct{ links string }

// Trace implements trace.Part.
func (f firewall) Trace(_ context.Context, stage trace.Stage, p *trace.Packet) ([]trace.Step, error) {
	if stage != trace.Filter {
		return nil, nil
	}
	q := hostfirewall.Packet{From: p.From.Addr.Addr(), To: p.To.Addr.Addr(), Protocol: p.Protocol, Port: p.To.Addr.Port()}
	if p.From.Place == trace.Pod {
		q.In = f.links + "aaaaaaaa"
	}
	if p.To.Place == trace.Pod {
		q.Out = f.links + "bbbbbbbb"
	}
	switch {
	case p.To.Place == trace.Node:
		q.Hook = hostfirewall.Input
		if p.From.Place == trace.Node {
			q.In = "lo"
		}
	case p.From.Place == trace.Node:
		q.Hook = hostfirewall.Output
	default:
		q.Hook = hostfirewall.Forward
	}
	drops, err := hostfirewall.Drops(q)
	if err != nil {
		return nil, err
	}
	var steps []trace.Step
	for _, d := range drops {
		rule := "a rule"
		if d.Policy {
			rule = "policy drop"
		}
		effect := "dropped by another program's firewall"
		if d.Perhaps {
			effect = "may be dropped by another program's firewall: not all of its rules can be evaluated"
		}
		steps = append(steps, trace.Step{Table: d.Family + " " + d.Table, Chain: d.Chain, Rule: rule, Effect: effect})
	}
	if slices.ContainsFunc(drops, func(d hostfirewall.Drop) bool { return !d.Perhaps }) {
		p.Ended = true
	}
	return steps, nil
}
