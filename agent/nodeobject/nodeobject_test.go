package nodeobject

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	clienttesting "k8s.io/client-go/testing"

	"kedge/internal/nodeaddr"
)

func addrs(texts ...string) (out []netip.Addr) {
	for _, t := range texts {
		out = append(out, netip.MustParseAddr(t))
	}
	return out
}

func TestLabels(t *testing.T) {
	for label, want := range map[string]string{
		"a=b": "", "example.com/zone=1": "", "a=": "", "kubernetes.io/hostname=x": "", "node.kubernetes.io/x=y": "",
		"zone": "want KEY=VALUE", "a/b/c=d": `invalid key "a/b/c": `, "x=a:b": `invalid value "a:b": `,
		"node-role.kubernetes.io/edge=": "nodes cannot set labels in node-role.kubernetes.io on themselves",
		"k8s.io/x=y":                    "nodes cannot set labels in k8s.io on themselves",
	} {
		err := CheckLabel(label)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", label, err, want)
		}
	}
}

func TestTaints(t *testing.T) {
	for taint, want := range map[string]string{
		"a=b:NoSchedule": "", "a:NoExecute": "", "a=:PreferNoSchedule": "",
		"edge": "want KEY=VALUE:EFFECT", "a=b:c:NoSchedule": "want KEY=VALUE:EFFECT", "a=b:Never": `the effect "Never" must be one of`, "=b:NoSchedule": `invalid key "": `,
	} {
		err := CheckTaint(taint)
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", taint, err, want)
		}
	}
	if !SameTaint("a=1:NoSchedule", "a=2:NoSchedule") || SameTaint("a=1:NoSchedule", "a=1:NoExecute") || SameTaint("a:NoSchedule", "b:NoSchedule") {
		t.Error("the API knows taints by key and effect")
	}
}

func TestPodRanges(t *testing.T) {
	for name, c := range map[string]struct {
		spec corev1.NodeSpec
		want string
	}{
		"none":  {corev1.NodeSpec{}, "[]"},
		"old":   {corev1.NodeSpec{PodCIDR: "10.42.1.0/24"}, "[10.42.1.0/24]"},
		"both":  {corev1.NodeSpec{PodCIDR: "10.42.1.0/24", PodCIDRs: []string{"10.42.1.0/24", "fd42:1::/64"}}, "[10.42.1.0/24 fd42:1::/64]"},
		"wrong": {corev1.NodeSpec{PodCIDRs: []string{"x"}}, "error"},
	} {
		got, err := podRanges(&corev1.Node{Spec: c.spec})
		text := sprint(got)
		if err != nil {
			text = "error"
		}
		if text != c.want {
			t.Errorf("%s: %s, %v, want %s", name, text, err, c.want)
		}
	}
}

func sprint(ranges []netip.Prefix) string {
	texts := make([]string, len(ranges))
	for i, r := range ranges {
		texts[i] = r.String()
	}
	return "[" + strings.Join(texts, " ") + "]"
}

// TestRegistration: ranges are told when the node has them, and readiness with them.
func TestRegistration(t *testing.T) {
	for _, refuses := range []error{nil, errors.New("not yet")} {
		client, events := fake.NewClientset(), watch.NewFakeWithChanSize(2, false)
		client.PrependWatchReactor("nodes", clienttesting.DefaultWatchReactor(events, nil))
		events.Add(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}})
		events.Modify(&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: corev1.NodeSpec{PodCIDRs: []string{"10.42.1.0/24"}}})
		events.Stop()
		var told [][]netip.Prefix
		ready := 0
		r := NewRegistration(nil, "n", func(ranges []netip.Prefix) error {
			told = append(told, ranges)
			return refuses
		}, slog.New(slog.DiscardHandler))
		err := r.follow(t.Context(), client, func() { ready++ })
		if !errors.Is(err, refuses) || len(told) != 1 || sprint(told[0]) != "[10.42.1.0/24]" || (ready == 1) != (refuses == nil) {
			t.Errorf("a network that says %v: %v, told %v, ready %d times", refuses, err, told, ready)
		}
	}
}

