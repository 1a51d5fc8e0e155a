package importk3s

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	dynamicfake "k8s.io/client-go/dynamic/fake"
	"k8s.io/client-go/kubernetes/scheme"
	clienttesting "k8s.io/client-go/testing"
)

// mapper knows all kinds of the scheme, and those of the test's definitions.
type mapper struct{ *meta.DefaultRESTMapper }

func (mapper) Reset() {}

// newCluster is a cluster of kedge whose range of services is 10.43.0.0/16, and which has what clusters create themselves.
type newCluster struct {
	*testing.T
	api    *dynamicfake.FakeDynamicClient
	mapper mapper
}

func startCluster(t *testing.T) *newCluster {
	t.Helper()
	m := mapper{meta.NewDefaultRESTMapper(nil)}
	lists := map[schema.GroupVersionResource]string{}
	add := func(kind schema.GroupVersionKind, scope meta.RESTScope) {
		m.Add(kind, scope)
		plural, _ := meta.UnsafeGuessKindToResource(kind)
		lists[plural] = kind.Kind + "List"
	}
	clusterWide := []string{"Namespace", "PersistentVolume", "ClusterRole", "ClusterRoleBinding", "StorageClass", "IngressClass", "ServiceCIDR", "PriorityClass", "ValidatingWebhookConfiguration"}
	for kind := range scheme.Scheme.AllKnownTypes() {
		if strings.HasSuffix(kind.Kind, "List") || strings.HasSuffix(kind.Kind, "Options") || kind.Version == runtime.APIVersionInternal {
			continue
		}
		if slices.Contains(clusterWide, kind.Kind) {
			add(kind, meta.RESTScopeRoot)
		} else {
			add(kind, meta.RESTScopeNamespace)
		}
	}
	add(schema.GroupVersionKind{Group: "apiextensions.k8s.io", Version: "v1", Kind: "CustomResourceDefinition"}, meta.RESTScopeRoot)
	add(schema.GroupVersionKind{Group: "shop.example.org", Version: "v1", Kind: "Order"}, meta.RESTScopeNamespace)
	c := &newCluster{t, dynamicfake.NewSimpleDynamicClientWithCustomListKinds(runtime.NewScheme(), lists), m}
	n := 0
	c.api.PrependReactor("create", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		u := a.(clienttesting.CreateAction).GetObject().(*unstructured.Unstructured)
		n++
		u.SetUID(types.UID(fmt.Sprintf("new-%d", n)))
		if u.GetKind() == "CustomResourceDefinition" {
			u.Object["status"] = map[string]any{"conditions": []any{map[string]any{"type": "Established", "status": "True"}}}
		}
		return false, nil, nil
	})
	for _, u := range objectsIn(t, `{apiVersion: networking.k8s.io/v1, kind: ServiceCIDR, metadata: {name: kubernetes}, spec: {cidrs: [10.43.0.0/16]}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: default, labels: {kubernetes.io/metadata.name: default}}, spec: {finalizers: [kubernetes]}}
---
{apiVersion: v1, kind: Namespace, metadata: {name: kube-system, labels: {kubernetes.io/metadata.name: kube-system}}, spec: {finalizers: [kubernetes]}}
---
{apiVersion: v1, kind: ServiceAccount, metadata: {name: default, namespace: shop}}`) {
		if _, err := c.at(u.GroupVersionKind(), u.GetNamespace()).Create(t.Context(), u, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func (c *newCluster) at(kind schema.GroupVersionKind, namespace string) dynamic.ResourceInterface {
	c.Helper()
	m, err := c.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		c.Fatal(err)
	}
	return c.api.Resource(m.Resource).Namespace(namespace)
}

func (c *newCluster) get(kind schema.GroupVersionKind, namespace, name string) *unstructured.Unstructured {
	c.Helper()
	u, err := c.at(kind, namespace).Get(c.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.Fatal(err)
	}
	return u
}

// run imports, and returns the entries by kind and name.
func (c *newCluster) run(objects []*unstructured.Unstructured, opts Options) (map[string]Entry, Report) {
	c.Helper()
	s := &Snapshot{}
	for _, u := range objects {
		s.objects = append(s.objects, &object{u.DeepCopy(), ""})
	}
	i := newImporter(c.api, c.mapper, opts)
	i.retryPause = time.Millisecond
	r, err := i.Run(c.Context(), s)
	if err != nil {
		c.Fatal(err)
	}
	all := map[string]Entry{}
	for _, e := range r.Entries {
		all[strings.TrimSuffix(e.Kind+" "+e.Namespace+"/"+e.Name, " /")] = e
	}
	return all, r
}

func core(kind string) schema.GroupVersionKind { return corev1.SchemeGroupVersion.WithKind(kind) }

func oldObjects(t *testing.T) []*unstructured.Unstructured {
	t.Helper()
	text, err := os.ReadFile("testdata/old.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return objectsIn(t, string(text))
}

// TestImport imports the test's cluster, and looks at each object.
func TestImport(t *testing.T) {
	c := startCluster(t)
	got, report := c.run(oldObjects(t), Options{})
	want := map[string]Outcome{
		"Namespace /default": Completed, "Namespace /kube-system": Unchanged, "Namespace /shop": Created, "Namespace /going": LeftOut,
		"ConfigMap going/of-going": LeftOut, "Node": LeftOut, "Event": LeftOut, "Lease": LeftOut,
		"ServiceAccount shop/default": Completed, "ServiceAccount kube-system/deployment-controller": LeftOut, "ServiceAccount kube-system/svclb": LeftOut,
		"ClusterRoleBinding": LeftOut, "ClusterRole /system:k3s-controller": LeftOut, "ClusterRole /system:aggregated-shop-reader": Created,
		"Secret shop/db": Created, "Secret shop/default-token-x": LeftOut, "Secret kube-system/old.node-password.k3s": LeftOut, "Secret kube-system/k3s-serving": LeftOut,
		"ConfigMap shop/kube-root-ca.crt": LeftOut, "ConfigMap kube-system/coredns": LeftOut, "ConfigMap shop/from-a-manifest": Created,
		"CustomResourceDefinition /addons.k3s.cattle.io": LeftOut, "Addon kube-system/coredns": LeftOut,
		"HelmChart kube-system/traefik": LeftOut, "HelmChart kube-system/grafana": LeftOut,
		"Deployment kube-system/traefik": LeftOut, "Deployment shop/grafana": Created, "DaemonSet kube-system/svclb-web-1234": LeftOut,
		"CustomResourceDefinition /orders.shop.example.org": Created, "Order shop/first": Created, "Secret shop/of-first-order": Created,
		"PersistentVolume /pvc-1": Created, "PersistentVolumeClaim shop/data": Created, "StorageClass /local-path": LeftOut,
		"Service default/kubernetes": LeftOut, "Service shop/web": Created, "Endpoints shop/web": LeftOut, "Service shop/outside": Created,
		"Endpoints shop/outside": Created, "EndpointSlice shop/web-x": LeftOut, "Ingress shop/web": Created, "IngressClass /traefik": LeftOut,
		"Deployment shop/web": Created, "ReplicaSet": LeftOut, "Pod": LeftOut, "Pod shop/alone": Created, "Job shop/migrate": LeftOut, "APIService /v1.apps": LeftOut,
		"PersistentVolume /pvc-2": Created, "PersistentVolumeClaim shop/data-db-0": Created, "StatefulSet shop/db": Created, "Secret shop/of-db": Created,
		"Job shop/goes-on": Created, "CronJob shop/nightly": Created, "ClusterRole /shop-all": Created, "RoleBinding shop/shop-view": Created,
		"NetworkPolicy shop/none": Created, "PodDisruptionBudget shop/web": Created, "HorizontalPodAutoscaler shop/grafana": Created,
		"LimitRange shop/limits": Created, "ResourceQuota shop/quota": Created, "PriorityClass /shop-first": Created,
		"ValidatingWebhookConfiguration /shop": Created, "Service shop/front": Created,
	}
	for name, outcome := range want {
		if e := got[name]; e.Outcome != outcome {
			t.Errorf("%s is %q (%s), want %q", name, e.Outcome, e.Reason, outcome)
		}
	}
	for name, e := range got {
		if want[name] == "" {
			t.Errorf("%s is %q, and nobody asked for it", name, e.Outcome)
		}
	}
	for _, part := range []string{"/tmp/kedge-imported-volume", "StorageClass local-path", "Traefik", "HelmChart grafana"} {
		if !slices.ContainsFunc(report.Notices, func(n string) bool { return strings.Contains(n, part) }) {
			t.Errorf("no notice of %s: %q", part, report.Notices)
		}
	}
	c.checkObjects()

	again, report := c.run(oldObjects(t), Options{})
	for name, e := range again {
		if e.Outcome != Unchanged && e.Outcome != LeftOut {
			t.Errorf("the second time %s is %q: %s", name, e.Outcome, e.Reason)
		}
	}
	if report.Failures() != 0 {
		t.Errorf("%d failures", report.Failures())
	}
}

// checkObjects looks at the fields of imported objects that must not be as they were.
func (c *newCluster) checkObjects() {
	order := c.get(schema.GroupVersionKind{Group: "shop.example.org", Version: "v1", Kind: "Order"}, "shop", "first")
	if owners := c.get(core("Secret"), "shop", "of-first-order").GetOwnerReferences(); len(owners) != 1 || owners[0].UID != order.GetUID() || order.GetUID() == "" {
		c.Errorf("the Secret's owner is %v, and the order has UID %s", owners, order.GetUID())
	}
	if accounts := c.get(core("ServiceAccount"), "shop", "default"); !hasField(accounts, "imagePullSecrets") || hasField(accounts, "secrets") {
		c.Errorf("the service account is %v", accounts.Object)
	}
	volume, claim := c.get(core("PersistentVolume"), "", "pvc-1"), c.get(core("PersistentVolumeClaim"), "shop", "data")
	if ref, _, _ := unstructured.NestedMap(volume.Object, "spec", "claimRef"); ref["name"] != "data" || ref["uid"] != nil || ref["resourceVersion"] != nil {
		c.Errorf("the volume refers to %v", ref)
	}
	if name, _, _ := unstructured.NestedString(claim.Object, "spec", "volumeName"); name != "pvc-1" || len(claim.GetAnnotations()) > 0 || hasField(claim, "status") {
		c.Errorf("the claim is %v", claim.Object)
	}
	if at, _, _ := unstructured.NestedString(c.get(core("Service"), "shop", "web").Object, "spec", "clusterIP"); at != "10.43.7.7" {
		c.Errorf("the service has the address %q", at)
	}
	if pod := c.get(core("Pod"), "shop", "alone"); hasField(pod, "spec", "nodeName") || hasField(pod, "spec", "volumes") {
		c.Errorf("the pod is %v", pod.Object["spec"])
	}
	if from := c.get(core("ConfigMap"), "shop", "from-a-manifest"); len(from.GetAnnotations()) > 0 || len(from.GetLabels()) > 0 {
		c.Errorf("k3s's notes are left in %v", from.Object)
	}
	for _, u := range []*unstructured.Unstructured{volume, claim, order} {
		if len(u.GetFinalizers()) > 0 || len(u.GetManagedFields()) > 0 || u.GetResourceVersion() == "7" {
			c.Errorf("%s has parts of the old cluster: %v", u.GetKind(), u.Object["metadata"])
		}
	}
}

// TestOrder: what others need comes before them, and what can refuse others after them.
func TestOrder(t *testing.T) {
	c := startCluster(t)
	_, report := c.run(oldObjects(t), Options{})
	at := map[string]int{}
	for n, e := range report.Entries {
		at[e.Kind+" "+e.Name] = n
	}
	for _, pair := range [][2]string{
		{"CustomResourceDefinition orders.shop.example.org", "Order first"}, {"Order first", "ValidatingWebhookConfiguration shop"},
		{"PersistentVolume pvc-2", "PersistentVolumeClaim data-db-0"}, {"PersistentVolumeClaim data-db-0", "StatefulSet db"},
		{"StatefulSet db", "Secret of-db"}, {"Secret db", "Deployment web"}, {"Pod alone", "ResourceQuota quota"}, {"LimitRange limits", "Pod alone"},
	} {
		if at[pair[0]] >= at[pair[1]] {
			t.Errorf("%s comes after %s", pair[0], pair[1])
		}
	}
	set := c.get(schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "StatefulSet"}, "shop", "db")
	if owners := c.get(core("Secret"), "shop", "of-db").GetOwnerReferences(); len(owners) != 1 || owners[0].UID != set.GetUID() {
		t.Errorf("the Secret's owner is %v", owners)
	}
	job := c.get(schema.GroupVersionKind{Group: "batch", Version: "v1", Kind: "Job"}, "shop", "goes-on")
	if labels, _, _ := unstructured.NestedMap(job.Object, "spec", "template", "metadata", "labels"); len(labels) != 1 || len(job.GetLabels()) > 0 || hasField(job, "spec", "selector") {
		t.Errorf("the job is %v", job.Object)
	}
}

// TestImportTwice changes an object between two imports.
func TestImportTwice(t *testing.T) {
	c := startCluster(t)
	old := oldObjects(t)
	dry, _ := c.run(old, Options{DryRun: true})
	if dry["Secret shop/db"].Outcome != Created || dry["Order shop/first"].Outcome != Created || dry["Namespace /default"].Outcome != Completed {
		t.Errorf("a dry run says %v", dry)
	}
	if _, err := c.at(core("Secret"), "shop").Get(t.Context(), "db", metav1.GetOptions{}); !apierrors.IsNotFound(err) {
		t.Errorf("after a dry run: %v", err)
	}
	c.run(old, Options{})
	deployment := schema.GroupVersionKind{Group: "apps", Version: "v1", Kind: "Deployment"}
	change := c.get(deployment, "shop", "web")
	if err := unstructured.SetNestedField(change.Object, int64(5), "spec", "replicas"); err != nil {
		t.Fatal(err)
	}
	change.SetAnnotations(map[string]string{"mine": "yes"})
	if _, err := c.at(deployment, "shop").Update(t.Context(), change, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	replicas := func() int64 {
		n, _, _ := unstructured.NestedInt64(c.get(deployment, "shop", "web").Object, "spec", "replicas")
		return n
	}
	if got, _ := c.run(old, Options{}); got["Deployment shop/web"].Outcome != Differs || got["Deployment shop/web"].Reason != "spec.replicas" || replicas() != 5 {
		t.Errorf("%v, with %d replicas", got["Deployment shop/web"], replicas())
	}
	if got, _ := c.run(old, Options{DryRun: true, Overwrite: true}); got["Deployment shop/web"].Outcome != Updated || replicas() != 5 {
		t.Errorf("a dry run: %v, with %d replicas", got["Deployment shop/web"], replicas())
	}
	if got, _ := c.run(old, Options{Overwrite: true}); got["Deployment shop/web"].Outcome != Updated || replicas() != 1 || c.get(deployment, "shop", "web").GetAnnotations()["mine"] != "yes" {
		t.Errorf("%v, with %d replicas", got["Deployment shop/web"], replicas())
	}
}

// TestImportFails reports what the cluster refuses, goes on, and tries it again.
func TestImportFails(t *testing.T) {
	c := startCluster(t)
	tries := map[string]int{}
	c.api.PrependReactor("create", "*", func(a clienttesting.Action) (bool, runtime.Object, error) {
		u := a.(clienttesting.CreateAction).GetObject().(*unstructured.Unstructured)
		name := u.GetName()
		if u.GetKind() == "StatefulSet" {
			return false, nil, nil // it has the name of a Secret
		}
		tries[name]++
		switch {
		case name == "db":
			return true, nil, apierrors.NewInvalid(schema.GroupKind{Kind: "Secret"}, name, nil)
		case name == "alone" && tries[name] == 1:
			return true, nil, apierrors.NewForbidden(schema.GroupResource{Resource: "pods"}, name, fmt.Errorf("no service account yet"))
		case name == "first":
			return true, nil, apierrors.NewInternalError(fmt.Errorf("failed calling webhook"))
		case name == "web" && u.GetKind() == "Service" && hasField(u, "spec", "clusterIP"):
			err := apierrors.NewInvalid(schema.GroupKind{Kind: "Service"}, name, nil)
			err.ErrStatus.Details.Causes = []metav1.StatusCause{{Field: "spec.clusterIPs", Message: "provided IP is already allocated"}}
			return true, nil, err
		}
		return false, nil, nil
	})
	old := append(oldObjects(t), objectsIn(t, `{apiVersion: gone.example.org/v1, kind: Gone, metadata: {name: x, namespace: shop}}`)...)
	got, report := c.run(old, Options{})
	if got["Secret shop/db"].Outcome != Failed || tries["db"] != 1 {
		t.Errorf("%v after %d tries", got["Secret shop/db"], tries["db"])
	}
	if got["Pod shop/alone"].Outcome != Created || tries["alone"] != 2 {
		t.Errorf("%v after %d tries", got["Pod shop/alone"], tries["alone"])
	}
	if e := got["Service shop/web"]; e.Outcome != Created || !strings.Contains(e.Reason, "another address") {
		t.Errorf("%v", e)
	}
	if e := got["Gone shop/x"]; e.Outcome != Failed || !strings.Contains(e.Reason, "does not serve the kind Gone.gone.example.org in version v1") {
		t.Errorf("%v", e)
	}
	if report.Failures() != 3 {
		t.Errorf("%d failures", report.Failures())
	}
	// What an owner that fails would have owned is not lost with it, and gets its owner later.
	if got["Order shop/first"].Outcome != Failed || tries["first"] != retries+1 || got["Secret shop/of-first-order"].Outcome != Created || tries["of-first-order"] != 1 {
		t.Errorf("%v after %d tries, and %v", got["Order shop/first"], tries["first"], got["Secret shop/of-first-order"])
	}
	c.api.ReactionChain = c.api.ReactionChain[1:]
	if got, _ := c.run(old, Options{}); got["Order shop/first"].Outcome != Created || got["Secret shop/of-first-order"].Reason != "metadata.ownerReferences" {
		t.Errorf("%v, and %v", got["Order shop/first"], got["Secret shop/of-first-order"])
	}
	c.run(old, Options{Overwrite: true})
	c.checkObjects()
}

// TestAddressOutside: a service whose address is not in the cluster's range gets another one.
func TestAddressOutside(t *testing.T) {
	c := startCluster(t)
	got, _ := c.run(objectsIn(t, `{apiVersion: v1, kind: Service, metadata: {name: far, namespace: shop}, spec: {clusterIP: 10.96.0.7, clusterIPs: [10.96.0.7], ipFamilies: [IPv4]}}`), Options{})
	if e := got["Service shop/far"]; e.Outcome != Created || !strings.Contains(e.Reason, "10.96.0.7 is not in the cluster's range") || hasField(c.get(core("Service"), "shop", "far"), "spec", "clusterIPs") {
		t.Errorf("%v", e)
	}
}

// TestUsedDefinitions: Traefik's definitions are imported for objects of the user, and only for them.
func TestUsedDefinitions(t *testing.T) {
	const chart = `{apiVersion: helm.cattle.io/v1, kind: HelmChart, metadata: {name: traefik-crd, namespace: kube-system, annotations: {objectset.rio.cattle.io/owner-gvk: "k3s.cattle.io/v1, Kind=Addon", objectset.rio.cattle.io/owner-name: traefik}}}
---
{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: a.traefik.io, annotations: {meta.helm.sh/release-name: traefik-crd, meta.helm.sh/release-namespace: kube-system}}, spec: {group: traefik.io, names: {kind: A}}}
---
{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: b.traefik.io, annotations: {meta.helm.sh/release-name: traefik-crd, meta.helm.sh/release-namespace: kube-system}}, spec: {group: traefik.io, names: {kind: B}}}
---
{apiVersion: traefik.io/v1, kind: A, metadata: {name: mine, namespace: shop}}`
	var all []*object
	for _, u := range objectsIn(t, chart) {
		all = append(all, &object{u, ""})
	}
	c := choose(all)
	for n, want := range []string{ofK3s, "", ofK3s, ""} {
		if got := c.left[all[n]]; got != want {
			t.Errorf("%s is left out for %q, want %q", all[n].GetName(), got, want)
		}
	}
}

// TestAggregated: Kubernetes collects the rules of an aggregated role, and they may differ.
func TestAggregated(t *testing.T) {
	role := objectsIn(t, `{apiVersion: rbac.authorization.k8s.io/v1, kind: ClusterRole, metadata: {name: a}, aggregationRule: {clusterRoleSelectors: [{matchLabels: {a: b}}]}, rules: [{verbs: [get]}]}`)
	c := startCluster(t)
	c.run(role, Options{})
	if u := c.get(role[0].GroupVersionKind(), "", "a"); hasField(u, "rules") || !hasField(u, "aggregationRule") {
		t.Errorf("%v", u.Object)
	}
}

// TestGone: objects of types that Kubernetes has no more are reported, unless nothing of their kind is imported anyway.
func TestGone(t *testing.T) {
	value := func(version, kind string) []byte {
		data, err := (&runtime.Unknown{TypeMeta: runtime.TypeMeta{APIVersion: version, Kind: kind}, Raw: []byte{10, 0}}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		return append([]byte("k8s\x00"), data...)
	}
	s := decodeAll(t.Context(), []stored{{"/registry/a", value("policy/v1beta1", "PodSecurityPolicy")}, {"/registry/b", value("extensions/v1alpha1", "Thing")}}, &decrypter{})
	if len(s.objects) != 0 || len(s.unread) != 2 || s.unread[0].Outcome != LeftOut || s.unread[1].Outcome != Failed || !strings.Contains(s.unread[1].Reason, "Kubernetes has no type extensions/v1alpha1") {
		t.Errorf("%v, %v", s.objects, s.unread)
	}
}

// TestCompare: what a setting that is not wanted says is more than nothing.
func TestCompare(t *testing.T) {
	for _, c := range []struct{ want, have, differs string }{
		{`{spec: {a: 1}}`, `{spec: {a: 1, b: 2}, status: {c: 3}}`, ""},
		{`{spec: {a: 1, list: []}}`, `{spec: {a: 1}}`, ""},
		{`{automountServiceAccountToken: false}`, `{}`, "automountServiceAccountToken"},
		{`{spec: {storageClassName: ""}}`, `{spec: {storageClassName: fast}}`, "spec.storageClassName"},
		{`{spec: {list: [{a: 1}]}}`, `{spec: {list: [{a: 1}, {a: 2}]}}`, "spec.list"},
		{`{spec: {list: [{a: 1}]}}`, `{spec: {list: [{a: 2}]}}`, "spec.list[0].a"},
		{`{metadata: {labels: {a: b}, uid: x}}`, `{metadata: {uid: y}}`, "metadata.labels"},
	} {
		want, have := objectsIn(t, c.want)[0], objectsIn(t, c.have)[0]
		if got := difference(want.Object, have.Object); got != c.differs {
			t.Errorf("%s and %s differ in %q, want %q", c.want, c.have, got, c.differs)
		}
	}
}

// TestVolumeNotice: where the data of a volume has to be.
func TestVolumeNotice(t *testing.T) {
	const volume = `{apiVersion: v1, kind: PersistentVolume, metadata: {name: v}, spec: {local: {path: /srv/v}, nodeAffinity: {required: {nodeSelectorTerms: [
	{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [old]}]}]}}}}`
	c := choose([]*object{{objectsIn(t, volume)[0], ""}})
	want := "The data of PersistentVolume v is not in the snapshot. Copy it from /srv/v on node old to the same path on the node of the new cluster that has this name; the pods run on no other."
	if got := c.notices(); len(got) != 1 || got[0] != want {
		t.Errorf("the notices are %q", got)
	}
}
