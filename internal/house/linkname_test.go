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
	var initialise *ast.FuncDecl
	for _, file := range plugin.Files {
		for _, decl := range file.Decls {
			if d, ok := decl.(*ast.FuncDecl); ok && d.Name.Name == "Init" && d.Recv != nil && plugin.Text(t, d.Recv.List[0].Type) == "*csiPlugin" {
				initialise = d
			}
		}
	}
	if initialise == nil {
		t.Fatalf("the plugin has no Init.%s", advice)
	}
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
