package workloads

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/watch"

	"kedge/scripts/e2e/harness"
)

func TestHealthAndMetrics(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	for _, path := range []string{"/readyz", "/livez", "/healthz"} {
		out := n.Kubectl(t, "get", "--raw", path+"?verbose")
		for _, want := range []string{"[+]ping ok", "[+]etcd ok", "[+]poststarthook/rbac/bootstrap-roles ok", "check passed"} {
			if !strings.Contains(out, want) {
				t.Errorf("no %q in %s:\n%s", want, path, out)
			}
		}
		if strings.Contains(out, "[-]") {
			t.Errorf("%s:\n%s", path, out)
		}
	}
	out := n.Kubectl(t, "get", "--raw", "/metrics")
	for _, want := range []string{"apiserver_request_total{", "etcd_request_duration_seconds_bucket{", `apiserver_resource_objects{group="",resource="nodes"}`, "scheduler_pending_pods{", "workqueue_adds_total{",
		`kubernetes_feature_enabled{name="APIServerIdentity",stage="BETA"} 0`, `version_info{`} {
		if !strings.Contains(out, "\n"+want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	for path, want := range map[string]string{"/metrics": "kubelet_running_pods ", "/metrics/cadvisor": "container_cpu_usage_seconds_total{", "/metrics/resource": "node_memory_working_set_bytes ", "/stats/summary": `"nodeName"`} {
		harness.Eventually(t, 40*time.Second, func() error {
			out, err := n.TryKubectl(nil, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy"+path)
			if err != nil || !strings.Contains(out, want) {
				return fmt.Errorf("no %s in the kubelet's %s: %v", want, path, err)
			}
			return nil
		})
	}
}

// TestMetricsAreToldOnce: each metric is at one endpoint of a server, discovery finds the resolver's,
// and a pod verifies a kubelet with what every pod has.
func TestMetricsAreToldOnce(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	families := func(path string) map[string]bool {
		found := map[string]bool{}
		for line := range strings.Lines(n.Kubectl(t, "get", "--raw", path)) {
			if f := strings.Fields(line); len(f) > 2 && f[1] == "TYPE" {
				found[f[2]] = true
			}
		}
		return found
	}
	api, kubelet := families("/metrics"), families("/api/v1/nodes/"+n.Name+"/proxy/metrics")
	if !api["apiserver_request_total"] || !api["process_resident_memory_bytes"] || !kubelet["kubelet_running_pods"] {
		t.Errorf("the API tells %d metrics and the kubelet %d", len(api), len(kubelet))
	}
	for name := range kubelet {
		if api[name] {
			t.Errorf("%s is told twice", name)
		}
	}
	if out := n.Kubectl(t, "get", "endpointslices", "-n", "kube-system", "-l", "kubernetes.io/service-name=kube-dns", "-o", "jsonpath={.items[*].ports[*].port}"); !strings.Contains(out, "9153") {
		t.Errorf("the service kube-dns has endpoints at the ports %q", out)
	}
	ns := n.Namespace(t)
	url := n.Kubectl(t, "get", "node", n.Name, "-o", `jsonpath=https://{.status.addresses[?(@.type=="InternalIP")].address}:{.status.daemonEndpoints.kubeletEndpoint.Port}/healthz`)
	const dir = "/var/run/secrets/kubernetes.io/serviceaccount/"
	out := n.RunPod(t, ns, "asks", fmt.Sprintf(`probe get %s "Authorization:Bearer $(cat %stoken)" %sca.crt 2>&1; true`, url, dir, dir), "")
	if strings.Contains(out, "x509") || !strings.Contains(out, "403") {
		t.Errorf("the kubelet answers a pod without rights: %s", out)
	}
}

// TestContainersAreNamedInMetrics: by the metrics of a container it can be told whose it
// is, which dashboards and alerts select by.
func TestContainersAreNamedInMetrics(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	pod := n.Servers(t, ns, "measured", 1, "")[0]
	container := pod.Spec.Containers[0]
	labels := []string{fmt.Sprintf("container=%q", container.Name), fmt.Sprintf("namespace=%q", ns), fmt.Sprintf("pod=%q", pod.Name), container.Image + `"`}
	harness.Eventually(t, 40*time.Second, func() error {
		out, err := n.TryKubectl(nil, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/metrics/cadvisor")
		if err != nil {
			return err
		}
		for line := range strings.Lines(out) {
			lacks := func(label string) bool { return !strings.Contains(line, label) }
			if strings.HasPrefix(line, "container_memory_working_set_bytes{") && !slices.ContainsFunc(labels, lacks) {
				return nil
			}
		}
		return fmt.Errorf("no container_memory_working_set_bytes with %s", labels)
	})
}

func TestDiscoveryAndSchemas(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	out := n.Kubectl(t, "api-resources")
	for _, want := range []string{"deployments", "customresourcedefinitions", "apiservices", "endpointslices", "networkpolicies", "validatingadmissionpolicies", "leases"} {
		if !strings.Contains(out, want) {
			t.Errorf("no resource %s:\n%s", want, out)
		}
	}
	if out := n.Kubectl(t, "api-versions"); !strings.Contains(out, "apps/v1\n") || !strings.Contains(out, "networking.k8s.io/v1\n") {
		t.Errorf("versions are %s", out)
	}
	var v2 struct {
		Swagger     string
		Definitions map[string]json.RawMessage
	}
	if err := json.Unmarshal([]byte(n.Kubectl(t, "get", "--raw", "/openapi/v2")), &v2); err != nil || v2.Swagger != "2.0" || v2.Definitions["io.k8s.api.core.v1.Pod"] == nil {
		t.Errorf("OpenAPI v2: %v, %q, %d definitions", err, v2.Swagger, len(v2.Definitions))
	}
	var v3 struct {
		OpenAPI    string
		Components struct{ Schemas map[string]json.RawMessage }
	}
	if err := json.Unmarshal([]byte(n.Kubectl(t, "get", "--raw", "/openapi/v3/apis/apps/v1")), &v3); err != nil || !strings.HasPrefix(v3.OpenAPI, "3.") || v3.Components.Schemas["io.k8s.api.apps.v1.Deployment"] == nil {
		t.Errorf("OpenAPI v3: %v, %q, %d schemas", err, v3.OpenAPI, len(v3.Components.Schemas))
	}
	var list struct {
		Paths map[string]struct{ ServerRelativeURL string }
	}
	if err := json.Unmarshal([]byte(n.Kubectl(t, "get", "--raw", "/openapi/v3")), &list); err != nil {
		t.Fatal(err)
	}
	// What is served under the hash of the list, what an old hash leads to, and what is
	// served without one are the same.
	for _, group := range []string{"api/v1", "apis/batch/v1", "version"} {
		named := list.Paths[group].ServerRelativeURL
		path, hash, _ := strings.Cut(named, "?hash=")
		if path != "/openapi/v3/"+group || hash == "" {
			t.Errorf("OpenAPI v3 of %s is at %q", group, named)
			continue
		}
		plain := n.Kubectl(t, "get", "--raw", path)
		if n.Kubectl(t, "get", "--raw", named) != plain || n.Kubectl(t, "get", "--raw", path+"?hash=OLD") != plain || !strings.Contains(plain, `"/`+group) {
			t.Errorf("OpenAPI v3 of %s is not the same under every address", group)
		}
	}
	if out := n.Kubectl(t, "explain", "pod.spec.containers.livenessProbe.grpc.port"); !strings.Contains(out, "FIELD: port <integer>") || !strings.Contains(out, "Port number of the gRPC service") {
		t.Errorf("explain: %s", out)
	}
	var version struct {
		ServerVersion struct{ GitVersion, Minor string }
		ClientVersion struct{ GitVersion string }
	}
	if err := json.Unmarshal([]byte(n.Kubectl(t, "version", "-o", "json")), &version); err != nil || version.ServerVersion.GitVersion != version.ClientVersion.GitVersion || !strings.HasSuffix(version.ServerVersion.GitVersion, "+kedge") {
		t.Errorf("version: %v, %+v", err, version)
	}
}

func TestServerSideApply(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	manifest := func(data string) string {
		return "{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {" + data + "}}"
	}
	apply := func(manager, data string, more ...string) (string, error) {
		return n.TryKubectl(strings.NewReader(manifest(data)), append([]string{"apply", "--server-side", "-n", ns, "--field-manager=" + manager, "-f", "-"}, more...)...)
	}
	must := func(out string, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err, out)
		}
	}
	have := func(want string) {
		t.Helper()
		if got := n.Kubectl(t, "get", "configmap", "-n", ns, "c", "-o", "jsonpath={.data}"); got != want {
			t.Errorf("data is %s, want %s", got, want)
		}
	}
	must(apply("first", "a: '1', b: '1'"))
	out, err := apply("second", "a: '2'")
	if err == nil || !strings.Contains(out, `conflict with "first": .data.a`) {
		t.Errorf("no conflict, but %v: %s", err, out)
	}
	have(`{"a":"1","b":"1"}`)
	must(apply("second", "c: '2'")) // another field: no conflict
	must(apply("second", "a: '2', c: '2'", "--force-conflicts"))
	have(`{"a":"2","b":"1","c":"2"}`)
	// What a manager leaves out is removed when nobody else owns it.
	must(apply("first", "b: '3'"))
	must(apply("second", "a: '2'"))
	have(`{"a":"2","b":"3"}`)
	if got := n.Kubectl(t, "get", "configmap", "-n", ns, "c", "--show-managed-fields", "-o", "jsonpath={.metadata.managedFields[*].manager}"); got != "first second" && got != "second first" {
		t.Errorf("managers are %s", got)
	}
}

func TestWatches(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	ctx, cancel := context.WithTimeout(context.Background(), 60*time.Second)
	defer cancel()
	maps := n.Client.CoreV1().ConfigMaps(ns)
	make := func(name string) *corev1.ConfigMap {
		c, err := maps.Create(ctx, &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"l": name}}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	old := make("old")
	expect := func(w watch.Interface, kind watch.EventType, name string) {
		t.Helper()
		for e := range w.ResultChan() {
			c, ok := e.Object.(*corev1.ConfigMap)
			if ok && c.Name == "kube-root-ca.crt" {
				continue // which a controller makes
			}
			if e.Type != kind || ok && c.Name != name {
				t.Fatalf("event %s of %v, want %s of %s", e.Type, e.Object, kind, name)
			}
			return
		}
		t.Fatalf("the watch ended before %s of %s", kind, name)
	}
	begin := func(o metav1.ListOptions) watch.Interface {
		t.Helper()
		w, err := maps.Watch(ctx, o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(w.Stop)
		return w
	}
	all := begin(metav1.ListOptions{ResourceVersion: old.ResourceVersion})
	one := begin(metav1.ListOptions{ResourceVersion: old.ResourceVersion, LabelSelector: "l=new"})
	fresh := make("new")
	if _, err := maps.Patch(ctx, "old", types.MergePatchType, []byte(`{"data":{"k":"v"}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	// An object that stops to match a selector is deleted for its watcher.
	if _, err := maps.Patch(ctx, "new", types.MergePatchType, []byte(`{"metadata":{"labels":{"l":"other"}}}`), metav1.PatchOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := maps.Delete(ctx, "old", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	expect(all, watch.Added, "new")
	expect(all, watch.Modified, "old")
	expect(all, watch.Modified, "new")
	expect(all, watch.Deleted, "old")
	expect(one, watch.Added, "new")
	expect(one, watch.Deleted, "new")
	// From the past: the same events, from the store's history.
	again := begin(metav1.ListOptions{ResourceVersion: fresh.ResourceVersion})
	expect(again, watch.Modified, "old")
	expect(again, watch.Modified, "new")
	expect(again, watch.Deleted, "old")
	// A list as a watch: what is there, then a bookmark.
	yes := true
	list := begin(metav1.ListOptions{SendInitialEvents: &yes, AllowWatchBookmarks: true, ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan})
	expect(list, watch.Added, "new")
	expect(list, watch.Bookmark, "")
	// A version that is not there yet is waited for, but not for ever; an update of
	// an old one is refused.
	future := metav1.ListOptions{ResourceVersion: "99999999999", ResourceVersionMatch: metav1.ResourceVersionMatchNotOlderThan}
	if _, err := maps.List(ctx, future); !apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge) {
		t.Errorf("a list of the future: %v", err)
	}
	if _, err := maps.Update(ctx, fresh, metav1.UpdateOptions{}); !apierrors.IsConflict(err) {
		t.Errorf("an update of an old version: %v", err)
	}
	// Pages of one list show one state.
	for i := range 5 {
		make(fmt.Sprint("page", i))
	}
	page, err := maps.List(ctx, metav1.ListOptions{Limit: 2})
	if err != nil || len(page.Items) != 2 || page.Continue == "" {
		t.Fatalf("first page: %v, %d items", err, len(page.Items))
	}
	make("late")
	seen := len(page.Items)
	for page.Continue != "" {
		if page, err = maps.List(ctx, metav1.ListOptions{Limit: 2, Continue: page.Continue}); err != nil {
			t.Fatal(err)
		}
		seen += len(page.Items)
		for _, c := range page.Items {
			if c.Name == "late" {
				t.Error("a later page shows what was made after the first")
			}
		}
	}
	if seen < 6 {
		t.Errorf("pages have %d objects", seen)
	}
}

func TestGarbageCollectionAndFinalizers(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: owner, finalizers: [kedge.test/wait]}}`)
	uid := n.Kubectl(t, "get", "configmap", "-n", ns, "owner", "-o", "jsonpath={.metadata.uid}")
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: ConfigMap, metadata: {name: owned, ownerReferences: [{apiVersion: v1, kind: ConfigMap, name: owner, uid: %s}]}}`, uid))
	n.Kubectl(t, "delete", "configmap", "-n", ns, "owner", "--wait=false")
	names := func() string {
		return n.Kubectl(t, "get", "configmap", "-n", ns, "-o", "jsonpath={.items[*].metadata.name}")
	}
	if got := names(); !strings.Contains(got, "owner") {
		t.Errorf("a finalizer does not keep its object: %s", got)
	}
	n.Kubectl(t, "patch", "configmap", "-n", ns, "owner", "--type=merge", "-p", `{"metadata":{"finalizers":null}}`)
	harness.Eventually(t, 30*time.Second, func() error {
		if got := names(); strings.Contains(got, "own") {
			return fmt.Errorf("there are still %s", got)
		}
		return nil
	})
	// A namespace takes everything in it along.
	n.Kubectl(t, "create", "namespace", ns+"-x")
	n.Kubectl(t, "create", "configmap", "-n", ns+"-x", "c")
	n.Kubectl(t, "delete", "namespace", ns+"-x", "--timeout=40s")
	if out, err := n.TryKubectl(nil, "get", "configmap", "-n", ns+"-x", "c"); err == nil {
		t.Errorf("left behind: %s", out)
	}
}
