// Package house holds the project's own rules as tests: who may import whom,
// that every package says what it is for, and how long a file may be. Each
// failure says what to do. It has no code besides tests.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// floors are the rules of imports inside the module: a package below a key may
// import ours only below its values. "internal" may import "internal".
var floors = map[string]struct {
	may []string
	why string
}{
	"server":    {[]string{"server", "datastore", "internal"}, "the control plane must run without a node"},
	"agent":     {[]string{"agent", "runtime", "network", "dns", "internal"}, "a node must run without a control plane"},
	"datastore": {[]string{"datastore", "internal"}, "a craft knows no other craft"},
	"runtime":   {[]string{"runtime", "internal"}, "a craft knows no other craft"},
	"network":   {[]string{"network", "internal"}, "a craft knows no other craft"},
	"dns":       {[]string{"dns", "internal"}, "a craft knows no other craft"},
	"internal":  {[]string{"internal"}, "the cellar carries the house and rests on nothing of it"},
	"launcher":  {[]string{"network", "internal"}, "the launcher must stay small: of the crafts it knows the plug-in's client only"},
	"scripts":   {[]string{"scripts", "internal"}, "scripts use the executable from outside"},
}

// rooms are packages that may import less of ours than their floor: only what is named
// and what is below it. docs/architecture.md has them too. Those of server and agent are
// all here, since what they import their tests link.
var rooms = map[string][]string{
	"server/arguments":         {"internal/componentflags"},
	"server/bootstrap":         {},
	"server/claims":            {},
	"server/cutoff":            {"internal"},
	"server/directory":         {"internal"},
	"server/identity":          {"datastore", "server/bootstrap", "internal"},
	"server/join":              {"internal"},
	"server/loopback":          {"internal"},
	"server/servicelb":         {"internal"},
	"server/tunnels":           {"internal"},
	"agent/mounter":            {"internal"},
	"agent/stalesocket":        {"internal"},
	"agent/uplink":             {"internal"},
	"datastore/hook":           {"datastore", "internal"},
	"launcher":                 {"network/cniclient", "internal"},
	"internal/calls":           {"internal/linkcast"},
	"internal/lifecycle":       {},
	"internal/linkcast":        {},
	"internal/machines/keeper": {},
	"internal/tunnel":          {},
}

// maxLines is how long a file may be; aim for half of it.
const maxLines = 1000

type source struct {
	path string // from the module's root
	dir  string
	test bool
	file *ast.File
	n    int
}

