package policy

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"kedge/network/nft/policies"
)

// clusterPolicy is a parsed ClusterNetworkPolicy: ordered rules of which the first match
// decides, before NetworkPolicies (tier Admin) or for pods that no NetworkPolicy selects
// (tier Baseline).
type clusterPolicy struct {
	name     string
	baseline bool
	priority int32
	subjects podSelector
	rules    [2][]clusterRule // by direction
}

type clusterRule struct {
	rule
	action policies.Verdict // Allow, Deny or Pass
	name   string
}

// newClusterPolicy parses a policy, which the API has validated.
func newClusterPolicy(cnp *v1alpha2.ClusterNetworkPolicy) (*clusterPolicy, error) {
	p := &clusterPolicy{name: cnp.Name, baseline: cnp.Spec.Tier == v1alpha2.BaselineTier, priority: cnp.Spec.Priority}
	var errs []error
	check := func(err error) {
		if err != nil {
			errs = append(errs, fmt.Errorf("cluster network policy %s: %w", cnp.Name, err))
		}
	}
	var err error
	p.subjects, err = clusterSelector(cnp.Spec.Subject.Namespaces, cnp.Spec.Subject.Pods)
	check(err)
	for _, r := range cnp.Spec.Ingress {
		c := newClusterRule(r.Name, r.Action, r.Protocols)
		for _, peer := range r.From {
			s, err := clusterSelector(peer.Namespaces, peer.Pods)
			check(err)
			c.selectors = append(c.selectors, s)
		}
		p.rules[policies.Ingress] = append(p.rules[policies.Ingress], c)
	}
	for _, r := range cnp.Spec.Egress {
		c := newClusterRule(r.Name, r.Action, r.Protocols)
		for _, peer := range r.To {
			for _, cidr := range peer.Networks {
				prefix, err := netip.ParsePrefix(string(cidr))
				check(err)
				if err == nil {
					c.blocks = append(c.blocks, rangeOf(prefix))
				}
			}
			if peer.Nodes != nil || len(peer.DomainNames) > 0 {
				check(errors.New("peers of the kinds nodes and domainNames are experimental, not supported, and match nothing"))
			}
			if peer.Namespaces != nil || peer.Pods != nil {
				s, err := clusterSelector(peer.Namespaces, peer.Pods)
				check(err)
				c.selectors = append(c.selectors, s)
			}
		}
		c.blocks = union(c.blocks)
		p.rules[policies.Egress] = append(p.rules[policies.Egress], c)
	}
	return p, errors.Join(errs...)
}

func newClusterRule(name string, action v1alpha2.ClusterNetworkPolicyRuleAction, protocols []v1alpha2.ClusterNetworkPolicyProtocol) clusterRule {
	c := clusterRule{name: name, rule: rule{anyPort: len(protocols) == 0}}
	switch action {
	case v1alpha2.ClusterNetworkPolicyRuleActionAccept:
		c.action = policies.Allow
	case v1alpha2.ClusterNetworkPolicyRuleActionPass:
		c.action = policies.Pass
	default:
		c.action = policies.Deny
	}
	for _, p := range protocols {
		if p.DestinationNamedPort != "" {
			for _, protocol := range []uint8{unix.IPPROTO_TCP, unix.IPPROTO_UDP, unix.IPPROTO_SCTP} {
				c.named = append(c.named, namedPort{protocol, p.DestinationNamedPort})
			}
		}
		if p.TCP != nil {
			c.ports = append(c.ports, clusterPorts(unix.IPPROTO_TCP, p.TCP.DestinationPort))
		}
		if p.UDP != nil {
			c.ports = append(c.ports, clusterPorts(unix.IPPROTO_UDP, p.UDP.DestinationPort))
		}
		if p.SCTP != nil {
			c.ports = append(c.ports, clusterPorts(unix.IPPROTO_SCTP, p.SCTP.DestinationPort))
		}
	}
	c.ports = mergePorts(c.ports)
	return c
}

