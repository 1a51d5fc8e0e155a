// Package upstream reads the source of packages of other modules, at the version that
// kedge is built with. Tests compare kedge's assumptions about that source with it, where
// the compiler does not: above all the targets of go:linkname.
//
// Only tests may import it.
package upstream

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

// Source is a package without its tests.
type Source struct {
	Set   *token.FileSet
	Files []*ast.File
}

// Parse reads a package by its import path. It needs the go command.
func Parse(t testing.TB, path string) Source {
	t.Helper()
	out, err := exec.Command("go", "list", "-f", "{{.Dir}}", path).Output()
	if err != nil {
		t.Fatalf("find the source of %s: %v", path, err)
	}
	names, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	s := Source{Set: token.NewFileSet()}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(s.Set, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		s.Files = append(s.Files, file)
	}
	if len(s.Files) == 0 {
		t.Fatalf("the package %s has no source", path)
	}
	return s
}

// Text returns the text of a node.
func (s Source) Text(t testing.TB, n ast.Node) string {
	t.Helper()
	var b strings.Builder
	if err := printer.Fprint(&b, s.Set, n); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Func finds a function by its name, or a method by "Type.Name", for the type or a pointer to it.
// If there is none, it fails the test with the advice.
func (s Source) Func(t testing.TB, name, advice string) *ast.FuncDecl {
	t.Helper()
	for _, file := range s.Files {
		for _, decl := range file.Decls {
			d, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			full := d.Name.Name
			if d.Recv != nil {
				full = strings.TrimPrefix(s.Text(t, d.Recv.List[0].Type), "*") + "." + full
			}
			if full == name {
				return d
			}
		}
	}
	t.Fatalf("there is no %s.%s", name, advice)
	return nil
}

// Calls returns the functions of another package that are called below n, each once. pkg is the
// name under which that package is imported.
func (s Source) Calls(n ast.Node, pkg string) []string {
	found := map[string]bool{}
	ast.Inspect(n, func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			if f, ok := call.Fun.(*ast.SelectorExpr); ok {
				if x, ok := f.X.(*ast.Ident); ok && x.Name == pkg {
					found[f.Sel.Name] = true
				}
			}
		}
		return true
	})
	return slices.Sorted(maps.Keys(found))
}

// Variables returns the package's variables by name.
func (s Source) Variables() map[string]Variable { return s.values(token.VAR) }

// Constants returns the package's constants by name.
func (s Source) Constants() map[string]Variable { return s.values(token.CONST) }

func (s Source) values(of token.Token) map[string]Variable {
	out := map[string]Variable{}
	for _, file := range s.Files {
		for _, decl := range file.Decls {
			d, ok := decl.(*ast.GenDecl)
			if !ok || d.Tok != of {
				continue
			}
			for _, spec := range d.Specs {
				v := spec.(*ast.ValueSpec)
				for i, name := range v.Names {
					found := Variable{Type: v.Type}
					if len(v.Values) == len(v.Names) {
						found.Value = v.Values[i]
					}
					out[name.Name] = found
				}
			}
		}
	}
	return out
}

// Variable is a variable or a constant of a package. Type and Value are nil where the source
// lacks them.
type Variable struct {
	Type, Value ast.Expr
}
