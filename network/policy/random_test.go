package policy

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"sigs.k8s.io/network-policy-api/apis/v1alpha2"

	"kedge/network/cni"
)

// random makes clusters up: few names, labels, ports and addresses, so that
// things meet.
type random struct{ *rand.Rand }

func (r random) chance(percent int) bool { return r.IntN(100) < percent }

func pick[T any](r random, from ...T) T { return from[r.IntN(len(from))] }

func (r random) labels() labels.Set {
	set := labels.Set{}
	for _, key := range []string{"app", "tier"} {
		if r.chance(70) {
			set[key] = pick(r, "a", "b", "c")
		}
	}
	return set
}

func (r random) selector() *metav1.LabelSelector {
	s := &metav1.LabelSelector{}
	if r.chance(50) {
		s.MatchLabels = map[string]string{pick(r, "app", "tier"): pick(r, "a", "b", "c")}
	}
	if r.chance(30) {
		e := metav1.LabelSelectorRequirement{Key: pick(r, "app", "tier"), Operator: pick(r,
			metav1.LabelSelectorOpIn, metav1.LabelSelectorOpNotIn, metav1.LabelSelectorOpExists, metav1.LabelSelectorOpDoesNotExist)}
		if e.Operator == metav1.LabelSelectorOpIn || e.Operator == metav1.LabelSelectorOpNotIn {
			e.Values = []string{pick(r, "a", "b"), pick(r, "b", "c")}
		}
		s.MatchExpressions = append(s.MatchExpressions, e)
	}
	return s
}

const (
	randomPods = 12 // that may exist; pod i has address i of each family
	outsiders  = 3  // addresses without a pod
)

func podAddr(i int, v6 bool) netip.Addr {
	if v6 {
		return netip.MustParseAddr(fmt.Sprintf("fd42::%x", 16+i))
	}
	return netip.AddrFrom4([4]byte{10, 42, 0, byte(16 + i)})
}

func (r random) namespace() string { return pick(r, "x", "y", "z") }

// pod makes pod number i.
func (r random) pod(i int) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: fmt.Sprintf("%c", 'x'+i%3), Name: fmt.Sprint("pod", i), UID: types.UID(fmt.Sprint("uid", i, "-", r.Uint32())), Labels: r.labels()},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, v6 := range []bool{false, true} {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: podAddr(i, v6).String()})
	}
	var ports []corev1.ContainerPort
	for _, name := range []string{"web", "dns"} {
		for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
			if r.chance(40) {
				ports = append(ports, corev1.ContainerPort{Name: name, Protocol: protocol, ContainerPort: int32(pick(r, 80, 81, 82))})
			}
		}
	}
	p.Spec.Containers = []corev1.Container{{Ports: ports}}
	if p.Spec.NodeName = "node2"; onNode(i) {
		p.Spec.NodeName = thisNode
	}
	switch {
	case r.chance(5):
		p.Status.Phase = corev1.PodSucceeded
	case r.chance(5):
		p.Spec.HostNetwork = true
	}
	return p
}

func (r random) peers() []networkingv1.NetworkPolicyPeer {
	var out []networkingv1.NetworkPolicyPeer
	for range r.IntN(3) {
		var p networkingv1.NetworkPolicyPeer
		switch r.IntN(4) {
		case 0:
			p.PodSelector = r.selector()
		case 1:
			p.NamespaceSelector = r.selector()
		case 2:
			p.PodSelector, p.NamespaceSelector = r.selector(), r.selector()
		case 3:
			b := pick(r,
				networkingv1.IPBlock{CIDR: "10.42.0.16/29", Except: []string{"10.42.0.18/32", "10.42.0.20/31"}},
				networkingv1.IPBlock{CIDR: "0.0.0.0/0"},
				networkingv1.IPBlock{CIDR: "0.0.0.0/0", Except: []string{"10.42.0.0/27", "10.42.0.16/28"}},
				networkingv1.IPBlock{CIDR: "10.42.0.24/29"},
				networkingv1.IPBlock{CIDR: "fd42::10/125"},
				networkingv1.IPBlock{CIDR: "::/0", Except: []string{"fd42::14/126"}})
			p.IPBlock = &b
		}
		out = append(out, p)
	}
	return out
}

func (r random) ports() []networkingv1.NetworkPolicyPort {
	var out []networkingv1.NetworkPolicyPort
	for range r.IntN(3) {
		p := networkingv1.NetworkPolicyPort{}
		if r.chance(80) {
			protocol := pick(r, corev1.ProtocolTCP, corev1.ProtocolUDP, corev1.ProtocolSCTP)
			p.Protocol = &protocol
		}
		switch r.IntN(4) {
		case 0:
		case 1:
			name := intstr.FromString(pick(r, "web", "dns"))
			p.Port = &name
		case 2:
			number := intstr.FromInt32(int32(80 + r.IntN(4)))
			p.Port = &number
		case 3:
			number, end := intstr.FromInt32(int32(79+r.IntN(4))), int32(82+r.IntN(2))
			p.Port, p.EndPort = &number, &end
		}
		out = append(out, p)
	}
	return out
}

