package proxy

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/network/nft/services"
)

// newProxy returns a proxy whose informers are never started: tests call its handlers.
func newProxy(t *testing.T, change func(*Config)) *Proxy {
	t.Helper()
	cfg := DefaultConfig()
	cfg.NodeName, cfg.LinkPrefix, cfg.ForeignPrefix = "node1", "kdgtest", "kdg"
	cfg.NodeIPs = []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	cfg.ServiceRanges = append(cfg.ServiceRanges, netip.MustParsePrefix("fd43::/112"))
	if change != nil {
		change(&cfg)
	}
	return proxyOf(t, cfg)
}

func proxyOf(t testing.TB, cfg Config) *Proxy {
	t.Helper()
	if err := cfg.Validate(); err != nil {
		t.Fatal(err)
	}
	client := fake.NewSimpleClientset()
	p, err := New(cfg, informers.NewSharedInformerFactory(client, 0), client, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// ports returns the proxy's current rules for a service.
func (p *Proxy) ports(name string) []services.Port {
	labels, _ := p.takeLabels()
	c := newChanges()
	var out []services.Port
	for _, t := range p.trackers {
		t.update(&c)
		out = append(out, t.servicePorts(types.NamespacedName{Namespace: "default", Name: name}, labels)...)
	}
	return out
}

func service(change func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "web"}, Spec: corev1.ServiceSpec{
		Type: corev1.ServiceTypeClusterIP, ClusterIP: "10.43.0.80", ClusterIPs: []string{"10.43.0.80"}, SessionAffinity: corev1.ServiceAffinityNone,
		Ports: []corev1.ServicePort{{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP}},
	}}
	if change != nil {
		change(s)
	}
	return s
}

// slice has endpoints that are written "ADDRESS", followed by "@NODE" and any of
// "!" for not ready, "~" for terminating but serving, "#ZONE" for a hint.
func slice(endpoints ...string) *discoveryv1.EndpointSlice {
	name, port, protocol := "http", int32(8080), corev1.ProtocolTCP
	s := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: "default", Name: "web-1", Labels: map[string]string{discoveryv1.LabelServiceName: "web"}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &name, Port: &port, Protocol: &protocol}},
	}
	for _, text := range endpoints {
		text, zone, hinted := strings.Cut(text, "#")
		rest, terminating := strings.CutSuffix(text, "~")
		rest, unready := strings.CutSuffix(rest, "!")
		address, node, _ := strings.Cut(rest, "@")
		if address[0] == 'f' {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
		ready, serving := !unready && !terminating, !unready
		e := discoveryv1.Endpoint{Addresses: []string{address}, NodeName: &node, Conditions: discoveryv1.EndpointConditions{Ready: &ready, Serving: &serving, Terminating: &terminating}}
		if hinted {
			e.Hints = &discoveryv1.EndpointHints{ForZones: []discoveryv1.ForZone{{Name: zone}}}
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

func texts(list []netip.AddrPort) string {
	var out []string
	for _, a := range list {
		out = append(out, strings.TrimSuffix(a.String(), ":8080"))
	}
	return strings.Join(out, " ")
}

// TestEndpointsInUse has the endpoints in use, by traffic policy, condition and hint.
func TestEndpointsInUse(t *testing.T) {
	local := func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.Ports[0].NodePort = corev1.ServiceTypeNodePort, corev1.ServiceExternalTrafficPolicyLocal, 30080
	}
	internal := func(s *corev1.Service) {
		policy := corev1.ServiceInternalTrafficPolicyLocal
		s.Spec.InternalTrafficPolicy = &policy
	}
	for _, c := range []struct {
		name           string
		service        func(*corev1.Service)
		endpoints      string
		cluster, local string
		here           string
		ready          bool
	}{
		{name: "none"},
		{name: "two", endpoints: "10.42.0.1@node1 10.42.1.1@node2", cluster: "10.42.0.1 10.42.1.1", here: "10.42.0.1", ready: true},
		{name: "one not ready", endpoints: "10.42.0.1@node1! 10.42.1.1@node2", cluster: "10.42.1.1", ready: true},
		{name: "one terminating", endpoints: "10.42.0.1@node1~ 10.42.1.1@node2", cluster: "10.42.1.1", ready: true},
		{name: "all terminating", endpoints: "10.42.0.1@node1~ 10.42.1.1@node2~", cluster: "10.42.0.1 10.42.1.1", here: "10.42.0.1", ready: true},
		{name: "external local", service: local, endpoints: "10.42.0.1@node1 10.42.1.1@node2", cluster: "10.42.0.1 10.42.1.1", local: "10.42.0.1", here: "10.42.0.1", ready: true},
		{name: "external local, terminating here", service: local, endpoints: "10.42.0.1@node1~ 10.42.1.1@node2", cluster: "10.42.1.1", local: "10.42.0.1", here: "10.42.0.1", ready: true},
		{name: "external local, none here", service: local, endpoints: "10.42.1.1@node2", cluster: "10.42.1.1", ready: true},
		{name: "internal local, none here", service: internal, endpoints: "10.42.1.1@node2", ready: true},
		{name: "hints", endpoints: "10.42.0.1@node1#a 10.42.1.1@node2#b", cluster: "10.42.0.1", here: "10.42.0.1", ready: true},
		{name: "a hint is missing", endpoints: "10.42.0.1@node1#a 10.42.1.1@node2", cluster: "10.42.0.1 10.42.1.1", here: "10.42.0.1", ready: true},
		{name: "no hint for this zone", endpoints: "10.42.0.1@node1#b 10.42.1.1@node2#b", cluster: "10.42.0.1 10.42.1.1", here: "10.42.0.1", ready: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newProxy(t, nil)
			p.nodeChanged(nil, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node1", Labels: map[string]string{corev1.LabelTopologyZone: "a"}}})
			p.nodeChanged(nil, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "node2", Labels: map[string]string{corev1.LabelTopologyZone: "b"}}})
			p.serviceChanged(nil, service(c.service))
			p.sliceChanged(nil, slice(strings.Fields(c.endpoints)...))
			got := p.ports("web")
			if len(got) != 1 {
				t.Fatalf("%d ports", len(got))
			}
			var here []string
			for _, a := range got[0].OnNode {
				here = append(here, a.String())
			}
			if texts(got[0].Cluster) != c.cluster || texts(got[0].Local) != c.local || strings.Join(here, " ") != c.here || got[0].Ready != c.ready {
				t.Errorf("cluster %q, local %q, here %q, ready %v", texts(got[0].Cluster), texts(got[0].Local), here, got[0].Ready)
			}
		})
	}
}

