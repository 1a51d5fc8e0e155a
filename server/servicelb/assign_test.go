package servicelb

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/internal/addresspool"
)

// option changes a service that a test makes.
type option func(*corev1.Service)

func annotate(key, value string) option {
	return func(s *corev1.Service) { metav1.SetMetaDataAnnotation(&s.ObjectMeta, key, value) }
}

func has(addrs ...string) option {
	return func(s *corev1.Service) {
		for _, a := range addrs {
			s.Status.LoadBalancer.Ingress = append(s.Status.LoadBalancer.Ingress, corev1.LoadBalancerIngress{IP: a})
		}
	}
}

func families46(policy corev1.IPFamilyPolicy) option {
	return func(s *corev1.Service) {
		s.Spec.IPFamilies = []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
		s.Spec.IPFamilyPolicy = &policy
	}
}

func class(c string) option { return func(s *corev1.Service) { s.Spec.LoadBalancerClass = &c } }

func localOnly(s *corev1.Service) {
	s.Spec.ExternalTrafficPolicy = corev1.ServiceExternalTrafficPolicyLocal
}

func selects(app string) option {
	return func(s *corev1.Service) { s.Spec.Selector = map[string]string{"app": app} }
}

// made counts services: those made later are younger.
var made int

func service(name string, port int32, options ...option) *corev1.Service {
	made++
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default", UID: "uid-" + "x", CreationTimestamp: metav1.NewTime(time.Unix(int64(made), 0))},
		Spec: corev1.ServiceSpec{
			Type: corev1.ServiceTypeLoadBalancer, IPFamilies: []corev1.IPFamily{corev1.IPv4Protocol},
			Ports: []corev1.ServicePort{{Protocol: corev1.ProtocolTCP, Port: port}},
		},
	}
	for _, o := range options {
		o(s)
	}
	return s
}

// node makes one; a ! before its name makes it unready. Addresses beginning with "ext:" are external.
func node(name string, addrs ...string) *corev1.Node {
	name, unready := strings.CutPrefix(name, "!")
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{}}}
	status := corev1.ConditionTrue
	if unready {
		status = corev1.ConditionFalse
	}
	n.Status.Conditions = []corev1.NodeCondition{{Type: corev1.NodeReady, Status: status}}
	for _, a := range addrs {
		kind := corev1.NodeInternalIP
		a, ext := strings.CutPrefix(a, "ext:")
		if ext {
			kind = corev1.NodeExternalIP
		}
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: kind, Address: a})
	}
	return n
}

func labelled(n *corev1.Node, key, value string) *corev1.Node {
	n.Labels[key] = value
	return n
}

