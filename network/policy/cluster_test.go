package policy

import (
	"log/slog"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes/fake"
	"sigs.k8s.io/yaml"

	"kedge/internal/test/host"
	"kedge/network/nft"
)

func object(t *testing.T, text string) *unstructured.Unstructured {
	t.Helper()
	u := &unstructured.Unstructured{}
	if err := yaml.Unmarshal([]byte(text), &u.Object); err != nil {
		t.Fatal(err)
	}
	return u
}

const definition = `{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: clusternetworkpolicies.policy.networking.k8s.io},
	spec: {versions: [{name: v1alpha2, served: true}]}, status: {conditions: [{type: Established, status: "True"}]}}`

func clusterDeny(t *testing.T) *unstructured.Unstructured {
	return object(t, `{apiVersion: policy.networking.k8s.io/v1alpha2, kind: ClusterNetworkPolicy, metadata: {name: deny},
		spec: {tier: Admin, priority: 1, subject: {namespaces: {}}, egress: [{action: Deny, to: [{networks: [0.0.0.0/0]}]}]}}`)
}

func newDynamic(objects ...runtime.Object) *dynamicfake.FakeDynamicClient {
	return dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), map[schema.GroupVersionResource]string{
		definitions: "CustomResourceDefinitionList", clusterPolicies: "ClusterNetworkPolicyList",
	}, objects...)
}

func defaultNamespace() *corev1.Namespace {
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: "default"}}
}

// newClusterProcess is [newProcess] that follows cluster-wide policies too.
func newClusterProcess(t *testing.T, api *fake.Clientset, dyn dynamic.Interface) *process {
	t.Helper()
	host.RequireIsolation(t)
	t.Cleanup(func() { nft.RemoveTables("node1") })
	factory := informers.NewSharedInformerFactory(api, 0)
	p, err := New(Config{NodeName: "node1"}, factory, dyn, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return run(t, p, factory)
}

// The kind may be installed and removed while the node runs. All connections of an unknown
// pod are denied if a cluster-wide policy may select it.
func TestClusterPoliciesComeAndGo(t *testing.T) {
	ctx := t.Context()
	dyn := newDynamic()
	p := newClusterProcess(t, fake.NewClientset(defaultNamespace(), somePod("a", "a")), dyn)
	p.start()
	if err := p.policy.Attach(ctx, attachmentOf("a", 0)); err != nil {
		t.Fatal(err)
	}
	eventually := func(what, want string) {
		t.Helper()
		for deadline := time.Now().Add(10 * time.Second); p.kernel(0) != want && time.Now().Before(deadline); {
			time.Sleep(5 * time.Millisecond)
		}
		p.want(what, 0, want)
	}
	p.want("without the kind", 0, "free")
	for range 2 {
		if _, err := dyn.Resource(definitions).Create(ctx, object(t, definition), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		p.want("without policies", 0, "free")
		if _, err := dyn.Resource(clusterPolicies).Create(ctx, clusterDeny(t), metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually("with a policy", "enforced")
		if err := dyn.Resource(definitions).Delete(ctx, clusterPolicies.GroupResource().String(), metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		eventually("when the kind is gone", "free")
		if err := dyn.Resource(clusterPolicies).Delete(ctx, "deny", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
}

// After a restart cluster-wide policies are in force from the first commit on.
func TestClusterPoliciesAreKnownAtStart(t *testing.T) {
	api, dyn := fake.NewClientset(defaultNamespace(), somePod("a", "a")), newDynamic(object(t, definition), clusterDeny(t))
	first := newClusterProcess(t, api, dyn)
	first.start()
	if err := first.policy.Attach(t.Context(), attachmentOf("a", 0)); err != nil {
		t.Fatal(err)
	}
	first.want("at first", 0, "enforced")
	before, _ := first.policy.engine.table.KernelGeneration()
	first.stop()
	second := newClusterProcess(t, api, dyn)
	second.policy.Restore(restored("a", 0))
	second.start()
	second.want("again", 0, "enforced")
	if after, err := second.policy.engine.table.KernelGeneration(); err != nil || after != before {
		t.Errorf("the table was rewritten: %v", err)
	}
}
