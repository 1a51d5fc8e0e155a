package appliance

import (
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the files of testdata; look at the difference before committing it")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || string(want) != got {
		t.Errorf("%s differs (%v); look at it and run the test with -update:\n%s", path, err, Diff(want, []byte(got)))
	}
}

func TestServices(t *testing.T) {
	s := newService([]string{"/usr/local/bin/kedge", "server"}, "/etc/kedge/service.env")
	golden(t, "kedge.service", s.Systemd(257))
	golden(t, "kedge-older-systemd.service", s.Systemd(252))
	golden(t, "kedge.openrc", s.OpenRC())
	golden(t, "kedge.confd", s.OpenRCSettings())
	odd := newService([]string{"/opt/my bin/kedge", "agent", "--config=/etc/a$b%c/\"x'y"}, "/etc/my dir/service.env")
	golden(t, "odd.service", odd.Systemd(257))
	golden(t, "odd.openrc", odd.OpenRC())
}

// TestOpenRCWords: what the init script says means what the description says, in a shell.
func TestOpenRCWords(t *testing.T) {
	shell, err := exec.LookPath("sh")
	if err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	environment := filepath.Join(dir, "my env")
	proxy := `http://u:p$1"\` + "`x`" + `@h:1`
	if err := os.WriteFile(environment, environmentFile(nil, []string{"HTTPS_PROXY=" + proxy}), 0o600); err != nil {
		t.Fatal(err)
	}
	s := newService([]string{"/opt/my bin/kedge", "agent", `--config=/etc/a$b%c/"x'y`}, environment)
	script := filepath.Join(dir, "kedge")
	if err := os.WriteFile(script, []byte(s.OpenRC()), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(shell, "-c", `RC_SVCNAME=kedge; . "$0"; start_pre; eval printf "'%s\n'" $command $command_args; printf '%s\n' "$HTTPS_PROXY"`, script).CombinedOutput()
	want := "/opt/my bin/kedge\nagent\n--config=/etc/a$b%c/\"x'y\n--log\n/var/log/kedge.log\n" + proxy + "\n"
	if err != nil || string(out) != want {
		t.Errorf("%v\n%s--- want\n%s", err, out, want)
	}
}

func TestEnvironmentFile(t *testing.T) {
	caller := []string{"PATH=/bin", "KEDGE_TOKEN=x", "HTTPS_PROXY=http://proxy:3128", "no_proxy=a,b", "HTTP_PROXY="}
	got := string(environmentFile(nil, caller))
	if !strings.Contains(got, "HTTPS_PROXY=\"http://proxy:3128\"\nno_proxy=\"a,b\"\n") || strings.Contains(got, "KEDGE") || strings.Contains(got, "HTTP_PROXY=\"\"") {
		t.Errorf("%s", got)
	}
	if again := environmentFile([]byte(got), caller); string(again) != got {
		t.Errorf("changed: %s", again)
	}
	if kept := environmentFile([]byte("# mine\nGOGC=50\nHTTPS_PROXY=\"http://old\"\nX=1"), caller); string(kept) != "# mine\nGOGC=50\nHTTPS_PROXY=\"http://proxy:3128\"\nX=1\nno_proxy=\"a,b\"\n" {
		t.Errorf("%s", kept)
	}
	if kept := environmentFile([]byte(got), nil); string(kept) != got {
		t.Errorf("without variables: %s", kept)
	}
	if none := environmentFile(nil, []string{"PATH=/bin"}); len(none) > 0 {
		t.Errorf("%s", none)
	}
}

func TestSystemdState(t *testing.T) {
	for text, want := range map[string]ServiceState{
		"ActiveState=activating\nUnitFileState=enabled\nExecMainStatus=1\n": {Enabled: true, Active: true, Code: 1},
		"ActiveState=failed\nUnitFileState=disabled\nExecMainStatus=78\n":   {Failed: true, Code: 78},
		"ActiveState=inactive\nUnitFileState=\nExecMainStatus=0\n":          {},
	} {
		if got := systemdState(text); got != want {
			t.Errorf("%q: %+v", text, got)
		}
	}
}

func TestLastError(t *testing.T) {
	log := "kedge: old\ntime=1 level=INFO\nkedge: this machine cannot run kedge\n  ports: 6443 is used; stop it\n\nkedge.service: Main process exited\n"
	if got, want := lastError(log), "this machine cannot run kedge\n  ports: 6443 is used; stop it"; got != want {
		t.Errorf("%q", got)
	}
	if got := lastError("time=1 msg=\"x kedge: y\"\n"); got != "" {
		t.Errorf("%q", got)
	}
}
