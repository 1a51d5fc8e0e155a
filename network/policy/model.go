package policy

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"kedge/network/nft/policies"
)

// podKey is the namespace and name of a pod.
type podKey struct{ namespace, name string }

func (k podKey) String() string { return k.namespace + "/" + k.name }

// port is a port of a protocol.
type port struct {
	protocol uint8 // IPPROTO_*
	number   uint16
}

// pod is the part of a pod that policies use. It is immutable: a changed pod is replaced.
type pod struct {
	key    podKey
	uid    string
	static string // UID of a static pod in the runtime; empty for other pods
	labels labels.Set
	addrs  []netip.Addr      // empty while unknown, and for pods in the host network
	ports  map[string][]port // by name
	peer   bool              // may be the other end of a connection: has not terminated
}

// configMirror is the annotation of a mirror pod: the UID under which the kubelet runs the
// static pod.
const configMirror = corev1.MirrorPodAnnotationKey

// newPod reads a pod of the API. Pods in the host network have no address of their own: for
// policies they are the node.
func newPod(p *corev1.Pod) *pod {
	out := &pod{
		key: podKey{p.Namespace, p.Name}, uid: string(p.UID), static: p.Annotations[configMirror],
		labels: p.Labels, ports: map[string][]port{},
		peer: p.Status.Phase != corev1.PodSucceeded && p.Status.Phase != corev1.PodFailed && !p.Spec.HostNetwork,
	}
	if !p.Spec.HostNetwork {
		for _, ip := range p.Status.PodIPs {
			if a, err := netip.ParseAddr(ip.IP); err == nil {
				out.addrs = append(out.addrs, a.Unmap())
			}
		}
	}
	add := func(c corev1.Container) {
		for _, cp := range c.Ports {
			if cp.Name != "" {
				out.ports[cp.Name] = append(out.ports[cp.Name], port{protocolNumber(&cp.Protocol), uint16(cp.ContainerPort)})
			}
		}
	}
	for _, c := range p.Spec.Containers {
		add(c)
	}
	for _, c := range p.Spec.InitContainers {
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			add(c) // a sidecar
		}
	}
	return out
}

// samePod reports whether two pods are equal for policies.
func samePod(p, o *pod) bool {
	if p == nil || o == nil {
		return p == o
	}
	return p.uid == o.uid && p.static == o.static && p.peer == o.peer && slices.Equal(p.addrs, o.addrs) &&
		labels.Equals(p.labels, o.labels) && samePorts(p.ports, o.ports)
}

func samePorts(a, b map[string][]port) bool {
	if len(a) != len(b) {
		return false
	}
	for name := range a {
		if !slices.Equal(a[name], b[name]) {
			return false
		}
	}
	return true
}

// resolve returns the ports with a name and protocol. A terminated pod has none.
func (p *pod) resolve(protocol uint8, name string) []uint16 {
	var out []uint16
	if !p.peer {
		return nil
	}
	for _, q := range p.ports[name] {
		if q.protocol == protocol && !slices.Contains(out, q.number) {
			out = append(out, q.number)
		}
	}
	slices.Sort(out)
	return out
}

func protocolNumber(p *corev1.Protocol) uint8 {
	if p != nil {
		switch *p {
		case corev1.ProtocolUDP:
			return unix.IPPROTO_UDP
		case corev1.ProtocolSCTP:
			return unix.IPPROTO_SCTP
		}
	}
	return unix.IPPROTO_TCP
}

func protocolName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "TCP"
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	}
	return fmt.Sprint("protocol ", p)
}

// policy is a parsed NetworkPolicy.
type policy struct {
	key      podKey // of the policy
	subjects labels.Selector
	rules    [2][]rule // by direction
	applies  [2]bool   // by direction
	chains   map[chainKey]*chain
}

// rule allows connections from, or to, one of the peers on one of the ports.
type rule struct {
	selectors []podSelector
	blocks    []addrRange // sorted, with gaps between them
	anyPeer   bool
	ports     []portRange
	named     []namedPort
	anyPort   bool
}

