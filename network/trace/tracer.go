package trace

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
)

// Tracer answers questions about the rules of one node.
type Tracer struct {
	nodeName string
	nodeIPs  func() []netip.Addr
	services listers.ServiceLister
	pods     listers.PodLister
	parts    []Part
}

// New returns a tracer that takes packets through the parts in their order.
func New(nodeName string, nodeIPs func() []netip.Addr, shared informers.SharedInformerFactory, parts ...Part) *Tracer {
	return &Tracer{
		nodeName: nodeName, nodeIPs: nodeIPs, parts: parts,
		services: shared.Core().V1().Services().Lister(), pods: shared.Core().V1().Pods().Lister(),
	}
}

// Answer is the result of Trace.
type Answer struct {
	From   string `json:"from"`
	To     string `json:"to"`
	Steps  []Step `json:"steps"`
	Packet Packet `json:"packet"` // in its final state
	Result string `json:"result"`
}

// Trace follows the connection of the question. Errors say what is wrong with the
// question.
func (tr *Tracer) Trace(ctx context.Context, q Question) (Answer, error) {
	q.Namespace, q.From = cmp.Or(q.Namespace, corev1.NamespaceDefault), cmp.Or(q.From, "node")
	if _, ok := protocols[strings.ToLower(q.Protocol)]; q.Protocol != "" && !ok {
		return Answer{}, fmt.Errorf("protocol %q is not tcp, udp or sctp", q.Protocol)
	}
	to, protocol, what, err := tr.destination(q)
	if err != nil {
		return Answer{}, err
	}
	from, who, err := tr.source(q, to.Addr().Is6())
	if err != nil {
		return Answer{}, err
	}
	p := Packet{
		Protocol: protocols[strings.ToLower(protocol)],
		From:     End{Addr: netip.AddrPortFrom(from, clientPort)}, To: End{Addr: to},
	}
	steps, err := Run(ctx, tr.parts, tr.resolve, &p)
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

// clientPort is the source port of the imagined packet: no rule depends on it.
const clientPort = 50000

// destination returns the address and protocol that a question means.
func (tr *Tracer) destination(q Question) (to netip.AddrPort, protocol, what string, err error) {
	t, err := parseTarget(q.To, q.Namespace)
	if err != nil {
		return to, "", "", err
	}
	protocol = cmp.Or(q.Protocol, "tcp")
	number := func(a netip.Addr) (netip.AddrPort, error) {
		n, err := strconv.ParseUint(t.port, 10, 16)
		if err != nil || n == 0 {
			return netip.AddrPort{}, fmt.Errorf("missing port of %s: use %s:PORT", q.To, strings.TrimSuffix(q.To, ":"+t.port))
		}
		return netip.AddrPortFrom(a, uint16(n)), nil
	}
	switch t.kind {
	case "address":
		to, err = number(t.addr)
		return to, protocol, "address", err
	case "node":
		if len(tr.nodeIPs()) == 0 {
			return to, "", "", fmt.Errorf("the node has no address")
		}
		to, err = number(tr.nodeIPs()[0])
		return to, protocol, "node " + tr.nodeName, err
	}
	if t.kind != "pod" {
		s, err := tr.services.Services(t.namespace).Get(t.name)
		if err == nil {
			return serviceAddress(s, t.port, q.Protocol)
		}
		if t.kind == "service" {
			return to, "", "", fmt.Errorf("there is no service %s/%s", t.namespace, t.name)
		}
	}
	pod, err := tr.pods.Pods(t.namespace).Get(t.name)
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
		return netip.AddrPort{}, "", "", fmt.Errorf("service %s is of type ExternalName, for %s: no rules exist for it", name, s.Spec.ExternalName)
	case err != nil:
		return netip.AddrPort{}, "", "", fmt.Errorf("service %s is headless: its name resolves to the pods, and no rules exist for it; trace to a pod instead", name)
	}
	p, err := servicePort(s, port, protocol)
	if err != nil {
		return netip.AddrPort{}, "", "", err
	}
	return netip.AddrPortFrom(addr, uint16(p.Port)), cmp.Or(strings.ToLower(string(p.Protocol)), "tcp"), "service " + name, nil
}

// source returns the address of the family from which the client of a question connects.
func (tr *Tracer) source(q Question, is6 bool) (netip.Addr, string, error) {
	t, err := parseTarget(q.From, q.Namespace)
	if err != nil {
		return netip.Addr{}, "", err
	}
	family := map[bool]string{false: "IPv4", true: "IPv6"}[is6]
	switch t.kind {
	case "address":
		if t.addr.Is6() != is6 {
			return netip.Addr{}, "", fmt.Errorf("%s is not an %s address, but the destination is", t.addr, family)
		}
		return t.addr, "address " + t.addr.String(), nil
	case "node":
		for _, a := range tr.nodeIPs() {
			if a.Is6() == is6 {
				return a, fmt.Sprintf("node %s, %s", tr.nodeName, a), nil
			}
		}
		return netip.Addr{}, "", fmt.Errorf("the node has no %s address, but the destination is %[1]s", family)
	case "service":
		return netip.Addr{}, "", fmt.Errorf("%q is a service and opens no connections: give a pod", q.From)
	}
	pod, err := tr.pods.Pods(t.namespace).Get(t.name)
	if err != nil {
		return netip.Addr{}, "", fmt.Errorf("there is no pod %s/%s", t.namespace, t.name)
	}
	if pod.Spec.NodeName != tr.nodeName {
		return netip.Addr{}, "", fmt.Errorf("pod %s/%s runs on node %q: run the command there, because its connections pass that node's rules", t.namespace, t.name, pod.Spec.NodeName)
	}
	for _, ip := range pod.Status.PodIPs {
		if a, err := netip.ParseAddr(ip.IP); err == nil && a.Is6() == is6 {
			return a, fmt.Sprintf("pod %s/%s, %s", t.namespace, t.name, a), nil
		}
	}
	return netip.Addr{}, "", fmt.Errorf("pod %s/%s has no %s address, but the destination is %[3]s", t.namespace, t.name, family)
}

// resolve returns the place of an address, seen from the node.
func (tr *Tracer) resolve(a netip.Addr) (Place, string) {
	all, _ := tr.pods.List(labels.Everything()) // a lister's only error is a bad selector
	for _, p := range all {
		has := slices.ContainsFunc(p.Status.PodIPs, func(ip corev1.PodIP) bool { return ip.IP == a.String() })
		if !has || p.Spec.HostNetwork || p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			continue
		}
		place := Outside
		if p.Spec.NodeName == tr.nodeName {
			place = Pod
		}
		return place, p.Namespace + "/" + p.Name
	}
	if slices.Contains(tr.nodeIPs(), a) || isLocal(a) {
		return Node, ""
	}
	return Outside, ""
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
