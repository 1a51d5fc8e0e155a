package explain

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	listers "k8s.io/client-go/listers/core/v1"

	"kedge/network/trace"
)

// Explainer answers questions about one node.
type Explainer struct {
	nodeName string
	nodeIPs  func() []netip.Addr
	services listers.ServiceLister
	pods     listers.PodLister
	parts    []trace.Part
}

// New makes an explainer of parts, which are asked in their order.
func New(nodeName string, nodeIPs func() []netip.Addr, shared informers.SharedInformerFactory, parts ...trace.Part) *Explainer {
	return &Explainer{
		nodeName: nodeName, nodeIPs: nodeIPs, parts: parts,
		services: shared.Core().V1().Services().Lister(), pods: shared.Core().V1().Pods().Lister(),
	}
}

// Answer is what Explain found.
type Answer struct {
	From   string       `json:"from"`
	To     string       `json:"to"`
	Steps  []trace.Step `json:"steps"`
	Packet trace.Packet `json:"packet"` // as it was at the end
	Result string       `json:"result"`
}

// Explain follows the connection that is asked for. Errors say what is wrong with
// the question.
func (e *Explainer) Explain(ctx context.Context, q Question) (Answer, error) {
	q.Namespace, q.From = cmp.Or(q.Namespace, corev1.NamespaceDefault), cmp.Or(q.From, "node")
	if _, ok := protocols[strings.ToLower(q.Protocol)]; q.Protocol != "" && !ok {
		return Answer{}, fmt.Errorf("protocol %q is none of tcp, udp and sctp", q.Protocol)
	}
	to, protocol, what, err := e.destination(q)
	if err != nil {
		return Answer{}, err
	}
	from, who, err := e.source(q, to.Addr().Is6())
	if err != nil {
		return Answer{}, err
	}
	p := trace.Packet{
		Protocol: protocols[strings.ToLower(protocol)],
		From:     trace.End{Addr: netip.AddrPortFrom(from, clientPort)}, To: trace.End{Addr: to},
	}
	steps, err := trace.Run(ctx, e.parts, e.resolve, &p)
	if err != nil {
		return Answer{}, err
	}
	a := Answer{From: who, To: fmt.Sprintf("%s, %s/%s", what, to, strings.ToUpper(protocol)), Steps: steps, Packet: p}
	switch {
	case p.Ended:
		a.Result = "it ends here"
	case p.To.Name != "":
		a.Result = fmt.Sprintf("it reaches %s, pod %s", p.To.Addr, p.To.Name)
	default:
		a.Result = fmt.Sprintf("it goes to %s, %s", p.To.Addr, p.To.Place)
	}
	return a, nil
}

// clientPort is the imagined client's: no rule depends on it.
const clientPort = 50000

// destination finds the address and protocol that a question means.
func (e *Explainer) destination(q Question) (to netip.AddrPort, protocol, what string, err error) {
	t, err := parseTarget(q.To, q.Namespace)
	if err != nil {
		return to, "", "", err
	}
	protocol = cmp.Or(q.Protocol, "tcp")
	number := func(a netip.Addr) (netip.AddrPort, error) {
		n, err := strconv.ParseUint(t.port, 10, 16)
		if err != nil || n == 0 {
			return netip.AddrPort{}, fmt.Errorf("say which port of %s: %s:PORT", q.To, strings.TrimSuffix(q.To, ":"+t.port))
		}
		return netip.AddrPortFrom(a, uint16(n)), nil
	}
	switch t.kind {
	case "address":
		to, err = number(t.addr)
		return to, protocol, "address", err
	case "node":
		if len(e.nodeIPs()) == 0 {
			return to, "", "", fmt.Errorf("the node has no address")
		}
		to, err = number(e.nodeIPs()[0])
		return to, protocol, "node " + e.nodeName, err
	}
	if t.kind != "pod" {
		s, err := e.services.Services(t.namespace).Get(t.name)
		if err == nil {
			return serviceAddress(s, t.port, q.Protocol)
		}
		if t.kind == "service" {
			return to, "", "", fmt.Errorf("there is no service %s/%s", t.namespace, t.name)
		}
	}
	pod, err := e.pods.Pods(t.namespace).Get(t.name)
	if err != nil {
		return to, "", "", fmt.Errorf("there is no %s %s/%s", cmp.Or(t.kind, "service or pod"), t.namespace, t.name)
	}
	addr, err := netip.ParseAddr(pod.Status.PodIP)
	if err != nil {
		return to, "", "", fmt.Errorf("pod %s/%s has no address yet", t.namespace, t.name)
	}
	if t.port == "" {
		for _, c := range pod.Spec.Containers {
			if len(c.Ports) > 0 {
				t.port = strconv.Itoa(int(c.Ports[0].ContainerPort))
				break
			}
		}
	}
	to, err = number(addr)
	return to, protocol, "pod " + t.namespace + "/" + t.name, err
}

