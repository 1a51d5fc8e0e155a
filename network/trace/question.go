package trace

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// Question is a question: which rules apply to a connection. Ends are the node ("node"), an
// address, or [service/|pod/][NAMESPACE/]NAME, the destination with [:PORT].
type Question struct {
	From, To  string
	Namespace string // of names without one
	Protocol  string // tcp, udp or sctp; empty for the service's, or tcp
}

// ParseArgs parses the arguments of the command: TO, or "from FROM to TO" in any order.
func ParseArgs(args []string) (Question, error) {
	var q Question
	for len(args) > 0 {
		switch {
		case strings.HasPrefix(args[0], "-"):
			return q, fmt.Errorf("flag %q must come before the names", args[0])
		case (args[0] == "from" || args[0] == "to") && len(args) == 1:
			return q, fmt.Errorf("%q must be followed by a pod, a service, an address or \"node\"", args[0])
		case args[0] == "from":
			q.From, args = args[1], args[2:]
		case args[0] == "to":
			q.To, args = args[1], args[2:]
		case q.To == "":
			q.To, args = args[0], args[1:]
		default:
			return q, fmt.Errorf("unexpected argument %q", args[0])
		}
	}
	if q.To == "" {
		return q, errors.New("missing destination: give a service, a pod or an address")
	}
	return q, nil
}

// Values returns the question as parameters of a URL.
func (q Question) Values() url.Values {
	return url.Values{"from": {q.From}, "to": {q.To}, "namespace": {q.Namespace}, "protocol": {q.Protocol}}
}

// FromValues is the inverse of Values.
func FromValues(v url.Values) Question {
	return Question{From: v.Get("from"), To: v.Get("to"), Namespace: v.Get("namespace"), Protocol: v.Get("protocol")}
}

// target is one end of a question.
type target struct {
	kind            string // "service", "pod", "node", "address", or "" for a service or else a pod
	namespace, name string
	addr            netip.Addr
	port            string // number or name; empty if missing
}

func parseTarget(text, namespace string) (target, error) {
	if a, err := netip.ParseAddr(text); err == nil {
		return target{kind: "address", addr: a.Unmap()}, nil
	}
	if a, err := netip.ParseAddrPort(text); err == nil {
		return target{kind: "address", addr: a.Addr().Unmap(), port: strconv.Itoa(int(a.Port()))}, nil
	}
	t := target{namespace: namespace}
	name, port, _ := strings.Cut(text, ":")
	t.port = port
	parts := strings.Split(name, "/")
	switch parts[0] {
	case "service", "services", "svc":
		t.kind, parts = "service", parts[1:]
	case "pod", "pods", "po":
		t.kind, parts = "pod", parts[1:]
	}
	switch len(parts) {
	case 1:
		t.name = parts[0]
	case 2:
		t.namespace, t.name = parts[0], parts[1]
	}
	if t.kind == "" && name == "node" {
		t.kind, t.name = "node", "node"
	}
	if t.name == "" || t.namespace == "" {
		return t, fmt.Errorf("%q is neither an address nor [service/|pod/][NAMESPACE/]NAME[:PORT]", text)
	}
	return t, nil
}

var protocols = map[string]uint8{"tcp": unix.IPPROTO_TCP, "udp": unix.IPPROTO_UDP, "sctp": unix.IPPROTO_SCTP}

// servicePort returns the port of a service that a question means.
func servicePort(s *corev1.Service, port, protocol string) (corev1.ServicePort, error) {
	var fits []corev1.ServicePort
	var all []string
	for _, p := range s.Spec.Ports {
		all = append(all, strings.Trim(fmt.Sprintf("%s:%d/%s", p.Name, p.Port, p.Protocol), ":"))
		if port != "" && p.Name != port && strconv.Itoa(int(p.Port)) != port {
			continue
		}
		if protocol == "" || strings.EqualFold(protocol, string(p.Protocol)) {
			fits = append(fits, p)
		}
	}
	switch {
	case len(fits) == 1 || len(fits) > 1 && port != "":
		return fits[0], nil
	case len(fits) == 0 && port != "":
		// The effect on a port that the service lacks is a valid question.
		if n, err := strconv.ParseUint(port, 10, 16); err == nil && n > 0 {
			return corev1.ServicePort{Port: int32(n), Protocol: corev1.Protocol(strings.ToUpper(protocol))}, nil
		}
	}
	return corev1.ServicePort{}, fmt.Errorf("service %s/%s has the ports %s; choose one with :PORT and --protocol", s.Namespace, s.Name, strings.Join(all, ", "))
}
