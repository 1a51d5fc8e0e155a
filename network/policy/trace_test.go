package policy

import (
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/network/nft/policies"
	"kedge/network/trace"
)

func TestTrace(t *testing.T) {
	np := denyApp("a")
	np.Spec.Egress = []networkingv1.NetworkPolicyEgressRule{{To: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "b"}}}}}}
	b := somePod("b", "b")
	b.Status = corev1.PodStatus{PodIPs: []corev1.PodIP{{IP: podAddr(1, false).String()}}}
	p := newProcess(t, fake.NewClientset(somePod("a", "a"), b, np))
	p.start()
	if err := p.policy.Attach(t.Context(), attachmentOf("a", 0)); err != nil {
		t.Fatal(err)
	}
	ask := func(from, to trace.End) (string, bool) {
		pkt := &trace.Packet{Protocol: unix.IPPROTO_TCP, From: from, To: to}
		steps, err := p.policy.Trace(t.Context(), trace.Filter, pkt)
		if err != nil {
			t.Fatal(err)
		}
		var lines []string
		for _, s := range steps {
			if s.Table != "kedge-node1/policy" {
				t.Errorf("table %q", s.Table)
			}
			lines = append(lines, strings.Join([]string{s.Rule, s.Element, s.Effect, s.Problem}, "|"))
		}
		return strings.Join(lines, "\n"), pkt.Ended
	}
	end := func(a netip.Addr, place trace.Place, name string) trace.End {
		return trace.End{Addr: netip.AddrPortFrom(a, 80), Place: place, Name: name}
	}
	podA, podB := end(podAddr(0, false), trace.Pod, "default/a"), end(podAddr(1, false), trace.Pod, "default/b")
	other := end(netip.MustParseAddr("192.0.2.1"), trace.Outside, "")
	for _, c := range []struct {
		from, to trace.End
		ended    bool
		want     []string
	}{
		{podA, podB, false, []string{"default/deny-a rule 1: pods app=b of namespace default|10.42.0.17 is in pods4-", "|allows the connection from default/a|", "allowed: no policy selects default/b for ingress"}},
		{podA, other, true, []string{"|192.0.2.1 is not in pods4-", "|does not match|", "allowed by none of default/deny-a||refuses the connection from default/a|"}},
		{podB, podA, false, []string{"no policy selects default/b for egress", "no policy selects default/a for ingress"}},
		{end(netip.MustParseAddr("192.0.2.9"), trace.Node, ""), podA, false, []string{"a node always reaches its pods"}},
	} {
		got, ended := ask(c.from, c.to)
		if ended != c.ended {
			t.Errorf("%v to %v: ended: %v", c.from, c.to, ended)
		}
		for _, w := range c.want {
			if !strings.Contains(got, w) {
				t.Errorf("%v to %v: no %q in\n%s", c.from, c.to, w, got)
			}
		}
	}
	p.stop()
	if err := policies.RemoveTable("node1"); err != nil {
		t.Fatal(err)
	}
	if got, _ := ask(podA, podB); !strings.Contains(got, "the kernel's rules differ") {
		t.Errorf("the table is gone, and the trace does not report it:\n%s", got)
	}
}
