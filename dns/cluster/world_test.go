package cluster

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/dns/message"
)

func newIndex() *Index {
	x := New(Config{
		Domain: "cluster.local", TTL: DefaultTTL,
		Servers: []netip.Addr{netip.MustParseAddr("fd43::a"), netip.MustParseAddr("10.43.0.10")},
		Ranges:  []netip.Prefix{netip.MustParsePrefix("10.42.0.0/16"), netip.MustParsePrefix("10.43.0.0/16"), netip.MustParsePrefix("fd42::/48")},
	})
	x.SetNamespace("default", true)
	x.SetNamespace("empty", true)
	return x
}

// service returns a service in the namespace "default": ports are "name/protocol/number",
// and an address "None" makes it headless.
func service(name string, ips []string, ports ...string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	s.Spec.ClusterIPs, s.Spec.ClusterIP = ips, ips[0]
	for _, p := range ports {
		f := strings.Split(p, "/")
		var n int32
		fmt.Sscan(f[2], &n)
		s.Spec.Ports = append(s.Spec.Ports, corev1.ServicePort{Name: f[0], Protocol: corev1.Protocol(f[1]), Port: n})
	}
	return s
}

func external(name, target string) *corev1.Service {
	s := &corev1.Service{ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"}}
	s.Spec.Type, s.Spec.ExternalName = corev1.ServiceTypeExternalName, target
	return s
}

// slice returns an endpoint slice: "address", "address hostname", or with a ! before it an
// endpoint that is not ready.
func slice(service, name string, ports []string, endpoints ...string) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{
		Name: name, Namespace: "default", Labels: map[string]string{discoveryv1.LabelServiceName: service},
	}}
	for _, p := range ports {
		f := strings.Split(p, "/")
		var n int32
		fmt.Sscan(f[2], &n)
		protocol := corev1.Protocol(f[1])
		s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &f[0], Protocol: &protocol, Port: &n})
	}
	for _, text := range endpoints {
		text, unready := strings.CutPrefix(text, "!")
		f := strings.Fields(text)
		s.AddressType = discoveryv1.AddressTypeIPv4
		if strings.Contains(f[0], ":") {
			s.AddressType = discoveryv1.AddressTypeIPv6
		}
		ready := !unready
		e := discoveryv1.Endpoint{Addresses: f[:1], Conditions: discoveryv1.EndpointConditions{Ready: &ready}}
		if len(f) > 1 {
			e.Hostname = &f[1]
		}
		s.Endpoints = append(s.Endpoints, e)
	}
	return s
}

// ask returns the answer to a query, and the index's result.
func ask(t testing.TB, x *Index, name, qtype string, limit int) (*dns.Msg, Result, string) {
	t.Helper()
	m := new(dns.Msg)
	m.SetQuestion(dns.Fqdn(name), dns.StringToType[qtype])
	packet, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var q message.Query
	if err := q.Parse(packet); err != nil {
		t.Fatal(err)
	}
	var r message.Reply
	r.Begin(&q, nil, limit)
	v, target := x.Answer(&q, &r)
	out, wire := new(dns.Msg), r.Finish()
	if err := out.Unpack(wire); err != nil {
		t.Fatalf("%s %s: the answer cannot be read: %v", qtype, name, err)
	}
	if len(wire) > limit {
		t.Fatalf("%s %s: %d bytes, more than %d", qtype, name, len(wire), limit)
	}
	if out.Id != m.Id || !out.Response || len(out.Question) != 1 || out.Question[0] != m.Question[0] {
		t.Fatalf("%s %s: the answer is to something else: %v", qtype, name, out)
	}
	return out, v, target
}

// told returns an answer in short form: the response code unless it is NOERROR, and the
// records in order of their text; records of other sections have the section's letter.
func told(m *dns.Msg) string {
	var out []string
	for i, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			h := rr.Header()
			text := strings.Join(strings.Fields(strings.TrimPrefix(rr.String(), h.String())), " ")
			if _, ok := rr.(*dns.SOA); ok {
				text = h.Name
			}
			if i == 0 && !strings.EqualFold(h.Name, m.Question[0].Name) || i == 2 {
				text = h.Name + " " + text
			}
			out = append(out, []string{"", "ns:", "+"}[i]+dns.TypeToString[h.Rrtype]+" "+text)
		}
	}
	slices.Sort(out)
	if m.Rcode != dns.RcodeSuccess {
		out = append([]string{dns.RcodeToString[m.Rcode]}, out...)
	}
	return strings.Join(out, "; ")
}