// podSelector selects pods by their labels and the labels of their namespaces.
type podSelector struct {
	namespace  string          // this one, or
	namespaces labels.Selector // the ones with these labels
	pods       labels.Selector
}

// addrRange is a range of addresses of one family, both ends included.
type addrRange struct{ first, last netip.Addr }

type portRange struct {
	protocol    uint8
	first, last uint16
}

type namedPort struct {
	protocol uint8
	name     string
}

// newPolicy parses a policy, which the API has validated. If some rules are invalid, it
// returns the others with an error: they allow less.
func newPolicy(np *networkingv1.NetworkPolicy) (*policy, error) {
	p := &policy{key: podKey{np.Namespace, np.Name}, chains: map[chainKey]*chain{}}
	var err error
	if p.subjects, err = metav1.LabelSelectorAsSelector(&np.Spec.PodSelector); err != nil {
		return nil, fmt.Errorf("network policy %s: %w", p.key, err)
	}
	if len(np.Spec.PolicyTypes) == 0 { // as the API's default has it
		p.applies = [2]bool{policies.Ingress: true, policies.Egress: len(np.Spec.Egress) > 0}
	}
	for _, t := range np.Spec.PolicyTypes {
		switch t {
		case networkingv1.PolicyTypeIngress:
			p.applies[policies.Ingress] = true
		case networkingv1.PolicyTypeEgress:
			p.applies[policies.Egress] = true
		}
	}
	read := func(d policies.Direction, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) {
		r, readErr := newRule(np.Namespace, peers, ports)
		if readErr != nil {
			err = fmt.Errorf("network policy %s: %w", p.key, readErr)
			return
		}
		p.rules[d] = append(p.rules[d], r)
	}
	for _, r := range np.Spec.Ingress {
		read(policies.Ingress, r.From, r.Ports)
	}
	for _, r := range np.Spec.Egress {
		read(policies.Egress, r.To, r.Ports)
	}
	return p, err
}

func newRule(namespace string, peers []networkingv1.NetworkPolicyPeer, ports []networkingv1.NetworkPolicyPort) (rule, error) {
	r := rule{anyPeer: len(peers) == 0, anyPort: len(ports) == 0}
	for _, peer := range peers {
		if peer.IPBlock != nil {
			spans, err := newRanges(peer.IPBlock)
			if err != nil {
				return rule{}, err
			}
			r.blocks = append(r.blocks, spans...)
			continue
		}
		s := podSelector{namespace: namespace, pods: labels.Everything()}
		var err error
		if peer.PodSelector != nil {
			if s.pods, err = metav1.LabelSelectorAsSelector(peer.PodSelector); err != nil {
				return rule{}, err
			}
		}
		if peer.NamespaceSelector != nil {
			s.namespace = ""
			if s.namespaces, err = metav1.LabelSelectorAsSelector(peer.NamespaceSelector); err != nil {
				return rule{}, err
			}
		}
		r.selectors = append(r.selectors, s)
	}
	r.blocks = union(r.blocks)
	for _, p := range ports {
		protocol := protocolNumber(p.Protocol)
		switch {
		case p.Port == nil:
			r.ports = append(r.ports, portRange{protocol, 0, 65535})
		case p.Port.StrVal != "":
			if n := (namedPort{protocol, p.Port.StrVal}); !slices.Contains(r.named, n) {
				r.named = append(r.named, n)
			}
		default:
			first := uint16(p.Port.IntVal)
			last := first
			if p.EndPort != nil {
				last = uint16(*p.EndPort)
			}
			r.ports = append(r.ports, portRange{protocol, first, last})
		}
	}
	r.ports = mergePorts(r.ports)
	return r, nil
}

// newRanges returns a block without its exceptions.
func newRanges(b *networkingv1.IPBlock) ([]addrRange, error) {
	cidr, err := netip.ParsePrefix(b.CIDR)
	if err != nil {
		return nil, err
	}
	out := []addrRange{rangeOf(cidr)}
	for _, e := range b.Except {
		except, err := netip.ParsePrefix(e)
		if err != nil {
			return nil, err
		}
		out = subtract(out, rangeOf(except))
	}
	return out, nil
}