func TestAnnotatorAndCreated(t *testing.T) {
	base := fake.NewClientset()
	c := Creating(base, func() []netip.Addr { return addrs("192.0.2.1", "2001:db8::1") }, addrs("203.0.113.7"))
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Spec: corev1.NodeSpec{Taints: []corev1.Taint{
		{Key: "node.cloudprovider.kubernetes.io/uninitialized", Effect: corev1.TaintEffectNoSchedule}, {Key: "mine", Effect: corev1.TaintEffectNoSchedule}}}}
	made, err := c.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	want := []corev1.NodeAddress{{Type: "InternalIP", Address: "192.0.2.1"}, {Type: "InternalIP", Address: "2001:db8::1"}, {Type: "ExternalIP", Address: "203.0.113.7"}, {Type: "Hostname", Address: "n"}}
	if !slices.Equal(made.Status.Addresses, want) || len(made.Spec.Taints) != 1 || made.Spec.Taints[0].Key != "mine" {
		t.Errorf("%+v, %+v", made.Status.Addresses, made.Spec.Taints)
	}
	if len(node.Spec.Taints) != 2 {
		t.Error("the caller's object was changed")
	}
}

// TestAddressesAreWritten: the component makes the addresses what they should be, and leaves them alone where another
// program writes them.
func TestAddressesAreWritten(t *testing.T) {
	for _, others := range []bool{false, true} {
		node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{Addresses: []corev1.NodeAddress{{Type: "InternalIP", Address: "192.0.2.9"}}}}
		client := fake.NewClientset(node)
		watches := informers.NewSharedInformerFactory(client, 0)
		a := &Addresses{client: client, nodeName: "n", log: slog.New(slog.DiscardHandler), nodes: watches.Core().V1().Nodes().Informer(), wake: make(chan struct{}, 1),
			opts: Machine{Internal: func() []netip.Addr { return addrs("192.0.2.1") }, Others: others}}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		watches.StartWithContext(ctx)
		watches.WaitForCacheSyncWithContext(ctx)
		if err := a.write(ctx); err != nil {
			t.Fatal(err)
		}
		got, err := client.CoreV1().Nodes().Get(ctx, "n", metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		want := inObject("n", addrs("192.0.2.1"), nil)
		if others {
			want = node.Status.Addresses
		}
		if !slices.Equal(got.Status.Addresses, want) {
			t.Errorf("others %v: %+v, want %+v", others, got.Status.Addresses, want)
		}
		cancel()
		watches.Shutdown()
	}
}

// TestUnproven: a node proves the addresses that it has itself and that no server has noted.
func TestUnproven(t *testing.T) {
	node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n"}, Status: corev1.NodeStatus{Addresses: inObject("n", addrs("192.0.2.1", "2001:db8::1"), addrs("203.0.113.7"))}}
	has := func(a netip.Addr) bool { return a != netip.MustParseAddr("203.0.113.7") }
	if got := unverified(node, has); !slices.Equal(got, addrs("192.0.2.1", "2001:db8::1")) {
		t.Errorf("without proofs: %v", got)
	}
	node.Annotations = map[string]string{nodeaddr.Allowed: "192.0.2.1"}
	a := &Addresses{nodeName: "n", log: slog.New(slog.DiscardHandler)}
	if a.Describe() != "" {
		t.Errorf("at first: %q", a.Describe())
	}
	a.note(addrs("2001:db8::1"))
	if got := a.Describe(); got != "no server has verified the addresses [2001:db8::1]" {
		t.Errorf("%q", got)
	}
}

// TestLook: requests for a look are one.
func TestLook(t *testing.T) {
	a := &Addresses{wake: make(chan struct{}, 1)}
	a.Refresh()
	a.Refresh()
	<-a.wake
	select {
	case <-a.wake:
		t.Error("two looks")
	default:
	}
}
