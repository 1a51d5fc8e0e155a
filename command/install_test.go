package command

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kedge/appliance"
	"kedge/internal/errorkind"
	"kedge/preflight"
	"kedge/settings"
)

// installation is a command line that installs a server below a folder, and changes nothing.
func installation(dir, role string, more ...string) []string {
	return append([]string{"install", role, "--dry-run", "--bin-dir=" + dir + "/bin", "--config=" + dir + "/etc/config.yaml", "--data-dir=" + dir + "/data", "--run-dir=" + dir + "/run"}, more...)
}

// TestInstallPlan: what is given goes into the configuration file, from flags and variables, except for the token.
func TestInstallPlan(t *testing.T) {
	root(t)
	dir := t.TempDir()
	p := newProgram()
	p.results = []preflight.Result{{Check: "memory", Level: preflight.Warning, Message: "little", Remedy: "add some"}, {Check: "links", Level: preflight.OK}}
	t.Setenv("KEDGE_NODE_NAME", "n1")
	t.Setenv("KEDGE_TOKEN", "a very secret text")
	t.Chdir(dir)
	code, out, errOut := p.run(installation(dir, "server", "--node-label=a=b,c=d", "--node-label=e=f", "--debug", "--kubelet-arg=v=1,2", "--resolv-conf=r.conf")...)
	if code != 0 || p.node == nil || p.node.Role != settings.Server || !strings.Contains(errOut, "kedge: warning: memory: little; add some\n") {
		t.Fatalf("%d: %s", code, errOut)
	}
	want := "  +node-name: n1\n"
	for _, text := range []string{
		"write " + dir + "/etc/config.yaml\n  +data-dir: " + dir + "/data\n", want,
		"  +debug: true\n", "  +node-label:\n  +  - a=b\n  +  - c=d\n  +  - e=f\n", "  +kubelet-arg:\n  +  - v=1,2\n", "  +resolv-conf: " + dir + "/r.conf\n",
		"  +token-file: " + dir + "/etc/token\n", "write " + dir + "/etc/token\n",
	} {
		if !strings.Contains(out, text) {
			t.Errorf("no %q in\n%s", text, out)
		}
	}
	if strings.Contains(out+errOut, "secret") {
		t.Errorf("the token is shown:\n%s", out)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("changed: %v, %v", names, err)
	}
}

// TestInstallRefuses: nothing is touched if the machine or a setting is wrong.
func TestInstallRefuses(t *testing.T) {
	root(t)
	dir := t.TempDir()
	p := newProgram()
	p.checked = errorkind.Permanent(errors.New("this machine cannot run kedge"))
	line := slices.DeleteFunc(installation(dir, "server"), func(a string) bool { return a == "--dry-run" })
	if code, _, errOut := p.run(line...); code != errorkind.ExitConfig || !strings.Contains(errOut, "this machine cannot run kedge") {
		t.Errorf("%d: %s", code, errOut)
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) > 0 {
		t.Errorf("changed: %v, %v", names, err)
	}
	p.checked = nil
	// A drop-in has precedence over the file into which settings go.
	dropin := filepath.Join(dir, "etc", "config.yaml.d", "a.yaml")
	if err := errors.Join(os.MkdirAll(filepath.Dir(dropin), 0o755), os.WriteFile(dropin, []byte("# x\nnode-name: other\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := p.run(installation(dir, "agent", "--node-name=n1")...); code != errorkind.ExitConfig || errOut != "kedge: "+dropin+":2 sets node-name too, with precedence over "+dir+"/etc/config.yaml; change it there\n" {
		t.Errorf("%d: %s", code, errOut)
	}
	if code, _, errOut := p.run(installation(dir, "agent", "--node-name=other")...); code != 0 {
		t.Errorf("the same value: %d: %s", code, errOut)
	}
	if code, _, errOut := p.run("install", "server", "--dry-run", "--config=/dev/null"); code != errorkind.ExitUsage || !strings.Contains(errOut, "--config: an installation needs a configuration file") {
		t.Errorf("%d: %s", code, errOut)
	}
}

// TestUninstallWithoutInstallation: nothing is killed or removed where nothing was installed.
func TestUninstallWithoutInstallation(t *testing.T) {
	root(t)
	p := newProgram()
	p.KillAll = func(context.Context, Node) error { t.Error("containers are killed"); return nil }
	dir := t.TempDir()
	code, _, errOut := p.run("uninstall", "--purge", "--config=/dev/null", "--data-dir="+dir)
	if want := "kedge: kedge was not installed by \"kedge install\": " + dir + "/install.json does not exist; "; code != errorkind.ExitConfig || !strings.HasPrefix(errOut, want) {
		t.Errorf("%d: %s", code, errOut)
	}
}

// TestInstallOtherRole: an installation of the other role is refused before its settings are found to be wrong.
func TestInstallOtherRole(t *testing.T) {
	root(t)
	dir := t.TempDir()
	for path, text := range map[string]string{"etc/config.yaml": "https-listen-port: 7443\n", "data/install.json": `{"format": 1, "role": "server", "dataDir": "` + dir + `/data", "runDir": "` + dir + `/run", "config": "` + dir + `/etc/config.yaml"}`} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(filepath.Join(dir, path)), 0o755), os.WriteFile(filepath.Join(dir, path), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	p := newProgram()
	if code, _, errOut := p.run(installation(dir, "agent", "--server=https://192.0.2.1:6443", "--token=x")...); code != errorkind.ExitConfig || !strings.Contains(errOut, "cannot become an agent; \"kedge uninstall --purge\" removes it with its data") {
		t.Errorf("%d: %s", code, errOut)
	}
	// Settings that an agent does not have are mistakes otherwise.
	if err := os.Remove(filepath.Join(dir, "data", "install.json")); err != nil {
		t.Fatal(err)
	}
	if code, _, errOut := p.run(installation(dir, "agent")...); code != errorkind.ExitConfig || !strings.Contains(errOut, "unknown key \"https-listen-port\"") {
		t.Errorf("%d: %s", code, errOut)
	}
}

func TestShowProgress(t *testing.T) {
	var out bytes.Buffer
	show, erase := showProgress(&out)
	for _, p := range []appliance.Progress{{}, {}, {Component: "api", Ready: 1, Total: 3}, {Component: "api", Ready: 2, Total: 3}, {Component: "kubelet", Ready: 2, Total: 3, Detail: "no network"}} {
		show(p, true)
		show(p, false)
	}
	erase()
	if want := "kedge: waiting for kedge to start\nkedge: waiting for api (1 of 3 components ready)\nkedge: waiting for kubelet (2 of 3 components ready): no network\n"; out.String() != want {
		t.Errorf("%s", out.String())
	}
}
