package appliance

import (
	"bytes"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// TestInstallWithSystemd walks through the life of an installation on a machine with systemd that is the test's own:
// scripts/systemd-machine.sh has one. It leaves nothing of kedge on it.
func TestInstallWithSystemd(t *testing.T) {
	s := onSystemdMachine(t)
	// The machine has a unit, and a link, that "kedge install" did not write.
	if out := s.kedge(78, "install", "server"); !strings.Contains(out, "give --force to replace it") {
		t.Errorf("a foreign file: %s", out)
	}
	out := s.kedge(0, "install", "server", "--force", "--node-label=a=b", "--wait=20m")
	if !strings.Contains(out, "is ready:\n  /usr/local/bin/kedge kubectl get nodes\n") || !strings.Contains(out, "kedge token create") {
		t.Errorf("it prints\n%s", out)
	}
	if config, err := os.ReadFile("/etc/kedge/config.yaml"); err != nil || string(config) != "node-label:\n  - a=b\n" {
		t.Errorf("the configuration is %q, %v", config, err)
	}
	s.kedge(0, "kubectl", "wait", "--for=condition=Ready", "--all", "nodes", "--timeout=1s")
	if env, err := os.ReadFile("/etc/kedge/service.env"); err != nil || !strings.Contains(string(env), "HTTPS_PROXY=\"http://192.0.2.1:3128\"\n") {
		t.Errorf("the environment is %q, %v", env, err)
	}
	if got := s.systemctl("is-enabled"); got != "enabled" {
		t.Errorf("the service is %s", got)
	}
	pid := s.property("MainPID")
	s.kedge(0, "install", "server")
	if now := s.property("MainPID"); now != pid {
		t.Errorf("the process was %s and is %s: an installation without changes restarts kedge", pid, now)
	}
	s.change()
	s.permanentMistake()
	s.kedge(0, "kubectl", "create", "namespace", "kept")
	if out := s.kedge(0, "uninstall"); !strings.HasSuffix(out, "kedge is removed\n") {
		t.Errorf("uninstall: %s", out)
	}
	for _, path := range []string{"/usr/local/bin/kedge", "/usr/local/bin/kubectl", "/etc/systemd/system/kedge.service", "/run/kedge"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
	s.kedge(0, "install", "server", "--wait=20m")
	s.kedge(0, "kubectl", "get", "namespace", "kept")
	if out := s.kedge(0, "uninstall", "--purge"); !strings.HasSuffix(out, "kedge is removed\n") {
		t.Errorf("uninstall: %s", out)
	}
	for _, path := range []string{"/usr/local/bin/kedge", "/etc/kedge", "/var/lib/kedge", "/run/kedge"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left after --purge", path)
		}
	}
}

type systemdMachine struct{ *testing.T }

// onSystemdMachine skips the test on other machines than those of scripts/systemd-machine.sh.
func onSystemdMachine(t *testing.T) systemdMachine {
	t.Helper()
	if _, err := os.Stat("/run/systemd/system"); err != nil {
		harness.SkipLacking(t, "this machine is not run by systemd")
	}
	if _, err := os.Stat("/kedge/run"); err != nil {
		harness.SkipLacking(t, "this machine is not one of scripts/systemd-machine.sh, and the test changes it")
	}
	return systemdMachine{t}
}

// neverUsed fails if kedge has been used on the machine.
func (s systemdMachine) neverUsed() {
	s.Helper()
	for _, path := range []string{"/etc/kedge", "/var/lib/kedge", "/run/kedge", "/usr/local/bin/kedge", "/etc/systemd/system/kedge.service"} {
		if _, err := os.Lstat(path); err == nil {
			s.Fatalf("%s exists: kedge has been used on this machine", path)
		}
	}
}

// kedge runs the executable under test, which is not the installed one.
func (s systemdMachine) kedge(want int, args ...string) string {
	s.Helper()
	begin := time.Now()
	cmd := exec.Command(harness.Binary(), args...)
	cmd.Env = append(os.Environ(), "HTTPS_PROXY=http://192.0.2.1:3128")
	out, err := cmd.CombinedOutput()
	if cmd.ProcessState.ExitCode() != want {
		journal, _ := exec.Command("journalctl", "-u", "kedge", "--no-pager", "-n", "30").CombinedOutput()
		s.Fatalf("kedge %s: %v\n%s\n%s", strings.Join(args, " "), err, out, journal)
	}
	s.Logf("kedge %s took %s:\n%s", strings.Join(args, " "), time.Since(begin).Round(time.Second), out)
	return string(out)
}

func (s systemdMachine) systemctl(args ...string) string {
	out, _ := exec.Command("systemctl", append(args, "kedge")...).CombinedOutput()
	return strings.TrimSpace(string(out))
}

func (s systemdMachine) property(name string) string {
	return strings.TrimPrefix(s.systemctl("show", "--property="+name), name+"=")
}

// change: a new setting and a newer executable restart kedge once, and comments of the user stay.
func (s systemdMachine) change() {
	s.Helper()
	const config = "/etc/kedge/config.yaml"
	before, err := os.ReadFile(config)
	if err != nil {
		s.Fatal(err)
	}
	if err := os.WriteFile(config, append([]byte("# of the user\n"), before...), 0o600); err != nil {
		s.Fatal(err)
	}
	pid := s.property("MainPID")
	out := s.kedge(0, "install", "server", "--write-kubeconfig-mode=640", "--wait=20m")
	if now := s.property("MainPID"); now == pid || len(regexp.MustCompile(`(?m)restart the service kedge$`).FindAllString(out, -1)) != 1 {
		s.Errorf("the process was %s and is %s:\n%s", pid, now, out)
	}
	after, err := os.ReadFile(config)
	if want := "# of the user\n" + string(before) + "write-kubeconfig-mode: 640\n"; err != nil || string(after) != want {
		s.Errorf("%v: the configuration is\n%s", err, after)
	}
	if st, err := os.Stat("/etc/kedge/kedge.yaml"); err != nil || st.Mode().Perm() != 0o640 {
		s.Errorf("the setting has no effect: %v, %v", st, err)
	}
}

// permanentMistake: a mistake that a restart cannot correct ends the service at once, and the reason is shown.
func (s systemdMachine) permanentMistake() {
	s.Helper()
	dropin := "/etc/kedge/config.yaml.d/mistake.yaml"
	if err := os.MkdirAll(filepath.Dir(dropin), 0o755); err != nil {
		s.Fatal(err)
	}
	if err := os.WriteFile(dropin, []byte("flannel-backend: vxlna\n"), 0o600); err != nil {
		s.Fatal(err)
	}
	s.systemctl("restart")
	harness.Eventually(s.T, time.Minute, func() error {
		if s.property("ActiveState") != "failed" {
			return os.ErrDeadlineExceeded
		}
		return nil
	})
	if code, restarts := s.property("ExecMainStatus"), s.property("NRestarts"); code != "78" || restarts != "0" {
		s.Errorf("exit code %s, %s restarts", code, restarts)
	}
	if err := os.RemoveAll(filepath.Dir(dropin)); err != nil {
		s.Fatal(err)
	}
	s.kedge(0, "install", "server", "--wait=20m") // starts it again
}

// importedByKedge puts the image of the pods where kedge imports it from. It is a small one: the machine is slow.
func (s systemdMachine) importedByKedge() {
	s.Helper()
	box, err := image.NewBusybox(harness.Busybox)
	if err == nil {
		box.Files["/bin/probe"], err = harness.BuiltProgram("probe")
	}
	const folder = "/var/lib/kedge/images"
	if err == nil {
		err = os.MkdirAll(folder, 0o755)
	}
	if err == nil {
		err = image.WriteFile(filepath.Join(folder, "images.tar"), image.Docker, box)
	}
	if err != nil {
		s.Fatal(err)
	}
}

// must runs a program of the machine.
func (s systemdMachine) must(name string, args ...string) string {
	s.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		s.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// apply applies a manifest.
func (s systemdMachine) apply(manifest string) {
	s.Helper()
	file := filepath.Join(s.TempDir(), "manifest.yaml")
	if err := os.WriteFile(file, []byte(manifest), 0o600); err != nil {
		s.Fatal(err)
	}
	s.kedge(0, "kubectl", "apply", "-f", file)
}

// pod creates a pod that is started again after killall.
func (s systemdMachine) pod(manifest string) {
	s.Helper()
	s.apply(strings.Replace(manifest, "restartPolicy: Never", "restartPolicy: Always", 1))
}

// address is the machine's address in its network.
func (s systemdMachine) address() string {
	s.Helper()
	conn, err := net.Dial("udp4", "192.0.2.1:9") // sends nothing
	if err != nil {
		s.Fatal(err)
	}
	defer conn.Close()
	return conn.LocalAddr().(*net.UDPAddr).IP.String()
}

// podsAnswer fails if a pod does not reach another by the name of its service, or the machine a pod.
func (s systemdMachine) podsAnswer() {
	s.Helper()
	s.kedge(0, "kubectl", "wait", "--for=condition=Ready", "pod/web", "pod/client", "--timeout=10m")
	harness.Eventually(s.T, 30*time.Second, func() error {
		return harness.CheckAnswer("http://"+net.JoinHostPort(s.address(), "8093")+"/", "from a pod")
	})
	if out := s.kedge(0, "kubectl", "exec", "client", "--", "probe", "get", "http://web/"); out != "from a pod\n" {
		s.Errorf("the service answers a pod %q", out)
	}
}

// containers are the containers of all pods.
func (s systemdMachine) containers() string {
	s.Helper()
	return s.kedge(0, "kubectl", "get", "pods", "-A", "-o", "jsonpath={range .items[*]}{.metadata.name} {.status.podIP} {.status.containerStatuses[*].containerID} {.status.containerStatuses[*].restartCount}{\"\\n\"}{end}")
}

// TestUpgradeWithSystemd: upgrades of a service: to a good version and back, and to versions that a restart cannot help, that
// panic and that hang. kedge runs after each of them.
func TestUpgradeWithSystemd(t *testing.T) {
	s := onSystemdMachine(t)
	s.kedge(0, "install", "server", "--force", "--wait=20m")
	program, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	good := s.program("good", otherVersion(program, "good"))
	begin := time.Now()
	out := s.kedge(0, "upgrade", "--file="+good, "--wait=20m")
	if !strings.Contains(out, "upgraded to ") || !s.installed(good) {
		t.Errorf("a good version: %s", out)
	}
	t.Logf("an upgrade took %s", time.Since(begin).Round(time.Second))
	for _, tc := range []struct {
		fault        fault
		wait, reason string
	}{
		{fault{Fault: "config"}, "20m", "exit code 78"},
		{fault{Fault: "panic"}, "20m", "did not become healthy in 3 starts"},
		{fault{Fault: "hang"}, "30s", "nothing has changed for 30s"},
	} {
		tc.fault.Real, tc.fault.DataDir = harness.Binary(), "/var/lib/kedge"
		out := s.kedge(1, "upgrade", "--file="+s.program(tc.fault.Fault, tc.fault.executable(t)), "--wait="+tc.wait)
		if !strings.Contains(out, "was undone") || !strings.Contains(out, tc.reason) || !s.installed(good) {
			t.Errorf("%s: %s", tc.fault.Fault, out)
		}
		if state := s.property("ActiveState"); state != "active" {
			t.Errorf("%s: the service is %s", tc.fault.Fault, state)
		}
		s.kedge(0, "kubectl", "wait", "--for=condition=Ready", "--all", "nodes", "--timeout=1m")
	}
	if out := s.kedge(0, "upgrade", "rollback", "--wait=20m"); !strings.Contains(out, "upgraded to ") || !s.installed(harness.Binary()) {
		t.Errorf("rollback: %s", out)
	}
	out = s.kedge(0, "upgrade", "ls")
	if strings.Count(out, " upgraded ") != 2 || strings.Count(out, " went back ") != 3 {
		t.Errorf("the list:\n%s", out)
	}
	s.kedge(0, "uninstall", "--purge")
}

// program puts an executable on the machine.
func (s systemdMachine) program(name string, data []byte) string {
	s.Helper()
	path := filepath.Join(s.TempDir(), name)
	if err := os.WriteFile(path, data, 0o755); err != nil {
		s.Fatal(err)
	}
	return path
}

// installed reports whether the installed executable is equal to a file.
func (s systemdMachine) installed(path string) bool {
	s.Helper()
	want, err := os.ReadFile(path)
	if err != nil {
		s.Fatal(err)
	}
	got, err := os.ReadFile("/usr/local/bin/kedge")
	if err != nil {
		s.Fatal(err)
	}
	return bytes.Equal(got, want)
}
