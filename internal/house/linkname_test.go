package house

import (
	"go/ast"
	"go/token"
	"maps"
	"slices"
	"strings"
	"testing"

	"kedge/internal/foreign"
)

// TestVolumesMatchUpstream compares what agent/embed_volumes.go believes about upstream's
// CSI plugin with its source: the linker compares neither names nor types, and whatever
// else the plugin came to keep in variables would be lost when another server leads.
func TestVolumesMatchUpstream(t *testing.T) {
	const advice = `

agent/embed_volumes.go saves and restores the variables in which the CSI plugin keeps the kubelet's node, one of them
through go:linkname. Look at the plugin's Init in this Kubernetes: whatever it sets must be given back after the
controllers were built, or must not be set by a host that is no kubelet. Adapt Volumes.Build, and then this test.`

	plugin := foreign.Parse(t, "k8s.io/kubernetes/pkg/volume/csi")
	variables := plugin.Variables()
	if v := variables["nim"]; v.Type == nil || plugin.Text(t, v.Type) != "nodeinfomanager.Interface" {
		t.Errorf("there is no variable nim of the type nodeinfomanager.Interface.%s", advice)
	}
	if v := variables["PluginHandler"]; v.Value == nil || plugin.Text(t, v.Value) != "&RegistrationHandler{}" {
		t.Errorf("there is no variable PluginHandler that begins as &RegistrationHandler{}.%s", advice)
	}
	initialise := plugin.Func(t, "csiPlugin.Init", advice)
	assigned := map[string]bool{}
	ast.Inspect(initialise.Body, func(n ast.Node) bool {
		a, ok := n.(*ast.AssignStmt)
		if !ok || a.Tok != token.ASSIGN {
			return true
		}
		for _, left := range a.Lhs {
			root, _, _ := strings.Cut(plugin.Text(t, left), ".")
			if _, ours := variables[root]; ours {
				assigned[plugin.Text(t, left)] = true
			}
		}
		return true
	})
	if got, want := slices.Sorted(maps.Keys(assigned)), []string{"PluginHandler.csiPlugin", "nim"}; !slices.Equal(got, want) {
		t.Errorf("Init sets %v, want %v.%s", got, want, advice)
	}
}

// TestHooksMatchUpstream compares server/embed_hooks.go, which does the work of two hooks
// without their wait, with the hooks.
func TestHooksMatchUpstream(t *testing.T) {
	const advice = `

server/embed_hooks.go is in place of upstream's hook, calls its ensureRBACPolicy through go:linkname, and gives it what
the hook does. If upstream no longer waits for a second before, take ours out; else adapt it, and then this test.`

	roles := foreign.Parse(t, "k8s.io/kubernetes/pkg/registry/rbac/rest")
	const want = "func(p *PolicyData, client clientset.Interface) (done bool, err error)"
	if got := roles.Text(t, roles.Func(t, "ensureRBACPolicy", advice).Type); got != want {
		t.Errorf("ensureRBACPolicy is a %s, want a %s.%s", got, want, advice)
	}
	given := []string{
		"ClusterRoleBindings", "ClusterRoleBindingsToSplit", "ClusterRoles", "ClusterRolesToAggregate",
		"ControllerRoleBindings", "ControllerRoles", "NamespaceRoleBindings", "NamespaceRoles",
	}
	if got := roles.Calls(roles.Func(t, "RESTStorageProvider.PostStartHook", advice), "bootstrappolicy"); !slices.Equal(got, given) {
		t.Errorf("the policy is made of %v, it was %v.%s", got, given, advice)
	}
	classes := foreign.Parse(t, "k8s.io/kubernetes/pkg/registry/scheduling/rest")
	body := classes.Func(t, "AddSystemPriorityClasses", advice)
	if got := classes.Calls(body, "schedulingapiv1"); !slices.Equal(got, []string{"SystemPriorityClasses"}) {
		t.Errorf("the priority classes come from %v.%s", got, advice)
	}
	for name, text := range map[string]string{
		"EnsureRBACPolicy":         roles.Text(t, roles.Func(t, "PolicyData.EnsureRBACPolicy", advice)),
		"AddSystemPriorityClasses": classes.Text(t, body),
	} {
		if !strings.Contains(text, "wait.Poll(1*time.Second,") {
			t.Errorf("%s no longer waits for a second.%s", name, advice)
		}
	}
}

// TestPodSourcesMatchUpstream compares agent/embed_pods.go, which gives the kubelet its
// sources of pods, with what the kubelet would make itself.
func TestPodSourcesMatchUpstream(t *testing.T) {
	const advice = `

agent/embed_pods.go makes the kubelet's sources of pods as the kubelet's makePodSourceConfig would, with another wait
for the node. Adapt it, and then this test.`

	kubelet := foreign.Parse(t, "k8s.io/kubernetes/pkg/kubelet")
	want := []string{"NewPodConfig", "NewSourceApiserver", "NewSourceFile", "NewSourceURL"}
	if got := kubelet.Calls(kubelet.Func(t, "makePodSourceConfig", advice), "config"); !slices.Equal(got, want) {
		t.Errorf("it calls %v, want %v.%s", got, want, advice)
	}
	host := kubelet.Text(t, kubelet.Func(t, "kubeletVolumeHost.GetNodeLabels", advice))
	if !strings.Contains(host, "kvh.kubelet.GetNode(") {
		t.Errorf("a volume plugin's host no longer asks the kubelet for its node.%s", advice)
	}
	sources := foreign.Parse(t, "k8s.io/kubernetes/pkg/kubelet/config")
	if text := sources.Text(t, sources.Func(t, "NewSourceApiserver", advice)); !strings.Contains(text, "time.Sleep(WaitForAPIServerSyncPeriod)") {
		t.Errorf("the source of the API no longer sleeps until the node is known.%s", advice)
	}
}
