package house

import (
	"go/ast"
	"go/token"
	"maps"
	"slices"
	"strings"
	"testing"

	"kedge/internal/test/upstream"
)

// TestVolumesMatchUpstream compares what agent/embed_volumes.go believes about upstream's
// CSI plugin with its source: the linker compares neither names nor types, and whatever
// else the plugin came to keep in variables would be lost when another server leads.
func TestVolumesMatchUpstream(t *testing.T) {
	const advice = `

agent/embed_volumes.go saves and restores the variables in which the CSI plugin keeps the kubelet's node, one of them
through go:linkname. Look at the plugin's Init in this Kubernetes: whatever it sets must be given back after the
controllers were built, or must not be set by a host that is no kubelet. Adapt Volumes.Build, and then this test.`

	plugin := upstream.Parse(t, "k8s.io/kubernetes/pkg/volume/csi")
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

	roles := upstream.Parse(t, "k8s.io/kubernetes/pkg/registry/rbac/rest")
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
	classes := upstream.Parse(t, "k8s.io/kubernetes/pkg/registry/scheduling/rest")
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

	kubelet := upstream.Parse(t, "k8s.io/kubernetes/pkg/kubelet")
	want := []string{"NewPodConfig", "NewSourceApiserver", "NewSourceFile", "NewSourceURL"}
	if got := kubelet.Calls(kubelet.Func(t, "makePodSourceConfig", advice), "config"); !slices.Equal(got, want) {
		t.Errorf("it calls %v, want %v.%s", got, want, advice)
	}
	host := kubelet.Text(t, kubelet.Func(t, "kubeletVolumeHost.GetNodeLabels", advice))
	if !strings.Contains(host, "kvh.kubelet.GetNode(") {
		t.Errorf("a volume plugin's host no longer asks the kubelet for its node.%s", advice)
	}
	sources := upstream.Parse(t, "k8s.io/kubernetes/pkg/kubelet/config")
	if text := sources.Text(t, sources.Func(t, "NewSourceApiserver", advice)); !strings.Contains(text, "time.Sleep(WaitForAPIServerSyncPeriod)") {
		t.Errorf("the source of the API no longer sleeps until the node is known.%s", advice)
	}
}

// TestVolumeManagerMatchesUpstream compares agent/embed_volumewait.go, which runs the loops of the kubelet's volume manager
// with other times, with these loops.
func TestVolumeManagerMatchesUpstream(t *testing.T) {
	const advice = `

agent/embed_volumewait.go calls the passes of upstream's two loops through go:linkname, lets upstream's Run do what comes
before its loop, and then ends that. If upstream wakes its loops itself now, take ours out; else adapt it, and then this test.`

	const path = "k8s.io/kubernetes/pkg/kubelet/volumemanager"
	for _, loop := range []struct{ in, run, pass, signature, before, until string }{
		{"/populator", "desiredStateOfWorldPopulator.Run", "desiredStateOfWorldPopulator.populatorLoop", "func(ctx context.Context)",
			"dswp.hasAddedPods = true", "wait.UntilWithContext(ctx, dswp.populatorLoop, dswp.loopSleepDuration)\n}"},
		{"/reconciler", "reconciler.Run", "reconciler.reconcile", "func(ctx context.Context)",
			"rc.reconstructVolumes(logger)", "wait.Until(func() { rc.reconcile(ctx) }, rc.loopSleepDuration, stopCh)\n}"},
	} {
		source := upstream.Parse(t, path+loop.in)
		pass := source.Func(t, loop.pass, advice)
		if got := source.Text(t, pass.Type); got != loop.signature {
			t.Errorf("%s is a %s, want a %s.%s", loop.pass, got, loop.signature, advice)
		}
		if _, pointer := pass.Recv.List[0].Type.(*ast.StarExpr); !pointer {
			t.Errorf("%s is no method of a pointer.%s", loop.pass, advice)
		}
		run := source.Text(t, source.Func(t, loop.run, advice))
		if !strings.Contains(run, loop.before) || !strings.HasSuffix(run, loop.until) {
			t.Errorf("%s does not run %q and at last %q.%s", loop.run, loop.before, loop.until, advice)
		}
	}
	manager := upstream.Parse(t, path)
	constants := manager.Constants()
	for name, expr := range map[string]string{
		"reconcilerLoopSleepPeriod": "100 * time.Millisecond", "desiredStateOfWorldPopulatorLoopSleepPeriod": "100 * time.Millisecond",
		"podAttachAndMountRetryInterval": "300 * time.Millisecond",
	} {
		if c := constants[name]; c.Value == nil || manager.Text(t, c.Value) != expr {
			t.Errorf("%s is no longer %s.%s", name, expr, advice)
		}
	}
}

// TestNodeAuthorizerMatchesUpstream finds the reason by which server/nodeauthz knows that the node authorizer may lag.
func TestNodeAuthorizerMatchesUpstream(t *testing.T) {
	const advice = `

server/nodeauthz waits where the node authorizer gives this reason, so that a kubelet that is faster than the authorizer
is not refused. Look at what the authorizer says in this Kubernetes, and adapt the constant.`

	source := upstream.Parse(t, "k8s.io/kubernetes/plugin/pkg/auth/authorizer/node")
	for _, name := range []string{"NodeAuthorizer.authorize", "NodeAuthorizer.authorizeCreateToken"} {
		if text := source.Text(t, source.Func(t, name, advice)); !strings.Contains(text, "no relationship found between node") {
			t.Errorf("%s has another reason.%s", name, advice)
		}
	}
}

// TestGoAwayMatchesUpstream finds the variable that server/embed_stop.go sets.
func TestGoAwayMatchesUpstream(t *testing.T) {
	source := upstream.Parse(t, "golang.org/x/net/http2")
	if v := source.Variables()["goAwayTimeout"]; v.Value == nil || source.Text(t, v.Value) != "1 * time.Second" {
		t.Error(`golang.org/x/net/http2 no longer has the variable goAwayTimeout of a second.

server/embed_stop.go sets it through go:linkname, so that an API server does not stop for a second. Look at how connections are closed
now after the announcement of their end (RegisterOnShutdown, shutDownIn), and adapt it, and then this test.`)
	}
}