func pools(t *testing.T, items ...string) []addresspool.Pool {
	t.Helper()
	p, err := addresspool.Parse(items)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// decided is what each service got: addresses, or reason and message.
func decided(st state) string {
	if st.slices == nil {
		st.slices = func(*corev1.Service) []*discoveryv1.EndpointSlice { return nil }
	}
	d := assign(st)
	var out []string
	for _, s := range st.services {
		x, ok := d[nameOf(s)]
		switch {
		case !ok:
			out = append(out, s.Name+": not ours")
		case x.message != "":
			out = append(out, s.Name+": "+x.reason+": "+x.message)
		default:
			out = append(out, fmt.Sprint(s.Name, ": ", x.addresses))
		}
	}
	return strings.Join(out, "\n")
}

func TestNodes(t *testing.T) {
	two := []*corev1.Node{node("b", "192.0.2.2", "fd00::2"), node("a", "192.0.2.1", "fd00::1")}
	for name, c := range map[string]struct {
		st   state
		want string
	}{
		"all nodes": {state{nodes: two, services: []*corev1.Service{service("web", 80)}}, "web: [192.0.2.1 192.0.2.2]"},
		"dual stack": {state{nodes: two, services: []*corev1.Service{service("web", 80, families46(corev1.IPFamilyPolicyRequireDualStack))}},
			"web: [192.0.2.1 192.0.2.2 fd00::1 fd00::2]"},
		"external addresses first": {state{nodes: []*corev1.Node{node("a", "192.0.2.1", "ext:198.51.100.1")}, services: []*corev1.Service{service("web", 80)}}, "web: [198.51.100.1]"},
		"ready nodes only":         {state{nodes: []*corev1.Node{two[0], node("!c", "192.0.2.3")}, services: []*corev1.Service{service("web", 80)}}, "web: [192.0.2.2]"},
		"no node is ready":         {state{nodes: []*corev1.Node{node("!c", "192.0.2.3")}, services: []*corev1.Service{service("web", 80)}}, "web: [192.0.2.3]"},
		"excluded": {state{nodes: []*corev1.Node{two[0], labelled(node("d", "192.0.2.4"), corev1.LabelNodeExcludeBalancers, "")}, services: []*corev1.Service{service("web", 80)}},
			"web: [192.0.2.2]"},
		"chosen": {state{nodes: []*corev1.Node{two[0], labelled(node("d", "192.0.2.4"), NodeLabel, "true")}, services: []*corev1.Service{service("web", 80)}}, "web: [192.0.2.4]"},
		"ports are taken once": {state{nodes: two[1:], services: []*corev1.Service{service("old", 80), service("young", 80), service("other", 81)}},
			"old: [192.0.2.1]\nyoung: PortTaken: port 80/TCP of the nodes is used by service default/old; delete that service, use another port, or use an address of a pool (--lb-pool)\nother: [192.0.2.1]"},
		"kedge's own ports": {state{nodes: two[1:], reserved: []portKey{{corev1.ProtocolTCP, 6443}}, services: []*corev1.Service{service("web", 6443)}},
			"web: PortTaken: port 6443/TCP of the nodes is used by kedge itself; use another port, or an address of a pool (--lb-pool)"},
		"no address": {state{nodes: []*corev1.Node{node("a", "fd00::1")}, services: []*corev1.Service{service("web", 80)}}, "web: NoNode: no node has an address of IPv4"},
		"classes": {state{nodes: two[1:], services: []*corev1.Service{service("a", 80, class("example.com/other")), service("b", 80, class(ClassNode)), service("c", 81, class(ClassPool))}},
			"a: not ours\nb: [192.0.2.1]\nc: NoSuchPool: there are no address pools; configure one with --lb-pool"},
		"both kinds": {state{pools: pools(t, "203.0.113.0/24"), nodes: two[1:], services: []*corev1.Service{service("a", 80), service("b", 80, class(ClassNode))}},
			"a: [203.0.113.0]\nb: [192.0.2.1]"},
		"endpoints decide": {state{nodes: two, services: []*corev1.Service{service("web", 80, localOnly)}, slices: func(*corev1.Service) []*discoveryv1.EndpointSlice {
			a, b, no := "a", "b", false
			return []*discoveryv1.EndpointSlice{{Endpoints: []discoveryv1.Endpoint{{NodeName: &a, Conditions: discoveryv1.EndpointConditions{Ready: &no}}, {NodeName: &b}, {}}}}
		}}, "web: [192.0.2.2]"},
		"no endpoints": {state{nodes: two, services: []*corev1.Service{service("web", 80, localOnly)}},
			"web: NoNode: no node has a ready endpoint, and externalTrafficPolicy is Local"},
	} {
		if got := decided(c.st); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, c.want)
		}
	}
}

