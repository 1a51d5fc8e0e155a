package trace

import (
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
)

func TestParseArgs(t *testing.T) {
	for _, c := range []struct{ args, from, to, err string }{
		{"web", "", "web", ""},
		{"to web", "", "web", ""},
		{"from client to web", "client", "web", ""},
		{"web from client", "client", "web", ""},
		{"from node 10.0.0.1:80", "node", "10.0.0.1:80", ""},
		{"", "", "", "missing destination"},
		{"from client", "", "", "missing destination"},
		{"from", "", "", "must be followed"},
		{"a b", "", "", "unexpected argument"},
		{"web -n default", "", "", "before"},
	} {
		q, err := ParseArgs(strings.Fields(c.args))
		switch {
		case c.err != "":
			if err == nil || !strings.Contains(err.Error(), c.err) {
				t.Errorf("%q: %+v, %v, want an error with %q", c.args, q, err, c.err)
			}
		case err != nil || q.From != c.from || q.To != c.to:
			t.Errorf("%q: %+v, %v", c.args, q, err)
		}
		if err == nil {
			if back := FromValues(q.Values()); back != q {
				t.Errorf("%+v became %+v", q, back)
			}
		}
	}
}

func TestParseTarget(t *testing.T) {
	for _, c := range []struct{ text, kind, namespace, name, port string }{
		{"web", "", "ns", "web", ""},
		{"web:80", "", "ns", "web", "80"},
		{"web:http", "", "ns", "web", "http"},
		{"other/web", "", "other", "web", ""},
		{"svc/web:80", "service", "ns", "web", "80"},
		{"service/other/web", "service", "other", "web", ""},
		{"pod/web-0", "pod", "ns", "web-0", ""},
		{"node", "node", "ns", "node", ""},
		{"node:30080", "node", "ns", "node", "30080"},
		{"10.0.0.1", "address", "", "", ""},
		{"10.0.0.1:80", "address", "", "", "80"},
		{"[fd00::1]:80", "address", "", "", "80"},
		{"fd00::1", "address", "", "", ""},
	} {
		got, err := parseTarget(c.text, "ns")
		if err != nil || got.kind != c.kind || got.namespace != c.namespace || got.name != c.name || got.port != c.port {
			t.Errorf("%q: %+v, %v", c.text, got, err)
		}
	}
	for _, bad := range []string{"", "svc/", "a/b/c", ":80", "/web"} {
		if got, err := parseTarget(bad, "ns"); err == nil {
			t.Errorf("%q: %+v", bad, got)
		}
	}
}

func TestServicePort(t *testing.T) {
	s := &corev1.Service{Spec: corev1.ServiceSpec{Ports: []corev1.ServicePort{
		{Name: "web", Port: 80, Protocol: corev1.ProtocolTCP}, {Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP}, {Name: "dns-tcp", Port: 53, Protocol: corev1.ProtocolTCP},
	}}}
	for _, c := range []struct{ port, protocol, want string }{
		{"web", "", "web"}, {"80", "", "web"}, {"53", "tcp", "dns-tcp"}, {"", "udp", "dns"}, {"81", "", ""},
	} {
		if got, err := servicePort(s, c.port, c.protocol); err != nil || got.Name != c.want {
			t.Errorf("%q %q: %+v, %v", c.port, c.protocol, got, err)
		}
	}
	for _, c := range []struct{ port, protocol string }{{"", ""}, {"nothing", ""}, {"", "sctp"}} {
		if got, err := servicePort(s, c.port, c.protocol); err == nil {
			t.Errorf("%q %q: %+v", c.port, c.protocol, got)
		}
	}
}
