package house

import (
	"go/ast"
	"path/filepath"
	"testing"
)

// leaksUnchecked are the folders in and below which tests may leave goroutines behind, each with the reason.
var leaksUnchecked = map[string]string{
	"scripts/e2e": "the nodes that tests share run until the program ends, and so does what follows them; harness.Main clears up",
}

// Goroutines that outlive their test are the first sign of a component that does not stop.
func TestPackagesCheckForLeakedGoroutines(t *testing.T) {
	tested, checked, used := map[string]bool{}, map[string]bool{}, map[string]bool{}
	for _, s := range sources(t) {
		if !s.test {
			continue
		}
		tested[s.dir] = true
		for _, decl := range s.file.Decls {
			f, ok := decl.(*ast.FuncDecl)
			if !ok || f.Recv != nil || f.Name.Name != "TestMain" {
				continue
			}
			if filepath.Base(s.path) != "main_test.go" {
				t.Errorf("%s has TestMain: move it to main_test.go, where it is in every package", s.path)
			}
			checked[s.dir] = calls(f, "goleak", "VerifyTestMain")
		}
	}
	for dir := range tested {
		above := dir
		for ; above != "." && leaksUnchecked[above] == ""; above = filepath.Dir(above) {
		}
		used[above] = true
		switch excepted := above != "."; {
		case !excepted && !checked[dir]:
			t.Errorf(`%[1]s has tests, and nothing sees whether they leave goroutines behind: write %[1]s/main_test.go with
	func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
or say in leaksUnchecked why not`, dir)
		case excepted && checked[dir]:
			t.Errorf("%s is checked for goroutines: take %s out of leaksUnchecked", dir, above)
		}
	}
	for dir := range leaksUnchecked {
		if !used[dir] {
			t.Errorf("there are no tests in %s: take it out of leaksUnchecked", dir)
		}
	}
}

// calls says whether the function calls that one of the named package.
func calls(f *ast.FuncDecl, pkg, name string) bool {
	found := false
	ast.Inspect(f, func(n ast.Node) bool {
		if sel, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == pkg && sel.Sel.Name == name {
				found = true
			}
		}
		return !found
	})
	return found
}
