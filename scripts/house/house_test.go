// Package house has the project's rules as tests: the imports of each package, the comment of
// each package, the length of files, and others. Each failure says what to do. The package has
// no code besides tests.
package house

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const root = "../.."

// floors has the rules of imports inside the module, by folder: packages in a folder may import
// only packages in the listed folders. The longest matching folder counts.
var floors = map[string]struct {
	may []string
	why string
}{
	"command":   {[]string{"command", "settings", "preflight", "appliance", "throwaway", "network", "server", "internal"}, "a command calls what Program has, so that its tests link no component"},
	"settings":  {[]string{"settings", "internal"}, "a setting is known without the part that it is for"},
	"assembly":  {[]string{"assembly", "settings", "preflight", "appliance", "server", "agent", "datastore", "runtime", "network", "dns", "launcher", "internal"}, "a command starts the process, and the process is put together without it"},
	"server":    {[]string{"server", "datastore", "internal"}, "the control plane must run without a node"},
	"agent":     {[]string{"agent", "runtime", "network", "dns", "internal"}, "a node must run without a control plane"},
	"datastore": {[]string{"datastore", "internal"}, "datastore, runtime, network and dns do not import each other"},
	"runtime":   {[]string{"runtime", "internal"}, "datastore, runtime, network and dns do not import each other"},
	"network":   {[]string{"network", "internal"}, "datastore, runtime, network and dns do not import each other"},
	"dns":       {[]string{"dns", "internal"}, "datastore, runtime, network and dns do not import each other"},
	"preflight": {[]string{"preflight", "internal"}, "a machine is checked before anything runs on it"},
	"appliance": {[]string{"appliance", "preflight", "launcher", "internal"}, "the machine is cared for while its node does not run, so without the node's parts"},
	"throwaway": {[]string{"throwaway", "internal"}, "a throwaway cluster runs the executable, and imports nothing of it"},
	"internal":  {[]string{"internal"}, "packages below internal are used by all others, and import only each other"},
	"launcher":  {[]string{"launcher", "network", "throwaway", "internal"}, "the launcher must stay small: besides internal packages it has only the client of the network plug-in and the supervisor of machines"},
	"scripts":   {[]string{"scripts", "launcher", "throwaway", "appliance", "internal"}, "scripts build the executable and run it"},

	"internal/test": {[]string{"internal", "throwaway"}, "test helpers are for all packages, and import only the networks of throwaway clusters besides internal packages"},
}

// rooms has packages that may import less than their folder in floors: only the listed packages
// and those below them. docs/architecture.md has them too. All packages below server and agent
// are listed, because their tests link everything that they import.
var rooms = map[string][]string{
	"server/accountkeys":           {"server/identity", "server/peerrequests", "internal"},
	"server/arguments":             {"internal/componentflags", "internal/errorkind"},
	"server/bootstrap":             {},
	"server/claims":                {"internal/nodeaddr"},
	"server/customkinds":           {},
	"server/cutoff":                {"internal"},
	"server/directory":             {"internal"},
	"server/expiring":              {},
	"server/identity":              {"datastore", "server/bootstrap", "internal"},
	"server/importk3s":             {"datastore", "internal"},
	"server/join":                  {"internal"},
	"server/kubeconfigs":           {"internal"},
	"server/loopback":              {"internal"},
	"server/manifests":             {"internal"},
	"server/metricsplit":           {},
	"server/membership":            {"datastore", "server/directory", "server/identity", "server/join", "server/loopback", "internal"},
	"server/nodeauthz":             {},
	"server/peerrequests":          {"internal/joining"},
	"server/secretsencryption":     {"server/identity", "server/peerrequests", "internal"},
	"server/servicelb":             {"internal"},
	"server/witness":               {"datastore", "internal"},
	"server/snapshots":             {"datastore", "server/identity", "server/snapshots", "internal"},
	"server/snapshots/archive":     {"internal/atomicfile"},
	"server/snapshots/objects":     {"server/customkinds", "server/snapshots", "internal"},
	"server/snapshots/s3":          {"server/snapshots/s3server", "internal"},
	"server/snapshots/s3server":    {"internal"},
	"server/snapshots/survivor":    {"internal/atomicfile"},
	"server/tunnels":               {"internal"},
	"appliance":                    {"appliance", "preflight", "launcher/bootguard", "internal"},
	"appliance/parameters":         {"internal/atomicfile"},
	"appliance/release":            {"internal"},
	"appliance/bundle":             {"appliance/release", "internal"},
	"assembly/proxyenv":            {},
	"appliance/doctor":             {"preflight", "internal"},
	"appliance/remote":             {"appliance", "launcher/bootguard", "internal"},
	"appliance/upgrades":           {"appliance", "internal"},
	"appliance/support":            {"appliance/doctor", "internal"},
	"agent/checkpoints":            {"internal"},
	"agent/hostpaths":              {"internal"},
	"agent/mounter":                {"internal"},
	"agent/nodeobject":             {"internal"},
	"agent/uplink":                 {"internal"},
	"agent/watches":                {"internal/informertrim"},
	"datastore/blockrecorder":      {},
	"datastore/external":           {"datastore", "internal"},
	"datastore/hook":               {"datastore", "internal"},
	"datastore/integrity":          {"internal/atomicfile"},
	"datastore/peers":              {"internal/atomicfile", "internal/beacon", "internal/lifecycle"},
	"network/nft":                  {"internal"},
	"network/nft/pods":             {"network/nft", "network/trace", "internal"},
	"network/nft/policies":         {"network/nft", "internal"},
	"network/nft/services":         {"network/nft", "network/trace", "internal"},
	"network/trace":                {},
	"runtime/unexported":           {},
	"launcher/packedprogram":       {"internal"},
	"launcher/bootguard":           {"internal"},
	"launcher":                     {"launcher/bootguard", "launcher/packedprogram", "network/cniclient", "throwaway/machine/supervisor", "internal"},
	"internal/beacon":              {"internal/lifecycle"},
	"internal/errorkind":           {},
	"internal/kernelnet":           {"internal/lifecycle"},
	"internal/lifecycle":           {},
	"internal/namespaces":          {},
	"internal/tunnel":              {},
	"internal/unixsocket":          {},
	"throwaway/kubeconfig":         {"internal"},
	"throwaway/lan":                {"internal"},
	"throwaway/machine":            {"throwaway/lan", "throwaway/machine/supervisor", "internal"},
	"throwaway/machine/supervisor": {},
}

