package servicelb

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Classes of load balancers that are ours (spec.loadBalancerClass). A service without a
// class gets an address of a pool where there are pools, and else those of the nodes.
const (
	ClassNode = "kedge.io/node"
	ClassPool = "kedge.io/pool"
)

// Annotations of services. MetalLB's prefixes are understood too, so that what was
// written for it goes on to work.
const (
	annotationAddresses = "loadBalancerIPs" // addresses asked for, separated by commas
	annotationPool      = "address-pool"    // the pool's name
	annotationSharing   = "allow-shared-ip" // services with the same value may share an address
)

var prefixes = []string{"kedge.io/", "metallb.io/", "metallb.universe.tf/"}

// NodeLabel chooses the nodes whose addresses services get: as soon as one node has it
// with the value "true", only those that have.
const NodeLabel = "kedge.io/enablelb"

// mode is where a service's addresses come from.
type mode int

const (
	notOurs mode = iota
	ofNodes
	ofPool
)

// modeOf says where a service's addresses come from.
func modeOf(s *corev1.Service, pools bool) mode {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return notOurs
	}
	switch c := s.Spec.LoadBalancerClass; {
	case c == nil && pools:
		return ofPool
	case c == nil:
		return ofNodes
	case *c == ClassNode:
		return ofNodes
	case *c == ClassPool:
		return ofPool
	}
	return notOurs
}

// request is what a service asks for.
type request struct {
	service   *corev1.Service
	addresses []netip.Addr
	pool      string
	sharing   string
	problem   error // why it cannot be understood
}

func requestOf(s *corev1.Service) request {
	r := request{service: s, pool: annotation(s, annotationPool), sharing: annotation(s, annotationSharing)}
	text := annotation(s, annotationAddresses)
	if text == "" {
		text = s.Spec.LoadBalancerIP
	}
	for item := range strings.SplitSeq(text, ",") {
		item = strings.TrimSpace(item)
		if item == "" {
			continue
		}
		a, err := netip.ParseAddr(item)
		if err != nil {
			r.problem = fmt.Errorf("%q, which it asks for, is not an address", item)
			continue
		}
		if slices.ContainsFunc(r.addresses, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
			r.problem = fmt.Errorf("it asks for two addresses of one family")
		}
		r.addresses = append(r.addresses, a)
	}
	return r
}

func annotation(s *corev1.Service, name string) string {
	for _, p := range prefixes {
		if v := s.Annotations[p+name]; v != "" {
			return v
		}
	}
	return ""
}

// families are those of a service, IPv4 or not.
func families(s *corev1.Service) []bool {
	var out []bool
	for _, f := range s.Spec.IPFamilies {
		out = append(out, f == corev1.IPv4Protocol)
	}
	if len(out) == 0 {
		out = []bool{true}
	}
	return out
}

// portKey is a port that two services cannot have at one address.
type portKey struct {
	protocol corev1.Protocol
	port     int32
}

func (k portKey) String() string { return fmt.Sprintf("%d/%s", k.port, k.protocol) }

func ports(s *corev1.Service) []portKey {
	var out []portKey
	for _, p := range s.Spec.Ports {
		out = append(out, portKey{p.Protocol, p.Port})
	}
	return out
}

// local says whether packets for a service must come to a node with an endpoint of it.
func local(s *corev1.Service) bool {
	return s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// readyOn are the nodes with an endpoint that takes connections.
func readyOn(slices []*discoveryv1.EndpointSlice) map[string]bool {
	out := map[string]bool{}
	for _, s := range slices {
		for _, e := range s.Endpoints {
			if e.NodeName != nil && (e.Conditions.Ready == nil || *e.Conditions.Ready) {
				out[*e.NodeName] = true
			}
		}
	}
	return out
}

// given are the addresses that a service has.
func given(s *corev1.Service) []netip.Addr {
	var out []netip.Addr
	for _, i := range s.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(i.IP); err == nil {
			out = append(out, a)
		}
	}
	return out
}

func nameOf(s *corev1.Service) string { return s.Namespace + "/" + s.Name }
