package policy

import (
	"net/netip"
	"sort"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"
)

// cluster is the API's content, as API objects.
type cluster struct {
	namespaces map[string]labels.Set
	pods       map[podKey]*corev1.Pod
	policies   map[podKey]*networkingv1.NetworkPolicy
	wide       map[string]*v1alpha2.ClusterNetworkPolicy
}

// thisNode is the node whose decisions are looked at.
const thisNode = "node1"

// connection is an attempted connection.
type connection struct {
	from, to netip.Addr
	protocol corev1.Protocol
	port     int
}

// podAt returns the pod at the other end of a connection. Terminated pods do not count.
func (c *cluster) podAt(a netip.Addr) *corev1.Pod {
	p := c.owner(a)
	if p == nil || p.Status.Phase == corev1.PodFailed || p.Status.Phase == corev1.PodSucceeded {
		return nil
	}
	return p
}

// owner returns the pod with an address. Policies still apply to terminated pods: they may
// not have terminated completely.
func (c *cluster) owner(a netip.Addr) *corev1.Pod {
	for _, p := range c.pods {
		if p.Spec.HostNetwork {
			continue
		}
		for _, ip := range p.Status.PodIPs {
			if ip.IP == a.String() {
				return p
			}
		}
	}
	return nil
}

// allows evaluates a connection by reading the specifications of NetworkPolicy and
// ClusterNetworkPolicy from top to bottom, without preparation and without code of the
// engine.
func (c *cluster) allows(conn connection) bool {
	if conn.from == conn.to {
		return true
	}
	from, to := c.owner(conn.from), c.owner(conn.to)
	if from != nil && from.Spec.NodeName != thisNode {
		from = nil // policies apply on its node
	}
	if to != nil && to.Spec.NodeName != thisNode {
		to = nil
	}
	return c.allowsOneWay(from, conn, true) && c.allowsOneWay(to, conn, false)
}

func (c *cluster) allowsOneWay(subject *corev1.Pod, conn connection, egress bool) bool {
	if subject == nil {
		return true
	}
	if action := c.tier(v1alpha2.AdminTier, subject, conn, egress); action != v1alpha2.ClusterNetworkPolicyRuleActionPass {
		return action == v1alpha2.ClusterNetworkPolicyRuleActionAccept
	}
	isolated := false
	for _, np := range c.policies {
		if np.Namespace != subject.Namespace || !selects(&np.Spec.PodSelector, subject.Labels) {
			continue
		}
		if egress {
			if !hasType(np, networkingv1.PolicyTypeEgress) {
				continue
			}
			isolated = true
			for _, r := range np.Spec.Egress {
				if c.peersMatch(np.Namespace, r.To, conn.to) && c.portsMatch(r.Ports, conn) {
					return true
				}
			}
			continue
		}
		if !hasType(np, networkingv1.PolicyTypeIngress) {
			continue
		}
		isolated = true
		for _, r := range np.Spec.Ingress {
			if c.peersMatch(np.Namespace, r.From, conn.from) && c.portsMatch(r.Ports, conn) {
				return true
			}
		}
	}
	return !isolated && c.tier(v1alpha2.BaselineTier, subject, conn, egress) != v1alpha2.ClusterNetworkPolicyRuleActionDeny
}

// tier finds the first rule of a tier that matches; Pass if none does.
func (c *cluster) tier(tier v1alpha2.Tier, subject *corev1.Pod, conn connection, egress bool) v1alpha2.ClusterNetworkPolicyRuleAction {
	var all []*v1alpha2.ClusterNetworkPolicy
	for _, p := range c.wide {
		if p.Spec.Tier == tier && c.clusterSelects(p.Spec.Subject.Namespaces, p.Spec.Subject.Pods, subject) {
			all = append(all, p)
		}
	}
	sort.Slice(all, func(i, j int) bool { return all[i].Spec.Priority < all[j].Spec.Priority })
	for _, p := range all {
		if egress {
			for _, r := range p.Spec.Egress {
				for _, peer := range r.To {
					match := c.clusterSelects(peer.Namespaces, peer.Pods, c.podAt(conn.to))
					for _, n := range peer.Networks {
						match = match || netip.MustParsePrefix(string(n)).Contains(conn.to)
					}
					if match && c.protocolsMatch(r.Protocols, conn) {
						return r.Action
					}
				}
			}
			continue
		}
		for _, r := range p.Spec.Ingress {
			for _, peer := range r.From {
				if c.clusterSelects(peer.Namespaces, peer.Pods, c.podAt(conn.from)) && c.protocolsMatch(r.Protocols, conn) {
					return r.Action
				}
			}
		}
	}
	return v1alpha2.ClusterNetworkPolicyRuleActionPass
}

