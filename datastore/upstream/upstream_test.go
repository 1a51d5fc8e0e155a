package upstream

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

const apiserver = "k8s.io/apiserver"

// TestStorageSuites runs the tests of two packages of k8s.io/apiserver from a copy of that module in which one file
// differs: the one that starts etcd for all of the tests. The copy stays in build/upstream-storage, to read or to run by
// hand.
//
// With -race the suites run under the race detector too. Do that once for every new version of etcd, because messages cross
// between client and server by pointer.
func TestStorageSuites(t *testing.T) {
	if testing.Short() {
		t.Skip("takes minutes")
	}
	root := goList(t, "", ".")
	build := filepath.Join(root, "build", "upstream-storage")
	prepare(t, root, build)

	for _, suite := range []struct {
		name string
		// atLeast is the number of tests in the package when this was written. A smaller number means that some did not
		// run or that upstream has removed some: find out which before you lower it.
		atLeast int
	}{
		{"pkg/storage/etcd3", 70},
		{"pkg/storage/cacher", 135},
	} {
		t.Run(filepath.Base(suite.name), func(t *testing.T) {
			run(t, root, build, apiserver+"/"+suite.name, suite.atLeast)
		})
	}
}

// prepare makes the copy, and a go.mod that replaces the original with it.
func prepare(t *testing.T, root, build string) {
	t.Helper()
	module := goList(t, root, apiserver)
	tree := filepath.Join(build, "apiserver")
	server, err := os.ReadFile("testdata/test_server.go.txt")
	if err != nil {
		t.Fatal(err)
	}
	replaced := filepath.Join(tree, "pkg/storage/etcd3/testserver/test_server.go")
	for _, step := range []func() error{
		func() error { return os.RemoveAll(build) },
		func() error { return os.MkdirAll(build, 0o755) },
		func() error { return os.CopyFS(tree, os.DirFS(module)) },
		func() error {
			// If upstream had moved the file, the suites would run on a real etcd and prove nothing.
			if _, err := os.Stat(replaced); err != nil {
				return err
			}
			// The copy is read-only like the module cache.
			if err := os.Remove(replaced); err != nil {
				return err
			}
			return os.WriteFile(replaced, server, 0o644)
		},
		func() error { return copyFile(filepath.Join(root, "go.mod"), filepath.Join(build, "go.mod")) },
		func() error { return copyFile(filepath.Join(root, "go.sum"), filepath.Join(build, "go.sum")) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	edit := exec.Command("go", "mod", "edit", "-replace", apiserver+"="+tree, filepath.Join(build, "go.mod"))
	if out, err := edit.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", edit, err, out)
	}
}

// run runs the tests of one package, and fails with the output of those that failed.
//
// Some of these tests wait only 150 ms for an event, on stores that all sync to one disk, so a few may fail on a busy machine.
// Up to three failed tests are run once more, alone.
func run(t *testing.T, root, build, pkg string, atLeast int) {
	t.Helper()
	passed, failed := goTest(t, root, build, pkg, ".")
	if _, whole := failed[""]; !whole && len(failed) > 0 && len(failed) <= 3 {
		var names []string
		for name, output := range failed {
			t.Logf("%s %s failed, trying again:\n%s", pkg, name, output)
			names = append(names, name)
		}
		var again int
		again, failed = goTest(t, root, build, pkg, "^("+strings.Join(names, "|")+")$")
		passed += again
	}
	for name, output := range failed {
		t.Errorf("%s %s:\n%s", pkg, name, output)
	}
	if passed < atLeast {
		t.Errorf("%s: only %d tests passed, it has at least %d", pkg, passed, atLeast)
	}
	t.Logf("%s: %d tests passed", pkg, passed)
}

// goTest returns the number of passed tests, and the output of each failed one by name. The name "" stands for a failure of
// the package itself.
func goTest(t *testing.T, root, build, pkg, pattern string) (passed int, failed map[string]string) {
	t.Helper()
	args := []string{"test", "-json", "-count=1", "-timeout=20m", "-run=" + pattern, "-modfile=" + filepath.Join(build, "go.mod")}
	if raceDetector {
		args = append(args, "-race")
	}
	command := exec.Command("go", append(args, pkg)...)
	command.Dir = root
	var stderr bytes.Buffer
	command.Stderr = &stderr
	stdout, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal(err)
	}

	failed = map[string]string{}
	output := map[string]*strings.Builder{} // by test, and "" for the package
	for events := json.NewDecoder(stdout); ; {
		// See go doc test2json.
		var event struct{ Action, Test, Output string }
		if err := events.Decode(&event); err != nil {
			if err != io.EOF {
				t.Errorf("read the test output: %v", err)
			}
			break
		}
		if output[event.Test] == nil {
			output[event.Test] = &strings.Builder{}
		}
		output[event.Test].WriteString(event.Output)
		top, _, sub := strings.Cut(event.Test, "/")
		switch event.Action {
		case "pass":
			if top != "" && !sub {
				passed++
			}
			delete(output, event.Test)
		case "skip":
			delete(output, event.Test)
		case "fail":
			if top != "" {
				failed[top] += output[event.Test].String()
			}
		}
	}
	if err := command.Wait(); err != nil && len(failed) == 0 {
		failed[""] = fmt.Sprintf("%v: %v\n%s%s", command, err, output[""], &stderr)
	}
	return passed, failed
}

// goList returns the directory of a module, or of the main module for ".".
func goList(t *testing.T, dir, module string) string {
	t.Helper()
	args := []string{"list", "-m", "-f", "{{.Dir}}"}
	if module != "." {
		args = append(args, module)
	}
	command := exec.Command("go", args...)
	command.Dir = dir
	out, err := command.Output()
	if err != nil {
		t.Fatalf("%v: %v", command, err)
	}
	return strings.TrimSpace(string(out))
}

func copyFile(from, to string) error {
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, content, 0o644)
}