func rangeOf(p netip.Prefix) addrRange {
	p = p.Masked()
	last := p.Addr().AsSlice()
	for i := p.Bits(); i < len(last)*8; i++ {
		last[i/8] |= 0x80 >> (i % 8)
	}
	end, _ := netip.AddrFromSlice(last)
	return addrRange{p.Addr(), end}
}

func (s addrRange) contains(a netip.Addr) bool {
	return s.first.BitLen() == a.BitLen() && s.first.Compare(a) <= 0 && a.Compare(s.last) <= 0
}

// subtract removes x from every range.
func subtract(spans []addrRange, x addrRange) []addrRange {
	var out []addrRange
	for _, s := range spans {
		if s.first.BitLen() != x.first.BitLen() || x.last.Less(s.first) || s.last.Less(x.first) {
			out = append(out, s)
			continue
		}
		if s.first.Less(x.first) {
			out = append(out, addrRange{s.first, x.first.Prev()})
		}
		if x.last.Less(s.last) {
			out = append(out, addrRange{x.last.Next(), s.last})
		}
	}
	return out
}

// union sorts ranges and joins the ones that overlap or touch.
func union(spans []addrRange) []addrRange {
	slices.SortFunc(spans, func(a, b addrRange) int {
		return cmp.Or(cmp.Compare(a.first.BitLen(), b.first.BitLen()), a.first.Compare(b.first))
	})
	var out []addrRange
	for _, s := range spans {
		if n := len(out) - 1; n >= 0 && out[n].first.BitLen() == s.first.BitLen() &&
			(!out[n].last.Less(s.first) || out[n].last.Next() == s.first) {
			if out[n].last.Less(s.last) {
				out[n].last = s.last
			}
			continue
		}
		out = append(out, s)
	}
	return out
}

// mergePorts sorts port ranges and joins the ones that overlap or touch.
func mergePorts(ports []portRange) []portRange {
	slices.SortFunc(ports, func(a, b portRange) int {
		return cmp.Or(cmp.Compare(a.protocol, b.protocol), cmp.Compare(a.first, b.first))
	})
	var out []portRange
	for _, p := range ports {
		if n := len(out) - 1; n >= 0 && out[n].protocol == p.protocol && int(p.first) <= int(out[n].last)+1 {
			out[n].last = max(out[n].last, p.last)
			continue
		}
		out = append(out, p)
	}
	return out
}

func (s podSelector) matches(namespace string, namespaceLabels labels.Set, p *pod) bool {
	if s.namespaces == nil {
		if namespace != s.namespace {
			return false
		}
	} else if !s.namespaces.Matches(namespaceLabels) {
		return false
	}
	return s.pods.Matches(p.labels)
}

// String describes the selector; equal descriptions select the same pods.
func (s podSelector) String() string {
	pods, namespaces := "all pods", "of namespace "+s.namespace
	if text := s.pods.String(); text != "" {
		pods = "pods " + text
	}
	if s.namespaces != nil {
		namespaces = "of all namespaces"
		if text := s.namespaces.String(); text != "" {
			namespaces = "of namespaces " + text
		}
	}
	return pods + " " + namespaces
}

func (s addrRange) String() string { return s.first.String() + "-" + s.last.String() }

func (p portRange) String() string {
	switch {
	case p.first == 0 && p.last == 65535:
		return protocolName(p.protocol)
	case p.first == p.last:
		return fmt.Sprintf("%s %d", protocolName(p.protocol), p.first)
	}
	return fmt.Sprintf("%s %d-%d", protocolName(p.protocol), p.first, p.last)
}

func (n namedPort) String() string { return protocolName(n.protocol) + " " + n.name }

// describe joins descriptions.
func describe[T fmt.Stringer](items []T) string {
	var out []string
	for _, i := range items {
		out = append(out, i.String())
	}
	return strings.Join(out, ", ")
}