func (c *cluster) clusterSelects(namespaces *metav1.LabelSelector, pods *v1alpha2.NamespacedPod, p *corev1.Pod) bool {
	switch {
	case p == nil:
		return false
	case namespaces != nil:
		return selects(namespaces, c.namespaces[p.Namespace])
	case pods != nil:
		return selects(&pods.NamespaceSelector, c.namespaces[p.Namespace]) && selects(&pods.PodSelector, p.Labels)
	}
	return false
}

func (c *cluster) protocolsMatch(protocols []v1alpha2.ClusterNetworkPolicyProtocol, conn connection) bool {
	in := func(p *v1alpha2.Port) bool {
		return p == nil || int(p.Number) == conn.port || p.Range != nil && int(p.Range.Start) <= conn.port && conn.port <= int(p.Range.End)
	}
	for _, p := range protocols {
		switch {
		case p.DestinationNamedPort != "":
			if to := c.podAt(conn.to); to != nil {
				for _, cp := range to.Spec.Containers[0].Ports {
					if cp.Name == p.DestinationNamedPort && cp.Protocol == conn.protocol && int(cp.ContainerPort) == conn.port {
						return true
					}
				}
			}
		case p.TCP != nil && conn.protocol == corev1.ProtocolTCP && in(p.TCP.DestinationPort),
			p.UDP != nil && conn.protocol == corev1.ProtocolUDP && in(p.UDP.DestinationPort):
			return true
		}
	}
	return len(protocols) == 0
}

func hasType(np *networkingv1.NetworkPolicy, want networkingv1.PolicyType) bool {
	for _, t := range np.Spec.PolicyTypes {
		if t == want {
			return true
		}
	}
	return false
}

func selects(s *metav1.LabelSelector, set map[string]string) bool {
	sel, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		panic(err)
	}
	return sel.Matches(labels.Set(set))
}

func (c *cluster) peersMatch(namespace string, peers []networkingv1.NetworkPolicyPeer, a netip.Addr) bool {
	if len(peers) == 0 {
		return true
	}
	for _, peer := range peers {
		if peer.IPBlock != nil {
			in := netip.MustParsePrefix(peer.IPBlock.CIDR).Contains(a)
			for _, e := range peer.IPBlock.Except {
				in = in && !netip.MustParsePrefix(e).Contains(a)
			}
			if in {
				return true
			}
			continue
		}
		p := c.podAt(a)
		if p == nil {
			continue
		}
		if peer.NamespaceSelector == nil && p.Namespace != namespace {
			continue
		}
		if peer.NamespaceSelector != nil && !selects(peer.NamespaceSelector, c.namespaces[p.Namespace]) {
			continue
		}
		if peer.PodSelector != nil && !selects(peer.PodSelector, p.Labels) {
			continue
		}
		return true
	}
	return false
}

func (c *cluster) portsMatch(ports []networkingv1.NetworkPolicyPort, conn connection) bool {
	if len(ports) == 0 {
		return true
	}
	for _, p := range ports {
		protocol := corev1.ProtocolTCP
		if p.Protocol != nil {
			protocol = *p.Protocol
		}
		if protocol != conn.protocol {
			continue
		}
		switch {
		case p.Port == nil:
			return true
		case p.Port.Type == intstr.String:
			if to := c.podAt(conn.to); to != nil {
				for _, container := range to.Spec.Containers {
					for _, cp := range container.Ports {
						if cp.Name == p.Port.StrVal && int(cp.ContainerPort) == conn.port && cp.Protocol == protocol {
							return true
						}
					}
				}
			}
		case p.EndPort != nil:
			if int(p.Port.IntVal) <= conn.port && conn.port <= int(*p.EndPort) {
				return true
			}
		case int(p.Port.IntVal) == conn.port:
			return true
		}
	}
	return false
}