// TestWhereAServiceAnswers has the addresses and the other fields of a service.
func TestWhereAServiceAnswers(t *testing.T) {
	p := newProxy(t, nil)
	proxied := corev1.LoadBalancerIPModeProxy
	hours := int32(3600)
	s := service(func(s *corev1.Service) {
		s.Spec.Type = corev1.ServiceTypeLoadBalancer
		s.Spec.ClusterIPs, s.Spec.IPFamilies = []string{"10.43.0.80", "fd43::80"}, []corev1.IPFamily{corev1.IPv4Protocol, corev1.IPv6Protocol}
		s.Spec.Ports = []corev1.ServicePort{
			{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, NodePort: 30080},
			{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP, NodePort: 30053},
			{Name: "sig", Port: 9, Protocol: corev1.ProtocolSCTP, NodePort: 30009},
		}
		s.Spec.ExternalIPs = []string{"198.51.100.1", "2001:db8:9::1"}
		s.Spec.LoadBalancerSourceRanges = []string{" 192.0.2.0/24", "10.0.0.0/8", "2001:db8:5::/48"}
		s.Spec.SessionAffinity = corev1.ServiceAffinityClientIP
		s.Spec.SessionAffinityConfig = &corev1.SessionAffinityConfig{ClientIP: &corev1.ClientIPConfig{TimeoutSeconds: &hours}}
		s.Status.LoadBalancer.Ingress = []corev1.LoadBalancerIngress{
			{IP: "203.0.113.1"}, {IP: "203.0.113.2", IPMode: &proxied}, {IP: "2001:db8:7::1"}, {Hostname: "example.org"},
		}
	})
	p.serviceChanged(nil, s)
	got := p.ports("web")
	if len(got) != 6 {
		t.Fatalf("%d ports, want 3 of each family", len(got))
	}
	want := services.Port{
		Name: "http", ClusterIP: netip.MustParseAddr("10.43.0.80"), Protocol: unix.IPPROTO_TCP, Port: 80, NodePort: 30080,
		ExternalIPs: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, LoadBalancerIPs: []netip.Addr{netip.MustParseAddr("203.0.113.1")},
		// The node is in a range, so the load balancer's own address is allowed too.
		Sources:   []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24"), netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("203.0.113.1/32")},
		StickyFor: time.Hour, Cluster: []netip.AddrPort{}, Local: []netip.AddrPort{},
	}
	if a, b := fmt.Sprintf("%+v", got[2]), fmt.Sprintf("%+v", want); a != b {
		t.Errorf("got  %s\nwant %s", a, b)
	}
	if fmt.Sprint(got[5].Sources, got[5].LoadBalancerIPs) != "[2001:db8:5::/48] [2001:db8:7::1]" {
		t.Errorf("IPv6: %+v", got[5])
	}
	p.serviceChanged(s, nil)
	if got := p.ports("web"); len(got) != 0 {
		t.Errorf("a service that is gone has ports: %+v", got)
	}
}

