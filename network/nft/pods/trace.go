package pods

import (
	"context"
	"fmt"
	"net/netip"
	"slices"

	"kedge/network/nft"
	"kedge/network/trace"
)

// Trace implements trace.Part for host ports and for outbound traffic.
func (t *Table) Trace(_ context.Context, stage trace.Stage, p *trace.Packet) ([]trace.Step, error) {
	t.mu.Lock()
	rules, ports := t.rules, t.ports
	t.mu.Unlock()
	have, err := nft.Comments(t.name)
	if err != nil {
		return nil, err
	}
	step := func(chain, rule, element, effect string) []trace.Step {
		return []trace.Step{trace.RuleStep(have, t.name, chain, rule, element, effect)}
	}
	switch stage {
	case trace.Destination:
		if p.To.Addr != p.Original || p.To.Place != trace.Node {
			return nil, nil // translated before, or not to the node
		}
		for _, h := range ports {
			if h.Port != p.To.Addr.Port() || h.Protocol != p.Protocol || h.Pod.Addr().Is6() != p.To.Addr.Addr().Is6() {
				continue
			}
			rule, set := "host ports of all node addresses", setHostPorts
			if h.HostIP.IsValid() {
				rule, set = "host ports of one node address", setHostAddrPorts
				if h.HostIP != p.To.Addr.Addr() {
					continue
				}
			}
			element := fmt.Sprintf("%s%s: %d/%s -> %s", set, nft.FamilyOf(h.Pod.Addr()).Suffix, h.Port, nft.ProtocolName(h.Protocol), h.Pod)
			p.To.Addr = h.Pod
			return step(chainHostPorts, rule, element, "sent to the pod that has this port of the node"), nil
		}
	case trace.Source:
		from, to := p.From.Addr.Addr(), p.To.Addr.Addr()
		in := func(list []netip.Prefix, a netip.Addr) bool {
			return slices.ContainsFunc(list, func(r netip.Prefix) bool { return r.Contains(a) })
		}
		if p.To.Place == trace.Outside && in(rules.PodRanges, from) && !in(rules.Inside, to) && !slices.Contains(rules.Nodes, to) {
			return step(chainOutbound, "the outside sees the node's address", "", "gets the node's source address: the outside has no route to pods"), nil
		}
	}
	return nil, nil
}