func (r random) policy(namespace, name string) *networkingv1.NetworkPolicy {
	np := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}}
	np.Spec.PodSelector = *r.selector()
	switch r.IntN(3) {
	case 0:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress}
	case 1:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeEgress}
	case 2:
		np.Spec.PolicyTypes = []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress}
	}
	for range r.IntN(3) {
		np.Spec.Ingress = append(np.Spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: r.peers(), Ports: r.ports()})
	}
	for range r.IntN(3) {
		np.Spec.Egress = append(np.Spec.Egress, networkingv1.NetworkPolicyEgressRule{To: r.peers(), Ports: r.ports()})
	}
	return np
}

// clusterSubject fills one of two fields.
func (r random) clusterSubject() (*metav1.LabelSelector, *v1alpha2.NamespacedPod) {
	if r.chance(40) {
		return r.selector(), nil
	}
	return nil, &v1alpha2.NamespacedPod{NamespaceSelector: *r.selector(), PodSelector: *r.selector()}
}

func (r random) protocols() []v1alpha2.ClusterNetworkPolicyProtocol {
	var out []v1alpha2.ClusterNetworkPolicyProtocol
	for range r.IntN(3) {
		port := pick(r, nil, &v1alpha2.Port{Number: 80}, &v1alpha2.Port{Range: &v1alpha2.PortRange{Start: 81, End: 90}})
		out = append(out, pick(r,
			v1alpha2.ClusterNetworkPolicyProtocol{TCP: &v1alpha2.ClusterNetworkPolicyProtocolTCP{DestinationPort: port}},
			v1alpha2.ClusterNetworkPolicyProtocol{UDP: &v1alpha2.ClusterNetworkPolicyProtocolUDP{DestinationPort: port}},
			v1alpha2.ClusterNetworkPolicyProtocol{SCTP: &v1alpha2.ClusterNetworkPolicyProtocolSCTP{DestinationPort: port}},
			v1alpha2.ClusterNetworkPolicyProtocol{DestinationNamedPort: pick(r, "web", "dns")}))
	}
	return out
}

// clusterPolicy returns a policy with a unique priority.
func (r random) clusterPolicy(name string) *v1alpha2.ClusterNetworkPolicy {
	p := &v1alpha2.ClusterNetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}}
	p.Spec.Tier = pick(r, v1alpha2.AdminTier, v1alpha2.BaselineTier)
	p.Spec.Priority = int32(r.IntN(30)*3 + strings.Index("lmn", name))
	p.Spec.Subject.Namespaces, p.Spec.Subject.Pods = r.clusterSubject()
	action := func() v1alpha2.ClusterNetworkPolicyRuleAction {
		return pick(r, v1alpha2.ClusterNetworkPolicyRuleActionAccept, v1alpha2.ClusterNetworkPolicyRuleActionDeny, v1alpha2.ClusterNetworkPolicyRuleActionPass)
	}
	for range r.IntN(3) {
		var peer v1alpha2.ClusterNetworkPolicyIngressPeer
		peer.Namespaces, peer.Pods = r.clusterSubject()
		p.Spec.Ingress = append(p.Spec.Ingress, v1alpha2.ClusterNetworkPolicyIngressRule{Action: action(), Protocols: r.protocols(), From: []v1alpha2.ClusterNetworkPolicyIngressPeer{peer}})
	}
	for range r.IntN(3) {
		var peer v1alpha2.ClusterNetworkPolicyEgressPeer
		if protocols := r.protocols(); r.chance(30) {
			peer.Networks = []v1alpha2.CIDR{pick[v1alpha2.CIDR](r, "10.42.0.16/29", "0.0.0.0/0", "::/0", "fd42::18/125")}
			p.Spec.Egress = append(p.Spec.Egress, v1alpha2.ClusterNetworkPolicyEgressRule{Action: action(), Protocols: protocols, To: []v1alpha2.ClusterNetworkPolicyEgressPeer{peer}})
			continue
		}
		peer.Namespaces, peer.Pods = r.clusterSubject()
		p.Spec.Egress = append(p.Spec.Egress, v1alpha2.ClusterNetworkPolicyEgressRule{Action: action(), Protocols: r.protocols(), To: []v1alpha2.ClusterNetworkPolicyEgressPeer{peer}})
	}
	return p
}

// world is a cluster and an engine that receives its changes.
type world struct {
	random
	cluster
	engine *engine
}