// TestServicesOfOthers: headless services, ExternalName services, services of another
// proxy, and services with an address that the node serves itself are left alone.
func TestServicesOfOthers(t *testing.T) {
	own := netip.MustParseAddr("10.43.0.10")
	for name, change := range map[string]func(*corev1.Service){
		"headless":     func(s *corev1.Service) { s.Spec.ClusterIP, s.Spec.ClusterIPs = "None", []string{"None"} },
		"ExternalName": func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName },
		"proxy name":   func(s *corev1.Service) { s.Labels = map[string]string{serviceProxyName: "mine"} },
		"own": func(s *corev1.Service) {
			s.Spec.ClusterIP, s.Spec.ClusterIPs = own.String(), []string{own.String()}
		},
	} {
		p := newProxy(t, func(c *Config) { c.Own = []netip.Addr{own} })
		p.sliceChanged(nil, slice("10.42.0.1@node1"))
		p.serviceChanged(nil, service(change))
		if got := p.ports("web"); len(got) != 0 {
			t.Errorf("%s: %+v", name, got)
		}
		// It becomes an ordinary one, and goes back.
		p.serviceChanged(service(change), service(nil))
		if got := p.ports("web"); len(got) != 1 || texts(got[0].Cluster) != "10.42.0.1" {
			t.Errorf("%s, then ordinary: %+v", name, got)
		}
		p.serviceChanged(service(nil), service(change))
		if got := p.ports("web"); len(got) != 0 {
			t.Errorf("%s again: %+v", name, got)
		}
	}
}

func TestHealthCheckPorts(t *testing.T) {
	p := newProxy(t, nil)
	balancer := service(func(s *corev1.Service) {
		s.Spec.Type, s.Spec.ExternalTrafficPolicy, s.Spec.HealthCheckNodePort = corev1.ServiceTypeLoadBalancer, corev1.ServiceExternalTrafficPolicyLocal, 31999
	})
	p.serviceChanged(nil, balancer)
	p.ports("web")
	if got := p.trackers[0].checks; len(got) != 1 || got[types.NamespacedName{Namespace: "default", Name: "web"}] != 31999 {
		t.Errorf("%v", got)
	}
	p.serviceChanged(balancer, service(nil))
	p.ports("web")
	if got := p.trackers[0].checks; len(got) != 0 {
		t.Errorf("%v", got)
	}
}

func TestValidate(t *testing.T) {
	good := DefaultConfig()
	good.NodeName, good.LinkPrefix, good.ForeignPrefix = "n", "kdgx", "kdg"
	if err := good.Validate(); err != nil {
		t.Error(err)
	}
	bad := Config{Scheduler: "best", NodePortsOn: []netip.Prefix{netip.MustParsePrefix("127.0.0.0/8")}}
	err := bad.Validate()
	for _, part := range []string{"name", "interfaces", "service range", `"best"`, "127.0.0.0/8"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v does not say %q", err, part)
		}
	}
	if got := good.nodePortsOn(nil); len(got) != 0 {
		t.Errorf("a node without addresses answers node ports at %v", got)
	}
	if got := good.nodePortsOn([]netip.Addr{netip.MustParseAddr("192.0.2.1")}); !slices.Equal(got, []netip.Prefix{netip.MustParsePrefix("192.0.2.1/32")}) {
		t.Errorf("%v", got)
	}
}