func clusterPorts(protocol uint8, p *v1alpha2.Port) portRange {
	switch {
	case p == nil:
		return portRange{protocol, 0, 65535}
	case p.Range != nil:
		return portRange{protocol, uint16(p.Range.Start), uint16(p.Range.End)}
	}
	return portRange{protocol, uint16(p.Number), uint16(p.Number)}
}

// clusterSelector returns a selector of all pods of namespaces, or of some of them. An
// invalid selector selects nothing.
func clusterSelector(namespaces *metav1.LabelSelector, pods *v1alpha2.NamespacedPod) (podSelector, error) {
	s := podSelector{namespaces: labels.Nothing(), pods: labels.Everything()}
	var err error
	switch {
	case namespaces != nil:
		s.namespaces, err = metav1.LabelSelectorAsSelector(namespaces)
	case pods != nil:
		var podsErr error
		s.namespaces, err = metav1.LabelSelectorAsSelector(&pods.NamespaceSelector)
		s.pods, podsErr = metav1.LabelSelectorAsSelector(&pods.PodSelector)
		err = errors.Join(err, podsErr)
	}
	if err != nil {
		return podSelector{namespaces: labels.Nothing(), pods: labels.Nothing()}, err
	}
	return s, nil
}

// setClusterPolicy sets a cluster-wide policy; nil if it is gone.
func (e *engine) setClusterPolicy(name string, to *clusterPolicy) {
	if to == nil {
		delete(e.cluster, name)
	} else {
		e.cluster[name] = to
	}
	e.inOrder = slices.SortedFunc(maps.Values(e.cluster), func(a, b *clusterPolicy) int {
		return cmp.Or(cmp.Compare(a.priority, b.priority), cmp.Compare(a.name, b.name))
	})
	for _, c := range e.tiers {
		if i := slices.IndexFunc(c.tier, func(p *clusterPolicy) bool { return p.name == name }); i >= 0 && to != nil {
			c.tier[i] = to
			e.rewriteChain(c)
		}
	}
	for _, a := range e.owners {
		e.apply(a)
	}
}

// clusterSelecting returns the policies of a tier that select a pod, by priority.
func (e *engine) clusterSelecting(baseline bool, d policies.Direction, ns *namespace, p *pod) []*clusterPolicy {
	var out []*clusterPolicy
	for _, cp := range e.inOrder {
		if cp.baseline == baseline && len(cp.rules[d]) > 0 && cp.subjects.matches(p.key.namespace, ns.labels, p) {
			out = append(out, cp)
		}
	}
	return out
}

// clusterMaySelect reports whether a cluster-wide policy could select a pod of the
// namespace.
func (e *engine) clusterMaySelect(ns *namespace) bool {
	return slices.ContainsFunc(e.inOrder, func(cp *clusterPolicy) bool {
		return ns == nil || cp.subjects.namespaces.Matches(ns.labels)
	})
}

// acquireTier returns the chain of a tier's policies for a pod; nil without policies.
func (e *engine) acquireTier(baseline bool, d policies.Direction, v6 bool, ns *namespace, p *pod) *chain {
	tier := e.clusterSelecting(baseline, d, ns, p)
	if len(tier) == 0 {
		return nil
	}
	title := "admin"
	if baseline {
		title = "baseline"
	}
	c := &chain{key: chainKey{direction: d, v6: v6}, tier: tier, refs: 1}
	content := ""
	var rules []rule
	for _, cp := range tier {
		content += cp.name + "\n"
		for _, r := range cp.rules[d] {
			rules = append(rules, r.rule)
		}
	}
	c.ports, c.key.ports = portsFor(d, rules, p)
	c.name = hashedName(title+"-"+d.String()+familySuffix(v6), content+c.key.ports)
	if known := e.tiers[c.name]; known != nil {
		known.refs++
		return known
	}
	e.tiers[c.name] = c
	e.rewriteChain(c)
	return c
}