// maxLines bounds the lines of a file; aim for half of it.
const maxLines = 1000

type source struct {
	path string // from the module's root
	dir  string
	test bool
	file *ast.File
	n    int
	set  *token.FileSet // has the positions in file
}

func (s source) line(p token.Pos) int { return s.set.Position(p).Line }

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
		out = append(out, source{path: rel, dir: filepath.Dir(rel), test: strings.HasSuffix(path, "_test.go"), file: f, n: strings.Count(string(data), "\n"), set: fset})
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
		rule, ok := floors[floorOf(s.dir)]
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

// floorOf is the longest key of floors that is dir or above it; empty for package main.
func floorOf(dir string) string {
	for ; dir != "."; dir = filepath.Dir(dir) {
		if _, ok := floors[dir]; ok {
			return dir
		}
	}
	return ""
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

// Test helpers skip and fail tests, break networks, and need programs of this machine.
func TestOnlyTestsImportTestHelpers(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || strings.HasPrefix(s.dir, "internal/test/") || strings.HasPrefix(s.dir, "scripts/") {
			continue
		}
		for _, imp := range imports(s) {
			if strings.HasPrefix(imp, "kedge/internal/test/") {
				t.Errorf("%s imports %s: only tests and scripts may; move what the product needs out of internal/test", s.path, imp)
			}
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

// What stores snapshots elsewhere has one way to do it, with limits of time and memory.
func TestOnePackageSpeaksS3(t *testing.T) {
	for _, s := range sources(t) {
		for _, imp := range imports(s) {
			if strings.HasPrefix(imp, "github.com/minio/minio-go/") && s.dir != "server/snapshots/s3" {
				t.Errorf("%s imports %s: only server/snapshots/s3 may; use its Bucket", s.path, imp)
			}
		}
	}
}

// Tests in these packages would each link the components, 15 seconds a time.
func TestHeavyPackagesHaveNoTests(t *testing.T) {
	for _, s := range sources(t) {
		if s.test && (s.dir == "server" || s.dir == "agent" || s.dir == "assembly" || s.dir == ".") {
			t.Errorf("%s: its test binary would link all of Kubernetes; move what it tests into a package of its own", s.path)
		}
	}
}

// The front door is one file: what it opens has rooms.
func TestMainIsOneFile(t *testing.T) {
	for _, s := range sources(t) {
		if s.dir == "." && s.path != "main.go" {
			t.Errorf("%s: commands are in command/, settings in settings/, and what puts kedge together is in assembly/", s.path)
		}
	}
}

// Their tests are run at every change.
func TestCommandsAndSettingsLinkNoComponent(t *testing.T) {
	for _, pkg := range []string{"kedge/command", "kedge/settings"} {
		out, err := exec.Command("go", "list", "-deps", pkg).Output()
		if err != nil {
			t.Fatalf("list what %s links: %v", pkg, err)
		}
		for dep := range strings.FieldsSeq(string(out)) {
			if strings.HasPrefix(dep, "k8s.io/kubernetes/") || strings.HasPrefix(dep, "github.com/containerd/containerd/v2/") || strings.HasPrefix(dep, "k8s.io/kubectl/") {
				t.Errorf("%s links %s: take what needs it as a function of command.Program, and fill that in main.go", pkg, dep)
				break
			}
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

// maxFunction bounds the lines of a function of the product.
const maxFunction = 80

func TestFunctionsAreShort(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || strings.HasPrefix(s.dir, "scripts/") || strings.HasPrefix(s.dir, "internal/test/") {
			continue
		}
		for _, d := range s.file.Decls {
			f, ok := d.(*ast.FuncDecl)
			if !ok {
				continue
			}
			if n := s.line(f.End()) - s.line(f.Pos()) + 1; n > maxFunction {
				t.Errorf("%s: function %s has %d lines: give each of its phases a function whose name says what the phase does; the limit is %d", s.path, f.Name.Name, n, maxFunction)
			}
		}
	}
}

func TestNoGrabBags(t *testing.T) {
	for _, s := range sources(t) {
		switch name := s.file.Name.Name; name {
		case "util", "utils", "common", "types", "helpers", "misc", "pkg":
			t.Errorf("%s: the name of package %s does not describe its content; name it for what it does", s.path, name)
		}
	}
}

// maxInternal bounds the packages below internal: a reader has to know them all.
const maxInternal = 30

func TestInternalHasFewPackages(t *testing.T) {
	below := map[string]bool{}
	for _, s := range sources(t) {
		if strings.HasPrefix(s.dir, "internal/") {
			below[s.dir] = true
		}
	}
	if len(below) >= maxInternal {
		t.Errorf("internal has %d packages, and should have fewer than %d: put code with one user into its user's folder; put a small package into the package that has its subject, if both remain one thing with a name that explains itself; give a part of the product, such as preflight, a folder of its own beside internal", len(below), maxInternal)
	}
}

// Only main ends the process, so that everything else can be stopped in order.
func TestOnlyMainExits(t *testing.T) {
	for _, s := range sources(t) {
		// The two packages belong to test programs: one re-executes them, the other clears up after a signal.
		if s.test || s.file.Name.Name == "main" || s.dir == "internal/test/host" || s.dir == "scripts/e2e/harness" {
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

// A channel that holds one request looks the same as others, and the select that fills it is easily written wrongly.
func TestWakeupsAreOfOneType(t *testing.T) {
	for _, s := range sources(t) {
		if s.test || strings.HasPrefix(s.dir, "scripts/") || s.dir == "internal/lifecycle" {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectStmt)
			if !ok || len(sel.Body.List) != 2 {
				return true
			}
			sends, nothing := false, false
			for _, c := range sel.Body.List {
				if c := c.(*ast.CommClause); len(c.Body) == 0 {
					send, is := c.Comm.(*ast.SendStmt)
					if is {
						_, is = send.Value.(*ast.CompositeLit)
					}
					sends, nothing = sends || is, nothing || c.Comm == nil
				}
			}
			if sends && nothing {
				t.Errorf("%s:%d: a goroutine is woken by hand: make the channel a lifecycle.Wakeup and call Wake", s.path, s.line(sel.Pos()))
			}
			return true
		})
	}
}

// retired are words that names in the code had, and that a reader had to guess the meaning of. CONTRIBUTING.md has the
// field's words.
var retired = map[string]string{
	"reign": "term", "crown": "elected", "regard": "checksPerTimeout", "splice": "loopbackProxy", "strangers": "unknownPeers, or anonymous",
	"bury": "reap", "courtesy": "gracePeriod", "greeted": "announced", "moves": "what changes: addresses", "asked": "requests", "said": "claimed, or told",
	"hurry": "wakeUntil, or fast", "poke": "what is requested: requestWrite", "giveup": "fatal, fail, or timeout", "notours": "foreign", "letgo": "removeFinalizer",
	"promptly": "installPromptVolumes", "whileitlasts": "attemptTransport", "nowhere": "unreachableURL", "asides": "damagedDirs", "lookevery": "renewInterval",
	"startafresh": "resetProcess", "stayinside": "exemptFromProxy", "bringback": "restoreImages", "owed": "failed",
}

func TestRetiredWordsStayOut(t *testing.T) {
	for _, s := range sources(t) {
		if s.test {
			continue
		}
		ast.Inspect(s.file, func(n ast.Node) bool {
			if id, ok := n.(*ast.Ident); ok {
				if now, old := retired[strings.ToLower(id.Name)]; old {
					t.Errorf("%s: the name %s is retired: call it for what it is (%s); CONTRIBUTING.md has the words", s.path, id.Name, now)
				}
			}
			return true
		})
	}
}

// What kedge imports itself is said apart from what comes with it.
func TestDirectRequirementsAreMarkedSo(t *testing.T) {
	data, err := os.ReadFile(root + "/go.mod")
	if err != nil {
		t.Fatal(err)
	}
	direct, indirect := map[string]bool{}, map[string]bool{}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(strings.TrimPrefix(line, "require "))
		if len(f) >= 2 && strings.HasPrefix(f[1], "v") {
			direct[f[0]], indirect[f[0]] = !strings.Contains(line, "// indirect"), strings.Contains(line, "// indirect")
		}
	}
	// The longest module path that an import begins with is its module.
	moduleOf := func(imp string) string {
		for path := imp; path != "." && path != "/"; path = filepath.Dir(path) {
			if direct[path] || indirect[path] {
				return path
			}
		}
		return ""
	}
	told := map[string]bool{}
	for _, s := range sources(t) {
		for _, imp := range imports(s) {
			if m := moduleOf(imp); indirect[m] && !told[m] {
				told[m] = true
				t.Errorf("%s imports %s, and go.mod says that %s is indirect: run go mod tidy", s.path, imp, m)
			}
		}
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
