package command

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kedge/settings"
)

// tinyLauncher builds a small program that calls itself the launcher of kedge.
func tinyLauncher(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "launcher"), 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"go.mod": "module kedge\n", "launcher/main.go": "package main\n\nfunc main() {}\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command("go", "build", "-ldflags=-s -w", "-o", "kedge", "./launcher")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	return filepath.Join(dir, "kedge")
}

// bundleDir is the current folder with a bundle.yaml, and a program that is the executable of kedge.
func bundleDir(t *testing.T, text string) *program {
	t.Helper()
	root(t)
	p := newProgram()
	p.Launcher = tinyLauncher(t)
	t.Chdir(t.TempDir())
	for name, text := range map[string]string{
		"bundle.yaml": text, "app.yaml": "apiVersion: v1\nkind: Pod\nmetadata: {name: p}\nspec: {containers: [{name: c, image: busybox}]}\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func TestBundleCommands(t *testing.T) {
	p := bundleDir(t, "manifests: [app.yaml]\nconfig:\n  node-label: [a=b]\n")
	code, out, errOut := p.run("bundle", "create", "-o", "b")
	if code != 0 || !strings.HasSuffix(out, "with 0 images, 1 manifest and 0 charts\n") || !strings.Contains(errOut, "the manifests need the image docker.io/library/busybox:latest, which the bundle does not have") {
		t.Fatalf("create: exit code %d, %q, %q", code, out, errOut)
	}
	if code, out, _ := p.run("bundle", "inspect", "b"); code != 0 || !strings.Contains(out, "made by kedge v1\nnot signed\n") || !strings.Contains(out, "manifest    001-app.yaml") || !strings.HasSuffix(out, "settings:\n  node-label: [a=b]\n") {
		t.Errorf("inspect: exit code %d, %q", code, out)
	}
	if code, out, errOut := p.run("bundle", "verify", "b"); code != 0 || out != "b: every byte is as it was written\n" {
		t.Errorf("verify: exit code %d, %q, %q", code, out, errOut)
	}
	if code, _, errOut := p.run("bundle", "extract", "b", "x"); code != 0 {
		t.Errorf("extract: exit code %d, %q", code, errOut)
	}
	if text, err := os.ReadFile("x/config.yaml"); err != nil || string(text) != "node-label: [a=b]\n" {
		t.Errorf("extracted %q, %v", text, err)
	}
	if code, out, _ := p.run("bundle", "images", "app.yaml"); code != 0 || out != "docker.io/library/busybox:latest\n" {
		t.Errorf("images: exit code %d, %q", code, out)
	}
	if code, out, errOut := p.run("bundle", "diff", "b", "b", "-o", "d"); code != 0 {
		t.Errorf("diff: exit code %d, %q, %q", code, out, errOut)
	}
	for _, test := range []struct {
		line string
		code int
		want string
	}{
		{"create", 2, "name the file to write with --output"},
		{"create -o o --multi-arch", 2, "--multi-arch needs an executable for each architecture"},
		{"create -o o --executable a --executable b", 2, "give --multi-arch"},
		{"create -o o -f none", 78, "none: no such file"},
		{"create -o o --sign-key app.yaml", 78, "not the secret key of minisign"},
		{"images", 2, "give at least one file or folder"},
		{"inspect", 2, "give FILE"},
		{"inspect app.yaml", 1, "is not a bundle"},
		{"verify " + p.Launcher, 78, "the executable of kedge alone"},
		{"extract b x", 78, "x exists"},
		{"diff b", 2, "give OLD NEW"},
		{"diff b b", 2, "name the file to write with --output"},
		{"diff b b -o b", 2, "name another file"},
		{"diff b d -o e", 78, "has only what is new itself"},
		{"brew", 2, "unknown command"},
	} {
		code, _, errOut := p.run(append([]string{"bundle"}, strings.Fields(test.line)...)...)
		if code != test.code || !strings.Contains(errOut, test.want) {
			t.Errorf("bundle %s: exit code %d, %q", test.line, code, errOut)
		}
	}
	if _, err := os.Lstat("o"); err == nil {
		t.Error("a refused bundle was written")
	}
}

// TestBundleReplacesNoSource: an output does not replace what the bundle is made of.
func TestBundleReplacesNoSource(t *testing.T) {
	p := bundleDir(t, "manifests: [app.yaml]\n")
	if err := os.Symlink("app.yaml", "link"); err != nil {
		t.Fatal(err)
	}
	for _, out := range []string{"app.yaml", "bundle.yaml", "./link"} {
		before, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		if code, _, errOut := p.run("bundle", "create", "-o", out); code != 2 || !strings.Contains(errOut, "which the bundle is made of") {
			t.Errorf("%s: exit code %d, %q", out, code, errOut)
		}
		if after, err := os.ReadFile(out); err != nil || string(after) != string(before) {
			t.Errorf("%s has changed: %v", out, err)
		}
	}
}

func TestBundleSettingsAreChecked(t *testing.T) {
	for text, want := range map[string]string{
		"config: {nodelabel: [a=b]}\n":        "bundle.yaml, config:1: unknown key \"nodelabel\"; did you mean \"node-label\"?",
		"config: {token: secret}\n":           "token cannot be in a bundle",
		"config: {run-dir: here}\n":           "not an absolute path",
		"config: {https-listen-port: many}\n": "https-listen-port",
	} {
		p := bundleDir(t, text)
		if code, _, errOut := p.run("bundle", "create", "-o", "b"); code != 78 || !strings.Contains(errOut, want) {
			t.Errorf("%q: exit code %d, %q", text, code, errOut)
		}
	}
}

// TestInstallTakesSettingsOfTheBundle: the bundle's settings are defaults, below those of files, variables and flags, and
// those of the other role are left out.
func TestInstallTakesSettingsOfTheBundle(t *testing.T) {
	p := bundleDir(t, "config:\n  node-label: [from=bundle]\n  https-listen-port: 7443\n  kubelet-port: 10350\n  run-dir: /run/of-bundle\n")
	if code, _, errOut := p.run("bundle", "create", "-o", "b"); code != 0 {
		t.Fatalf("create: %q", errOut)
	}
	plain := p.Launcher
	p.Launcher, _ = filepath.Abs("b")
	dir, _ := filepath.Abs(".")
	if err := os.WriteFile("config.yaml", []byte("kubelet-port: 10351\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	install := func(role string, more ...string) (code int, out, errOut string) {
		return p.run(append([]string{"install", role, "--dry-run", "--data-dir=" + dir + "/data", "--config=" + dir + "/config.yaml", "--bin-dir=" + dir + "/bin"}, more...)...)
	}
	code, out, errOut := install("server", "--https-listen-port=8443")
	if code != 0 {
		t.Fatalf("exit code %d, %q", code, errOut)
	}
	for _, text := range []string{"copy 0 images, 0 manifests and 0 charts of the bundle into " + dir + "/data", "copy " + dir + "/b to " + dir + "/bin/kedge\n", "+node-label:\n", "- from=bundle\n", "+https-listen-port: 8443\n", "+run-dir: /run/of-bundle\n"} {
		if !strings.Contains(out, text) {
			t.Errorf("the plan lacks %q:\n%s", text, out)
		}
	}
	if strings.Contains(out, "7443") || strings.Contains(out, "10350") {
		t.Errorf("the plan has settings of the bundle that were made elsewhere:\n%s", out)
	}
	if port := settings.KubeletPort.In(p.node.Values); port != 10351 {
		t.Errorf("kubelet port %d", port)
	}
	if code, out, errOut := install("agent", "--server=https://192.0.2.1:6443", "--token=x"); code != 0 || strings.Contains(out, "7443") || !strings.Contains(out, "- from=bundle\n") {
		t.Errorf("an agent: exit code %d, %q, %q", code, out, errOut)
	}
	// The same from outside.
	p.Launcher = plain
	if code, out, errOut := install("server", "--bundle=b"); code != 0 || !strings.Contains(out, "+https-listen-port: 7443\n") || !strings.Contains(out, "copy b to "+dir+"/bin/kedge\n") {
		t.Errorf("--bundle: exit code %d, %q, %q", code, out, errOut)
	}
	if code, _, errOut := install("server", "--bundle="+plain); code != 78 || !strings.Contains(errOut, "without a bundle") {
		t.Errorf("--bundle without one: exit code %d, %q", code, errOut)
	}
	data, err := os.ReadFile("b")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile("b", data[:len(data)-1], 0o755); err != nil {
		t.Fatal(err)
	}
	p.Launcher = filepath.Join(dir, "b")
	if code, _, errOut := install("server"); code != 1 || !strings.Contains(errOut, "its end is missing; copy it again") {
		t.Errorf("cut off: exit code %d, %q", code, errOut)
	}
}