func TestPools(t *testing.T) {
	const share = "kedge.io/allow-shared-ip"
	for name, c := range map[string]struct {
		pools    []string
		services []*corev1.Service
		want     string
	}{
		"one each": {[]string{"192.0.2.8-192.0.2.9"}, []*corev1.Service{service("a", 80), service("b", 80), service("c", 80)},
			"a: [192.0.2.8]\nb: [192.0.2.9]\nc: NoFreeAddress: no free address of IPv4 in pool default"},
		"kept": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80), service("b", 80, has("192.0.2.8"))}, "a: [192.0.2.9]\nb: [192.0.2.8]"},
		"the older keeps": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, has("192.0.2.8")), service("b", 80, has("192.0.2.8"))},
			"a: [192.0.2.8]\nb: [192.0.2.9]"},
		"moved out of a range that is gone": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, has("198.51.100.1"))}, "a: [192.0.2.8]"},
		"asked for":                         {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, annotate("kedge.io/loadBalancerIPs", "192.0.2.12"))}, "a: [192.0.2.12]"},
		"asked for in the old way": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, func(s *corev1.Service) { s.Spec.LoadBalancerIP = "192.0.2.13" })},
			"a: [192.0.2.13]"},
		"asked for later": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, has("192.0.2.8"), annotate("metallb.io/loadBalancerIPs", "192.0.2.12"))}, "a: [192.0.2.12]"},
		"asked for outside": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, annotate("kedge.io/loadBalancerIPs", "192.0.2.99"))},
			"a: InvalidRequest: requested address 192.0.2.99 is not in pool default"},
		"asked for nonsense": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, annotate("kedge.io/loadBalancerIPs", "home"))},
			`a: InvalidRequest: requested address "home" is not an IP address`},
		"asked for what another has": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80), service("b", 81, annotate("kedge.io/loadBalancerIPs", "192.0.2.8"), has("192.0.2.8"))},
			"a: [192.0.2.9]\nb: [192.0.2.8]"},
		"taken": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, has("192.0.2.8")), service("b", 81, annotate("kedge.io/loadBalancerIPs", "192.0.2.8"))},
			"a: [192.0.2.8]\nb: AddressTaken: 192.0.2.8 is used by default/a: services can share an address only if both have the same value of the annotation kedge.io/allow-shared-ip"},
		"pools by name": {[]string{"office=192.0.2.8/29", "lab=198.51.100.0/24"}, []*corev1.Service{service("a", 80, annotate("kedge.io/address-pool", "lab")), service("b", 80), service("c", 80, annotate("metallb.universe.tf/address-pool", "attic"))},
			"a: [198.51.100.0]\nb: [192.0.2.8]\nc: NoSuchPool: pool \"attic\" does not exist; there are pool office, pool lab"},
		"the next pool when one is full": {[]string{"office=192.0.2.8", "lab=198.51.100.0/24"}, []*corev1.Service{service("a", 80), service("b", 80)}, "a: [192.0.2.8]\nb: [198.51.100.0]"},
		"another pool than before": {[]string{"office=192.0.2.8", "lab=198.51.100.0/24"}, []*corev1.Service{service("a", 80, has("192.0.2.8"), annotate("kedge.io/address-pool", "lab"))},
			"a: [198.51.100.0]"},
		"shared": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, annotate(share, "x")), service("b", 81, annotate(share, "x")), service("c", 80, annotate(share, "x")), service("d", 82, annotate(share, "y")), service("e", 83)},
			"a: [192.0.2.8]\nb: [192.0.2.8]\nc: [192.0.2.9]\nd: [192.0.2.10]\ne: [192.0.2.11]"},
		"shared with Local and the same pods": {[]string{"192.0.2.8/29"}, []*corev1.Service{
			service("a", 80, annotate(share, "x"), localOnly, selects("p")), service("b", 81, annotate(share, "x"), localOnly, selects("p")),
			service("c", 82, annotate(share, "x"), localOnly, selects("q")), service("d", 83, annotate(share, "x"))},
			"a: [192.0.2.8]\nb: [192.0.2.8]\nc: [192.0.2.9]\nd: [192.0.2.10]"},
		"both families":         {[]string{"192.0.2.8/29", "fd00::8/125"}, []*corev1.Service{service("a", 80, families46(corev1.IPFamilyPolicyRequireDualStack))}, "a: [192.0.2.8 fd00::8]"},
		"one of both is enough": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, families46(corev1.IPFamilyPolicyPreferDualStack))}, "a: [192.0.2.8]"},
		"one of both is not enough": {[]string{"192.0.2.8/29"}, []*corev1.Service{service("a", 80, families46(corev1.IPFamilyPolicyRequireDualStack))},
			"a: NoFreeAddress: no free address of IPv4 and IPv6 in pool default"},
		"the second family comes later": {[]string{"192.0.2.8/29", "fd00::8/125"}, []*corev1.Service{service("a", 80, families46(corev1.IPFamilyPolicyPreferDualStack), has("192.0.2.9"))},
			"a: [192.0.2.9 fd00::8]"},
	} {
		if got := decided(state{pools: pools(t, c.pools...), services: c.services}); got != c.want {
			t.Errorf("%s:\n got %s\nwant %s", name, got, c.want)
		}
	}
}