func serviceAddress(s *corev1.Service, port, protocol string) (netip.AddrPort, string, string, error) {
	name := s.Namespace + "/" + s.Name
	addr, err := netip.ParseAddr(s.Spec.ClusterIP)
	switch {
	case s.Spec.Type == corev1.ServiceTypeExternalName:
		return netip.AddrPort{}, "", "", fmt.Errorf("service %s is only a name, for %s: nothing is programmed for it", name, s.Spec.ExternalName)
	case err != nil:
		return netip.AddrPort{}, "", "", fmt.Errorf("service %s is headless: its name leads to the pods themselves, and nothing is programmed for it; ask for a pod", name)
	}
	p, err := servicePort(s, port, protocol)
	if err != nil {
		return netip.AddrPort{}, "", "", err
	}
	return netip.AddrPortFrom(addr, uint16(p.Port)), cmp.Or(strings.ToLower(string(p.Protocol)), "tcp"), "service " + name, nil
}

// source finds the address of the family from which a question's client connects.
func (e *Explainer) source(q Question, is6 bool) (netip.Addr, string, error) {
	t, err := parseTarget(q.From, q.Namespace)
	if err != nil {
		return netip.Addr{}, "", err
	}
	family := map[bool]string{false: "IPv4", true: "IPv6"}[is6]
	switch t.kind {
	case "address":
		if t.addr.Is6() != is6 {
			return netip.Addr{}, "", fmt.Errorf("%s is not an %s address, as the destination is", t.addr, family)
		}
		return t.addr, "address " + t.addr.String(), nil
	case "node":
		for _, a := range e.nodeIPs() {
			if a.Is6() == is6 {
				return a, fmt.Sprintf("node %s, %s", e.nodeName, a), nil
			}
		}
		return netip.Addr{}, "", fmt.Errorf("the node has no %s address, as the destination is", family)
	case "service":
		return netip.Addr{}, "", fmt.Errorf("%q: services do not connect to anything; say which pod does", q.From)
	}
	pod, err := e.pods.Pods(t.namespace).Get(t.name)
	if err != nil {
		return netip.Addr{}, "", fmt.Errorf("there is no pod %s/%s", t.namespace, t.name)
	}
	if pod.Spec.NodeName != e.nodeName {
		return netip.Addr{}, "", fmt.Errorf("pod %s/%s runs on node %q: ask there, its rules are the ones that its connections pass", t.namespace, t.name, pod.Spec.NodeName)
	}
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Is6() == is6 {
			return a, fmt.Sprintf("pod %s/%s, %s", t.namespace, t.name, a), nil
		}
	}
	return netip.Addr{}, "", fmt.Errorf("pod %s/%s has no %s address, as the destination is", t.namespace, t.name, family)
}

// resolve says where an address is, seen from the node.
func (e *Explainer) resolve(a netip.Addr) (trace.Place, string) {
	all, _ := e.pods.List(labels.Everything()) // a lister's only error is a bad selector
	for _, p := range all {
		has := slices.ContainsFunc(p.Status.PodIPs, func(ip corev1.PodIP) bool { return ip.IP == a.String() })
		if !has || p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		place := trace.Outside
		if p.Spec.NodeName == e.nodeName {
			place = trace.Pod
		}
		return place, p.Namespace + "/" + p.Name
	}
	if slices.Contains(e.nodeIPs(), a) || isLocal(a) {
		return trace.Node, ""
	}
	return trace.Outside, ""
}

func isLocal(a netip.Addr) bool {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return false
	}
	return slices.ContainsFunc(addrs, func(i net.Addr) bool {
		p, err := netip.ParsePrefix(i.String())
		return err == nil && p.Addr().Unmap() == a
	}) || a.IsLoopback()
}