func newWorld(seed uint64, e *engine) *world {
	w := &world{random: random{rand.New(rand.NewPCG(seed, 0))}, engine: e, cluster: cluster{
		namespaces: map[string]labels.Set{}, pods: map[podKey]*corev1.Pod{}, policies: map[podKey]*networkingv1.NetworkPolicy{},
		wide: map[string]*v1alpha2.ClusterNetworkPolicy{},
	}}
	for _, name := range []string{"x", "y", "z"} {
		w.label(name)
	}
	return w
}

// label gives a namespace other labels.
func (w *world) label(name string) {
	w.namespaces[name] = w.labels()
	w.engine.setNamespace(name, w.namespaces[name])
}

// onNode reports whether a pod is on the node; the others are peers only.
func onNode(i int) bool { return i%4 != 3 }

// step lets something happen.
func (w *world) step() {
	switch w.IntN(12) {
	case 10:
		name := pick(w.random, "l", "m", "n")
		if w.wide[name] != nil && w.chance(60) {
			delete(w.wide, name)
			w.engine.setClusterPolicy(name, nil)
			return
		}
		w.wide[name] = w.clusterPolicy(name)
		w.engine.setClusterPolicy(name, mustRead(newClusterPolicy(w.wide[name])))
	case 0:
		w.label(w.namespace())
	case 1, 2, 3, 4, 5:
		i := w.IntN(randomPods)
		p := w.pod(i)
		key := podKey{p.Namespace, p.Name}
		old := w.pods[key]
		if old != nil && w.chance(50) { // changes as it lives
			changed := old.DeepCopy()
			changed.Labels, changed.Status.Phase = p.Labels, p.Status.Phase
			w.pods[key] = changed
			w.engine.setPod(key, newPod(changed))
			return
		}
		if old != nil {
			w.engine.detach(p.Name)
			delete(w.pods, key)
			w.engine.setPod(key, nil)
			if w.chance(50) {
				return
			}
		}
		w.pods[key] = p
		steps := []func(){func() { w.engine.setPod(key, newPod(p)) }}
		if onNode(i) && !p.Spec.HostNetwork {
			steps = append(steps, func() { w.engine.attach(w.attachment(i, p)) })
		}
		if w.chance(50) {
			slices.Reverse(steps)
		}
		for _, s := range steps {
			s()
		}
	default:
		key := podKey{w.namespace(), pick(w.random, "one", "two", "three")}
		if w.policies[key] != nil && w.chance(40) {
			delete(w.policies, key)
			w.engine.setPolicy(key, nil)
			return
		}
		np := w.policy(key.namespace, key.name)
		w.policies[key] = np
		w.engine.setPolicy(key, mustRead(newPolicy(np)))
	}
}

func (w *world) attachment(i int, p *corev1.Pod) *attachment {
	return newAttachment(cni.Attachment{
		Owner: p.Name, Namespace: p.Namespace, Name: p.Name, UID: string(p.UID),
		Addrs: []netip.Addr{podAddr(i, false), podAddr(i, true)},
	})
}

// replay passes all objects to a new engine, in any order.
func (w *world) replay(e *engine) {
	var steps []func()
	for name, set := range w.namespaces {
		steps = append(steps, func() { e.setNamespace(name, set) })
	}
	for key, p := range w.pods {
		steps = append(steps, func() { e.setPod(key, newPod(p)) })
		var i int
		fmt.Sscanf(p.Name, "pod%d", &i)
		if onNode(i) && !p.Spec.HostNetwork {
			steps = append(steps, func() { e.attach(w.attachment(i, p)) })
		}
	}
	for key, np := range w.policies {
		steps = append(steps, func() { e.setPolicy(key, mustRead(newPolicy(np))) })
	}
	for name, cnp := range w.wide {
		steps = append(steps, func() { e.setClusterPolicy(name, mustRead(newClusterPolicy(cnp))) })
	}
	w.Shuffle(len(steps), func(i, j int) { steps[i], steps[j] = steps[j], steps[i] })
	for _, s := range steps {
		s()
	}
}

// connections returns all that are worth asking about.
func (w *world) connections() []connection {
	var out []connection
	for _, v6 := range []bool{false, true} {
		for from := range randomPods + outsiders {
			for to := range randomPods + outsiders {
				for _, protocol := range []corev1.Protocol{corev1.ProtocolTCP, corev1.ProtocolUDP} {
					for _, port := range []int{80, 81, 82, 1000} {
						out = append(out, connection{podAddr(from, v6), podAddr(to, v6), protocol, port})
					}
				}
			}
		}
	}
	return out
}

func (w *world) sorted() []podKey {
	return slices.SortedFunc(maps.Keys(w.policies), func(a, b podKey) int {
		return slices.Compare([]string{a.namespace, a.name}, []string{b.namespace, b.name})
	})
}

func mustRead[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
