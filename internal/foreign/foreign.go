// Package foreign reads the source of packages of other modules, at the version that
// ours is built with. Tests compare it with what kedge believes about it where the
// compiler does not: above all what is reached through go:linkname.
//
// It is no part of the product. Tests may import it.
package foreign

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

// Text is how the source has a node.
func (s Source) Text(t testing.TB, n ast.Node) string {
	t.Helper()
	var b strings.Builder
	if err := printer.Fprint(&b, s.Set, n); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// Func finds a function by its name, or a method as "Type.Name", whether of the type or of
// a pointer to it. It ends the test where there is none, with the advice.
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

// Calls are the functions of another package, by the name that it is imported under, that
// are called below n, each once.
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

// Variables are the package's own, by name.
func (s Source) Variables() map[string]Variable {
	out := map[string]Variable{}
	for _, file := range s.Files {
		for _, decl := range file.Decls {
			d, ok := decl.(*ast.GenDecl)
			if !ok || d.Tok != token.VAR {
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

// Variable is one of a package. Either is nil where the source does not have it.
type Variable struct {
	Type, Value ast.Expr
}