func sources(t *testing.T) []source {
	t.Helper()
	var out []source
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(root, path)
		if d.IsDir() {
			if name := d.Name(); rel != "." && (strings.HasPrefix(name, ".") || name == "build" || name == "bin" || name == "testdata") {
				return filepath.SkipDir
			}
			// A module of its own is no part of the house: scripts/bench/plain is
			// the Kubernetes that ours is measured against.
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && rel != "." {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(fset, path, data, parser.ParseComments)
		if err != nil {
			return err
		}
		out = append(out, source{path: rel, dir: filepath.Dir(rel), test: strings.HasSuffix(path, "_test.go"), file: f, n: strings.Count(string(data), "\n")})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 50 {
		t.Fatalf("found only %d source files: the test looks in the wrong place", len(out))
	}
	return out
}

func imports(s source) []string {
	var out []string
	for _, i := range s.file.Imports {
		out = append(out, strings.Trim(i.Path.Value, `"`))
	}
	return out
}

func TestImportsPointDownwards(t *testing.T) {
	for _, s := range sources(t) {
		floor, _, _ := strings.Cut(s.path, "/")
		rule, ok := floors[floor]
		if !ok {
			continue // package main
		}
		for _, imp := range imports(s) {
			ours, ok := strings.CutPrefix(imp, "kedge/")
			if !ok {
				if imp == "kedge" {
					t.Errorf("%s imports package main", s.path)
				}
				continue
			}
			to, _, _ := strings.Cut(ours, "/")
			if !slices.Contains(rule.may, to) {
				t.Errorf("%s imports %s: %s; take what you need as an argument, or declare an interface", s.path, imp, rule.why)
			}
		}
	}
}

func TestRoomsImportWhatTheyMay(t *testing.T) {
	found := map[string]bool{}
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		found[s.dir] = true
		may, ok := rooms[s.dir]
		if floor, _, below := strings.Cut(s.dir, "/"); !ok && below && (floor == "server" || floor == "agent") {
			t.Errorf("%s: say in rooms, and in docs/architecture.md, what package %s may import", s.path, s.dir)
		}
		if !ok {
			continue
		}
		for _, imp := range imports(s) {
			ours, ok := strings.CutPrefix(imp, "kedge/")
			if ok && !slices.ContainsFunc(may, func(m string) bool { return ours == m || strings.HasPrefix(ours, m+"/") }) {
				t.Errorf("%s imports %s, and may import of ours only %v; take what you need as an argument, or change the rule in rooms and in docs/architecture.md", s.path, imp, may)
			}
		}
	}
	for dir := range rooms {
		if !found[dir] {
			t.Errorf("there is no package %s: take it out of rooms", dir)
		}
	}
}

// A bump of Kubernetes should touch a handful of files that are easy to find.
func TestComponentsAreEmbeddedInMarkedFiles(t *testing.T) {
	for _, s := range sources(t) {
		marked := strings.HasPrefix(filepath.Base(s.path), "embed_") && (s.dir == "server" || s.dir == "agent" || s.dir == "network/proxy")
		for _, imp := range imports(s) {
			if strings.HasPrefix(imp, "k8s.io/kubernetes/") && !marked {
				t.Errorf("%s imports %s: only embed_*.go in server, agent and network/proxy may; move the use there", s.path, imp)
			}
		}
	}
}

// Tests in these packages would each link the components, 15 seconds a time.
func TestHeavyPackagesHaveNoTests(t *testing.T) {
	for _, s := range sources(t) {
		if s.test && (s.dir == "server" || s.dir == "agent") {
			t.Errorf("%s: its test binary would link all of Kubernetes; move what it tests into a package of its own", s.path)
		}
	}
}

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	doc := map[string]string{}
	for _, s := range sources(t) {
		if _, ok := doc[s.dir]; !ok {
			doc[s.dir] = ""
		}
		if s.file.Doc != nil {
			doc[s.dir] += s.file.Doc.Text()
		}
	}
	for dir, text := range doc {
		if len(text) < 80 {
			t.Errorf("package %s: its comment should say what it is for, what it is not for, and who may import it", dir)
		}
	}
}

func TestFilesAreShort(t *testing.T) {
	for _, s := range sources(t) {
		if s.n > maxLines {
			t.Errorf("%s has %d lines: split it, one main type a file; the limit is %d", s.path, s.n, maxLines)
		}
	}
}

func TestNoGrabBags(t *testing.T) {
	for _, s := range sources(t) {
		switch name := s.file.Name.Name; name {
		case "util", "utils", "common", "types", "helpers", "misc", "pkg":
			t.Errorf("%s: package %s says nothing about what is in it; name it for what it does", s.path, name)
		}
	}
}

// Only main ends the process, so that everything else can be stopped in order.
func TestOnlyMainExits(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || s.file.Name.Name == "main" || s.dir == "internal/testhost" { // re-executes test binaries
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if x, ok := sel.X.(*ast.Ident); ok && (x.Name == "os" && sel.Sel.Name == "Exit" || x.Name == "log" && strings.HasPrefix(sel.Sel.Name, "Fatal")) {
				t.Errorf("%s ends the process with %s.%s: return an error instead", s.path, x.Name, sel.Sel.Name)
			}
			return true
		})
	}
}

// A figure beside that of other versions says nothing.
func TestPlainCompositionHasOurVersions(t *testing.T) {
	ours, theirs := versions(t, root+"/go.mod"), versions(t, root+"/scripts/bench/plain/go.mod")
	for name, v := range ours {
		if w, ok := theirs[name]; ok && v != w {
			t.Errorf("scripts/bench/plain/go.mod has %s %s, and go.mod has %s: copy the require and replace lines of ours into it; make bench-plain says what is still missing", name, w, v)
		}
	}
	for _, name := range []string{"k8s.io/kubernetes", "k8s.io/apiserver =>", "github.com/containerd/containerd/v2", "go.etcd.io/etcd/server/v3"} {
		if ours[name] == "" || theirs[name] == "" {
			t.Errorf("%s is in only one of go.mod and scripts/bench/plain/go.mod", name)
		}
	}
}

// versions reads the require and replace lines of a go.mod.
func versions(t *testing.T, path string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for line := range strings.Lines(string(data)) {
		switch f := strings.Fields(line); {
		case len(f) >= 4 && f[1] == "=>":
			out[f[0]+" =>"] = f[2] + " " + f[3]
		case len(f) >= 2 && strings.HasPrefix(f[1], "v"):
			out[f[0]] = f[1]
		}
	}
	return out
}
