package house

import (
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestVolumesMatchUpstream compares what agent/embed_volumes.go believes about upstream's
// CSI plugin with its source: the linker compares neither names nor types, and whatever
// else the plugin came to keep in variables would be lost when another server leads.
func TestVolumesMatchUpstream(t *testing.T) {
	const advice = `

agent/embed_volumes.go saves and restores the variables in which the CSI plugin keeps the kubelet's node, one of them
through go:linkname. Look at the plugin's Init in this Kubernetes: whatever it sets must be given back after the
controllers were built, or must not be set by a host that is no kubelet. Adapt Volumes.Build, and then this test.`

	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", "k8s.io/kubernetes/pkg/volume/csi").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	set := token.NewFileSet()
	text := func(n ast.Node) string {
		var b strings.Builder
		if err := printer.Fprint(&b, set, n); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	variables := map[string]string{} // of the package: type, or value where it has none
	var initialise *ast.FuncDecl
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, decl := range file.Decls {
			switch d := decl.(type) {
			case *ast.FuncDecl:
				if d.Name.Name == "Init" && d.Recv != nil && text(d.Recv.List[0].Type) == "*csiPlugin" {
					initialise = d
				}
			case *ast.GenDecl:
				if d.Tok != token.VAR {
					continue
				}
				for _, spec := range d.Specs {
					v := spec.(*ast.ValueSpec)
					for i, name := range v.Names {
						switch {
						case v.Type != nil:
							variables[name.Name] = text(v.Type)
						case i < len(v.Values):
							variables[name.Name] = text(v.Values[i])
						}
					}
				}
			}
		}
	}
	for name, want := range map[string]string{"nim": "nodeinfomanager.Interface", "PluginHandler": "&RegistrationHandler{}"} {
		if variables[name] != want {
			t.Errorf("the variable %s is %q, want %q.%s", name, variables[name], want, advice)
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
			root, _, _ := strings.Cut(text(left), ".")
			if _, ours := variables[root]; ours {
				assigned[text(left)] = true
			}
		}
		return true
	})
	if got, want := slices.Sorted(maps.Keys(assigned)), []string{"PluginHandler.csiPlugin", "nim"}; !slices.Equal(got, want) {
		t.Errorf("Init sets %v, want %v.%s", got, want, advice)
	}
}
