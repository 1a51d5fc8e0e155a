package servicelb

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
)

// Load balancer classes of kedge (spec.loadBalancerClass). A service without a class gets an address of a pool
// if there are pools, and otherwise the addresses of nodes.
const (
	ClassNode = "kedge.io/node"
	ClassPool = "kedge.io/pool"
)

// Annotations of services. MetalLB's prefixes are supported too, so that manifests for MetalLB work.
const (
	annotationAddresses = "loadBalancerIPs" // requested addresses, separated by commas
	annotationPool      = "address-pool"    // the pool's name
	annotationSharing   = "allow-shared-ip" // services with the same value may share an address
)

var prefixes = []string{"kedge.io/", "metallb.io/", "metallb.universe.tf/"}

// NodeLabel selects the nodes whose addresses services get: if a node has it with the value "true", only such
// nodes are used.
const NodeLabel = "kedge.io/enablelb"

// mode is the source of a service's addresses.
type mode int

const (
	foreign mode = iota
	fromNodes
	fromPool
)

// modeOf returns the source of a service's addresses.
func modeOf(s *corev1.Service, pools bool) mode {
	if s.Spec.Type != corev1.ServiceTypeLoadBalancer {
		return foreign
	}
	switch c := s.Spec.LoadBalancerClass; {
	case c == nil && pools:
		return fromPool
	case c == nil:
		return fromNodes
	case *c == ClassNode:
		return fromNodes
	case *c == ClassPool:
		return fromPool
	}
	return foreign
}

// request has the addresses and options that a service requests.
type request struct {
	service   *corev1.Service
	addresses []netip.Addr
	pool      string
	sharing   string
	problem   error // the error if the request is invalid
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
			r.problem = fmt.Errorf("requested address %q is not an IP address", item)
			continue
		}
		if slices.ContainsFunc(r.addresses, func(o netip.Addr) bool { return o.Is4() == a.Is4() }) {
			r.problem = fmt.Errorf("requests two addresses of one family")
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

// families returns the IP families of a service, as whether each is IPv4.
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

// portKey is a port and protocol that two services cannot both have at one address.
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

// local reports whether only nodes with an endpoint of a service may receive its traffic.
func local(s *corev1.Service) bool {
	return s.Spec.ExternalTrafficPolicy == corev1.ServiceExternalTrafficPolicyLocal
}

// readyOn returns the nodes with a ready endpoint.
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

// currentAddresses returns the current addresses of a service.
func currentAddresses(s *corev1.Service) []netip.Addr {
	var out []netip.Addr
	for _, i := range s.Status.LoadBalancer.Ingress {
		if a, err := netip.ParseAddr(i.IP); err == nil {
			out = append(out, a)
		}
	}
	return out
}

func nameOf(s *corev1.Service) string { return s.Namespace + "/" + s.Name }
