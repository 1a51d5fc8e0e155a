package policy

import (
	"context"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"

	"kedge/internal/test/host"
	"kedge/network/cni"
	"kedge/network/nft"
	"kedge/network/nft/policies"
)

// process is one run of the component against an API.
type process struct {
	t      *testing.T
	policy *Policy
	start  func() // runs it until it is ready
	stop   func()
}

// newProcess makes the component without running it.
func newProcess(t *testing.T, api *fake.Clientset) *process {
	t.Helper()
	host.RequireIsolation(t)
	t.Cleanup(func() { nft.RemoveTables("node1") })
	factory := informers.NewSharedInformerFactory(api, 0)
	p, err := New(Config{NodeName: "node1"}, factory, nil, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return run(t, p, factory)
}

// run makes a process of a component.
func run(t *testing.T, p *Policy, factory informers.SharedInformerFactory) *process {
	pr := &process{t: t, policy: p, stop: func() {}}
	pr.start = func() {
		ctx, cancel := context.WithCancel(context.Background())
		ready, done := make(chan struct{}), make(chan error, 1)
		factory.Start(ctx.Done())
		go func() { done <- pr.policy.Run(ctx, func() { close(ready) }) }()
		pr.stop = func() {
			cancel()
			if err := <-done; err != nil {
				pr.t.Errorf("Run: %v", err)
			}
			factory.Shutdown()
			pr.stop = func() {}
		}
		pr.t.Cleanup(func() { pr.stop() })
		select {
		case <-ready:
		case <-time.After(10 * time.Second):
			pr.t.Fatal("not ready")
		}
	}
	return pr
}

func somePod(name, app string) *corev1.Pod {
	return &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: name, UID: types.UID("uid-" + name), Labels: map[string]string{"app": app}}}
}

func denyApp(app string) *networkingv1.NetworkPolicy {
	return &networkingv1.NetworkPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: "default", Name: "deny-" + app},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeEgress},
		},
	}
}

func attachmentOf(name string, i int) cni.Attachment {
	return cni.Attachment{Owner: name + "/eth0", Namespace: "default", Name: name, UID: "uid-" + name, Addrs: []netip.Addr{podAddr(i, false)}}
}

func restored(name string, i int) []cni.Attachment { return []cni.Attachment{attachmentOf(name, i)} }

// kernel returns the kernel's decision about connections that a pod opens.
func (pr *process) kernel(i int) string {
	pr.t.Helper()
	chain, err := pr.policy.engine.table.KernelVerdict(policies.Egress, podAddr(i, false))
	if err != nil {
		pr.t.Fatal(err)
	}
	switch {
	case chain == "":
		return "free"
	case chain == policies.DenyAll:
		return "refused"
	case strings.HasPrefix(chain, "judge-"):
		return "enforced"
	}
	return chain
}

func (pr *process) want(what string, i int, want string) {
	pr.t.Helper()
	if got := pr.kernel(i); got != want {
		pr.t.Errorf("%s: pod is %s, want %s", what, got, want)
	}
}

func TestAttach(t *testing.T) {
	ctx := t.Context()
	api := fake.NewClientset(somePod("free", "x"), somePod("bound", "a"), denyApp("a"))
	p := newProcess(t, api)

	// Before the API is known. Waiting for it is in vain.
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if err := p.policy.Attach(canceled, attachmentOf("free", 0)); err != nil {
		t.Fatal(err)
	}
	p.want("before the API is known", 0, "refused")

	// A waiting pod continues as soon as it is known.
	waited := make(chan error)
	go func() { waited <- p.policy.Attach(ctx, attachmentOf("bound", 1)) }()
	p.start()
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	p.want("selected", 1, "enforced")
	p.want("not selected", 0, "free")

	// The API tells of the pod after the runtime does.
	go func() { waited <- p.policy.Attach(ctx, attachmentOf("late", 2)) }()
	for p.kernel(2) == "free" { // until it is attached
		time.Sleep(time.Millisecond)
	}
	p.want("while it is unknown", 2, "refused")
	select {
	case <-waited:
		t.Error("Attach did not wait")
	default:
	}
	if _, err := api.CoreV1().Pods("default").Create(ctx, somePod("late", "a"), metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	p.want("when it is known", 2, "enforced")

	// A pod of the same name, but not the same pod.
	another := attachmentOf("free", 3)
	another.UID = "another"
	if err := p.policy.Attach(canceled, another); err != nil {
		t.Fatal(err)
	}
	p.want("one that the API does not know", 3, "refused")

	// Without a policy in the namespace nothing needs to be known.
	if err := api.NetworkingV1().NetworkPolicies("default").Delete(ctx, "deny-a", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(10 * time.Second)
	for i := range 4 {
		for p.kernel(i) != "free" && time.Now().Before(deadline) {
			time.Sleep(time.Millisecond)
		}
		p.want("without policies", i, "free")
	}
	begin := time.Now()
	if err := p.policy.Attach(ctx, attachmentOf("nobody", 5)); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took > attachTimeout/2 {
		t.Errorf("a pod waited %s for nothing", took)
	}
	for _, name := range []string{"free", "bound", "late", "nobody"} {
		if err := p.policy.Detach(name + "/eth0"); err != nil {
			t.Error(err)
		}
	}
}

// A new process leaves the rules of the last one until it has read the API.
func TestRestart(t *testing.T) {
	ctx := t.Context()
	api := fake.NewClientset(somePod("bound", "a"), somePod("free", "x"), denyApp("a"))
	first := newProcess(t, api)
	first.start()
	for i, name := range []string{"bound", "free"} {
		if err := first.policy.Attach(ctx, attachmentOf(name, i)); err != nil {
			t.Fatal(err)
		}
	}
	first.want("before", 0, "enforced")
	before, err := first.policy.engine.table.KernelGeneration()
	if err != nil {
		t.Fatal(err)
	}
	first.stop()

	second := newProcess(t, api)
	second.want("while nothing runs", 0, "enforced")
	second.policy.Restore([]cni.Attachment{attachmentOf("bound", 0), attachmentOf("free", 1)})
	second.want("when it starts", 0, "enforced")
	second.want("when it starts", 1, "free")
	second.start()
	second.want("after", 0, "enforced")
	second.want("after", 1, "free")
	if after, err := second.policy.engine.table.KernelGeneration(); err != nil || after != before {
		t.Errorf("the table was rewritten: %d, %d, %v", before, after, err)
	}
	second.stop()

	// The journal is lost, and with it the names; the API still has the addresses.
	pod := somePod("bound", "a")
	pod.Status.PodIPs = []corev1.PodIP{{IP: podAddr(0, false).String()}}
	if _, err := api.CoreV1().Pods("default").UpdateStatus(ctx, pod, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	third := newProcess(t, api)
	third.policy.Restore([]cni.Attachment{
		{Owner: "1", Addrs: []netip.Addr{podAddr(0, false)}}, {Owner: "2", Addrs: []netip.Addr{podAddr(2, false)}},
	})
	third.start()
	third.want("found by its address", 0, "enforced")
	third.want("of which nothing is known", 2, "refused")
}