// Whatever services come and go, no two have an address in common that may not share it,
// nobody gets an address that it may not have, and what was decided is decided again.
func TestRandomServices(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	ps := pools(t, "a=192.0.2.0-192.0.2.9", "b=198.51.100.0-198.51.100.4", "b=fd00::/124")
	services := map[string]*corev1.Service{}
	for step := range 3000 {
		name := fmt.Sprint("s", rng.IntN(25))
		if rng.IntN(3) == 0 {
			delete(services, name)
		} else {
			s := service(name, int32(80+rng.IntN(3)))
			if rng.IntN(2) == 0 {
				annotate("kedge.io/allow-shared-ip", []string{"x", "y"}[rng.IntN(2)])(s)
			}
			if rng.IntN(4) == 0 {
				annotate("kedge.io/address-pool", "b")(s)
			}
			if rng.IntN(4) == 0 {
				annotate("kedge.io/loadBalancerIPs", fmt.Sprintf("192.0.2.%d", rng.IntN(12)))(s)
			}
			if rng.IntN(4) == 0 {
				families46([]corev1.IPFamilyPolicy{corev1.IPFamilyPolicyPreferDualStack, corev1.IPFamilyPolicyRequireDualStack}[rng.IntN(2)])(s)
			}
			if old := services[name]; old != nil { // changed, not made anew
				s.Status, s.CreationTimestamp = old.Status, old.CreationTimestamp
			}
			services[name] = s
		}
		st := state{pools: ps}
		for _, s := range services {
			st.services = append(st.services, s)
		}
		d := assign(st)
		users := map[netip.Addr][]*corev1.Service{}
		for _, s := range st.services {
			x := d[nameOf(s)]
			if (len(x.addresses) == 0) == (x.message == "") {
				t.Fatalf("seed %d, step %d: %s has %v and is told %q", seed, step, s.Name, x.addresses, x.message)
			}
			s.Status.LoadBalancer.Ingress = nil
			for _, a := range x.addresses {
				p, ok := addresspool.In(ps, a)
				if want := requestOf(s).pool; !ok || want != "" && p.Name != want {
					t.Fatalf("seed %d, step %d: %s has %s of pool %q and wants %q", seed, step, s.Name, a, p.Name, want)
				}
				for _, o := range users[a] {
					if why := requestOf(s).incompatible(requestOf(o)); why != "" {
						t.Fatalf("seed %d, step %d: %s and %s have %s: %s", seed, step, s.Name, o.Name, a, why)
					}
				}
				users[a] = append(users[a], s)
				has(a.String())(s)
			}
		}
		again := assign(st)
		for name, x := range d {
			if y := again[name]; !slices.Equal(x.addresses, y.addresses) {
				t.Fatalf("seed %d, step %d: %s had %v and gets %v", seed, step, name, x.addresses, y.addresses)
			}
		}
	}
}
