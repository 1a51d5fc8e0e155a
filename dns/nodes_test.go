package dns

import (
	"testing"

	"github.com/miekg/dns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func node(name string, addrs ...string) *corev1.Node {
	n := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
	for _, a := range addrs {
		n.Status.Addresses = append(n.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: a})
	}
	n.Status.Addresses = append(n.Status.Addresses,
		corev1.NodeAddress{Type: corev1.NodeExternalIP, Address: "203.0.113.1"}, corev1.NodeAddress{Type: corev1.NodeHostName, Address: name})
	return n
}

func TestNamesOfNodes(t *testing.T) {
	upstream(t, "www.example.com.", "A 192.0.2.1")
	w := start(t, "nameserver 127.0.0.2", node("edge-1", "192.0.2.11", "2001:db8::11"), node("edge-2", "192.0.2.12"), node("www.example.com", "192.0.2.66"))
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"edge-1.", dns.TypeA, "192.0.2.11"},
		{"Edge-1.", dns.TypeAAAA, "2001:db8::11"},
		{"edge-2.", dns.TypeAAAA, ""},
		{"edge-2.", dns.TypeMX, ""},
		{"www.example.com.", dns.TypeA, "192.0.2.1"}, // not the node that calls itself so
	} {
		if got := w.addresses(c.name, c.qtype); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	if got := w.addresses("11.2.0.192.in-addr.arpa.", dns.TypePTR); got == "edge-1." {
		t.Error("an address leads to the node that says it has it")
	}
	nodes := w.client.CoreV1().Nodes()
	if _, err := nodes.UpdateStatus(t.Context(), node("edge-2", "192.0.2.13"), metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("edge-2.", dns.TypeA, "192.0.2.13")
	if err := nodes.Delete(t.Context(), "edge-2", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	w.eventually("edge-2.", dns.TypeA, "NXDOMAIN")
}
