package appliance

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kedge/internal/joining"
)

// services is a service manager in memory, with the files of systemd.
type services struct {
	state ServiceState
	calls []string
	fail  error
}

func (s *services) Name() string { return "systemd" }
func (s *services) Files(d Service) []File {
	return []File{{Path: "/etc/systemd/system/kedge.service", Data: []byte(d.Systemd(257)), Mode: 0o644, Restarts: true, Remedy: "keep changes in a drop-in"}}
}
func (s *services) State(context.Context) (ServiceState, error) { return s.state, nil }
func (s *services) call(name string, change func()) error {
	if s.fail != nil {
		return s.fail
	}
	s.calls = append(s.calls, name)
	change()
	return nil
}
func (s *services) Reload(context.Context) error { return s.call("reload", func() {}) }
func (s *services) Enable(context.Context) error {
	return s.call("enable", func() { s.state.Enabled = true })
}
func (s *services) Disable(context.Context) error {
	return s.call("disable", func() { s.state.Enabled = false })
}
func (s *services) Restart(context.Context) error {
	return s.call("restart", func() { s.state.Active = true })
}
func (s *services) Stop(context.Context) error {
	return s.call("stop", func() { s.state.Active = false })
}
func (s *services) LastWords(context.Context) string { return "" }
func (s *services) LogCommand() string               { return "" }

// newMachine is an empty machine below a folder, and an installation of a server on it.
func newMachine(t *testing.T) (Machine, *services, Install) {
	t.Helper()
	dir := t.TempDir()
	program := filepath.Join(dir, "downloaded")
	if err := os.WriteFile(program, []byte("program 1"), 0o755); err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "root")
	for _, d := range []string{"usr/local/bin", "etc/systemd/system", "var/lib", "usr/share/bash-completion/completions"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	boot := filepath.Join(root, "proc/sys/kernel/random/boot_id")
	if err := errors.Join(os.MkdirAll(filepath.Dir(boot), 0o755), os.WriteFile(boot, []byte("a boot\n"), 0o444)); err != nil {
		t.Fatal(err)
	}
	s := &services{}
	t.Setenv("PATH", "/usr/local/bin")
	return Machine{Root: root, Manager: s, Say: func(string) {}}, s, Install{
		Role: "server", Version: "v1", Program: program, Config: "/etc/kedge/config.yaml", DataDir: "/var/lib/kedge", RunDir: "/run/kedge",
		Settings: []Setting{one("node-name", "n1"), many("tls-san", "a", "b")}, Token: "a secret of the first server", Kubeconfig: "/etc/kedge/kedge.yaml",
		Links: LinksAuto, Environ: []string{"HTTPS_PROXY=http://p"}, Completions: map[string]string{"bash": "script"},
	}
}

func (m Machine) mustInstall(t *testing.T, in Install) *Planned {
	t.Helper()
	p, err := m.Plan(t.Context(), in)
	if err == nil {
		err = p.Apply(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tree has the files below the machine's root with their contents, and modes where these matter.
func (m Machine) tree(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(m.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		name := strings.TrimPrefix(path, m.Root)
		if strings.HasPrefix(name, "/proc/") {
			return nil
		}
		if d.Type() == fs.ModeSymlink {
			all[name], err = os.Readlink(path)
			return err
		}
		data, err := os.ReadFile(path)
		st, none := d.Info()
		all[name] = fmt.Sprintf("%o %s", st.Mode().Perm(), data)
		return errors.Join(err, none)
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func same(t *testing.T, what string, got, want map[string]string) {
	t.Helper()
	for name := range want {
		if got[name] != want[name] {
			t.Errorf("%s: %s is %q, want %q", what, name, got[name], want[name])
		}
	}
	for name := range got {
		if _, ok := want[name]; !ok {
			t.Errorf("%s: %s is there", what, name)
		}
	}
}

func TestInstallAndUninstall(t *testing.T) {
	m, s, in := newMachine(t)
	// A package of the distribution has put the same file there.
	in.Completions["zsh"] = "script of zsh"
	theirs := m.path("/usr/share/zsh/vendor-completions/_kedge")
	if err := errors.Join(os.MkdirAll(filepath.Dir(theirs), 0o755), os.WriteFile(theirs, []byte("script of zsh"), 0o644)); err != nil {
		t.Fatal(err)
	}
	before := m.tree(t)
	m.mustInstall(t, in)
	after := m.tree(t)
	for name, want := range map[string]string{
		"/usr/local/bin/kedge": "755 program 1", "/usr/local/bin/kubectl": "kedge", "/usr/local/bin/ctr": "kedge",
		"/etc/kedge/config.yaml":                       "600 node-name: n1\ntls-san:\n  - a\n  - b\ntoken-file: /etc/kedge/token\n",
		"/etc/kedge/token":                             "600 a secret of the first server\n",
		"/usr/share/bash-completion/completions/kedge": "644 script",
	} {
		if after[name] != want {
			t.Errorf("%s is %q", name, after[name])
		}
	}
	if env := after["/etc/kedge/service.env"]; !strings.HasPrefix(env, "600 ") || !strings.Contains(env, `HTTPS_PROXY="http://p"`) {
		t.Errorf("environment %q", env)
	}
	if got := strings.Join(s.calls, " "); got != "reload enable restart" || !s.state.Active {
		t.Errorf("the service manager was told: %s", got)
	}
	// Once more, without settings: nothing to do.
	again := in
	again.Settings, again.Token, again.Environ = nil, "", nil
	p, err := m.Plan(t.Context(), again)
	if err != nil || p.Changes() {
		t.Errorf("a second time: %v\n%s", err, p)
	}
	if err := p.Apply(t.Context()); err != nil {
		t.Error(err)
	}
	same(t, "after the second time", m.tree(t), after)
	// Without purge the data and its configuration stay.
	killed := 0
	u := Uninstall{DataDir: in.DataDir, KillAll: func(context.Context) error { killed++; return nil }}
	r, err := m.PlanRemoval(u)
	if err == nil {
		err = r.Apply(t.Context())
	}
	if err != nil || killed != 1 || s.state.Active || s.state.Enabled {
		t.Fatalf("%v, killed %d times, %+v", err, killed, s.state)
	}
	left := m.tree(t)
	for name := range left {
		if _, was := before[name]; !was && name != "/etc/kedge/config.yaml" && name != "/etc/kedge/token" {
			t.Errorf("%s is left", name)
		}
	}
	for name := range before {
		if left[name] != before[name] {
			t.Errorf("%s was %q and is %q", name, before[name], left[name])
		}
	}
	// Installed again, and removed with its data.
	m.mustInstall(t, again)
	for _, name := range []string{"kubelet/pods/x/volume", "kedge.lock", "server/tls/key", "of-the-user"} {
		if err := errors.Join(os.MkdirAll(m.path("/var/lib/kedge/"+filepath.Dir(name)), 0o755), os.WriteFile(m.path("/var/lib/kedge/"+name), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	u.Purge = true
	if r, err = m.PlanRemoval(u); err == nil {
		err = r.Apply(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	traces, notes, err := r.Leftovers()
	if err != nil || len(traces) > 0 || len(notes) != 1 || notes[0] != "/var/lib/kedge stays, with files that are not kedge's: of-the-user" {
		t.Errorf("left %v, %v, %v", traces, notes, err)
	}
	before["/var/lib/kedge/of-the-user"] = "600 "
	same(t, "after the purge", m.tree(t), before)
	if _, err := m.PlanRemoval(u); !errors.Is(err, ErrNoJournal) {
		t.Errorf("a third time: %v", err)
	}
}

var errKilled = errors.New("killed")

// TestKilledAtEveryInstant: an installation, an upgrade and a removal that are cut off at any point are completed by the
// next run, and end as one that was not.
func TestKilledAtEveryInstant(t *testing.T) {
	for _, kind := range []string{"install", "upgrade", "uninstall", "purge"} {
		var want map[string]string
		for at := 0; ; at++ {
			m, s, in := newMachine(t)
			if kind != "install" {
				m.mustInstall(t, in)
				s.calls = nil
			}
			act := func(m Machine) error {
				if kind == "uninstall" || kind == "purge" {
					r, err := m.PlanRemoval(Uninstall{DataDir: in.DataDir, Purge: kind == "purge", KillAll: func(context.Context) error { return nil }})
					if errors.Is(err, ErrNoJournal) {
						return nil
					}
					if err != nil {
						return err
					}
					return r.Apply(t.Context())
				}
				p, err := m.Plan(t.Context(), in)
				if err != nil {
					return err
				}
				return p.Apply(t.Context())
			}
			if kind == "upgrade" {
				if err := os.WriteFile(in.Program, []byte("program 2"), 0o755); err != nil {
					t.Fatal(err)
				}
				in.Settings = []Setting{one("node-name", "n2")}
			}
			n, point := 0, ""
			killed := m
			killed.fault = func(p string) error {
				if n++; n > at {
					point = p
					return errKilled
				}
				return nil
			}
			err := act(killed)
			if point != "" && !errors.Is(err, errKilled) {
				t.Fatalf("%s killed at %q: %v", kind, point, err)
			}
			if err := act(m); err != nil {
				t.Fatalf("%s killed at %q, again: %v", kind, point, err)
			}
			got := m.tree(t)
			if want == nil { // killed before the first change
				want = got
			}
			what := fmt.Sprintf("%s killed at %d, %q", kind, at, point)
			same(t, what, got, want)
			if installs := kind == "install" || kind == "upgrade"; s.state.Active != installs || s.state.Enabled != installs {
				t.Errorf("%s: %+v", what, s.state)
			}
			if kind == "upgrade" && !slices.Contains(s.calls, "restart") {
				t.Errorf("%s: the service was not restarted", what)
			}
			if point == "" {
				if at < 3 {
					t.Errorf("%s has only %d points", kind, at)
				}
				break
			}
		}
	}
}

// TestTokenOfJoin: the token is in no configuration file, and gone after the join.
func TestTokenOfJoin(t *testing.T) {
	m, _, in := newMachine(t)
	in.Role, in.Joins, in.Token, in.Kubeconfig = "agent", true, "secret", ""
	p := m.mustInstall(t, in)
	if tree := m.tree(t); tree["/etc/kedge/token"] != "600 secret\n" || strings.Contains(tree["/etc/kedge/config.yaml"], "secret") || strings.Contains(tree["/var/lib/kedge/install.json"], "secret") {
		t.Errorf("%v", tree)
	}
	if err := p.DropToken(); err != nil || m.tree(t)["/etc/kedge/token"] == "" {
		t.Errorf("dropped before the join: %v", err)
	}
	dir := m.path("/var/lib/kedge/agent")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := (joining.State{Cluster: clusterOfTest()}).Write(joining.Agent, dir); err != nil {
		t.Fatal(err)
	}
	for i := 0; ; i++ { // cut off at each point
		killed, n := *p, 0
		killed.machine.fault = func(string) error {
			if n++; n > i {
				return errKilled
			}
			return nil
		}
		err := killed.DropToken()
		tree := m.tree(t)
		if tree["/etc/kedge/token"] == "" && strings.Contains(tree["/etc/kedge/config.yaml"], "token-file") {
			t.Errorf("cut off at %d: the configuration names a token that is gone", i)
		}
		if err == nil {
			break
		}
		if !errors.Is(err, errKilled) {
			t.Fatal(err)
		}
	}
	if tree := m.tree(t); tree["/etc/kedge/token"] != "" || strings.Contains(tree["/etc/kedge/config.yaml"], "token") {
		t.Errorf("%v", tree)
	}
	// A token is not needed any more, and nothing restarts.
	p, err := m.Plan(t.Context(), in)
	if err != nil || p.Changes() || !slices.Contains(p.Notes, "the machine has joined before, and needs no token") {
		t.Errorf("%v, %v\n%s", err, p.Notes, p)
	}
}

func TestInstallMistakes(t *testing.T) {
	m, s, in := newMachine(t)
	m.mustInstall(t, in)
	other := in
	other.DataDir = "/data"
	if _, err := m.Plan(t.Context(), other); err == nil || !strings.Contains(err.Error(), "which cannot be changed") && !strings.Contains(err.Error(), "did not write") {
		t.Errorf("another data directory: %v", err)
	}
	if err := os.WriteFile(m.path("/etc/kedge/config.yaml"), []byte("- x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Plan(t.Context(), in); err == nil || !strings.HasPrefix(err.Error(), "/etc/kedge/config.yaml: ") {
		t.Errorf("no configuration: %v", err)
	}
	s.fail = errors.New("no bus")
	r, err := m.PlanRemoval(Uninstall{DataDir: in.DataDir, Purge: true, KillAll: func(context.Context) error { t.Error("containers are killed under a running kedge"); return nil }})
	if err == nil {
		err = r.Apply(t.Context())
	}
	if err == nil || m.tree(t)["/usr/local/bin/kedge"] == "" {
		t.Errorf("a service that cannot be stopped: %v", err)
	}
	if err := os.WriteFile(m.path("/var/lib/kedge/install.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.PlanRemoval(Uninstall{DataDir: in.DataDir}); err == nil || !strings.Contains(err.Error(), "restore it, or remove it") {
		t.Errorf("damaged journal: %v", err)
	}
}

// TestRemovalWithAFailure: what the next run needs to find the data stays after a step has failed, and that run completes the
// removal.
func TestRemovalWithAFailure(t *testing.T) {
	m, _, in := newMachine(t)
	before := m.tree(t)
	m.mustInstall(t, in)
	u := Uninstall{DataDir: in.DataDir, Purge: true, KillAll: func(context.Context) error { return nil }}
	failing := m
	failing.fault = func(point string) error {
		if point == "remove /usr/local/bin/kedge" {
			return errors.New("operation not permitted")
		}
		return nil
	}
	r, err := failing.PlanRemoval(u)
	if err == nil {
		err = r.Apply(t.Context())
	}
	if tree := m.tree(t); err == nil || tree["/etc/kedge/config.yaml"] == "" || tree["/var/lib/kedge/install.json"] == "" {
		t.Errorf("%v: there is %v", err, tree)
	}
	if r, err = m.PlanRemoval(u); err == nil {
		err = r.Apply(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	same(t, "after the second run", m.tree(t), before)
}

// TestPreviousProgram: the program that was replaced is kept.
func TestPreviousProgram(t *testing.T) {
	m, _, in := newMachine(t)
	m.mustInstall(t, in)
	if err := os.WriteFile(in.Program, []byte("program 2"), 0o755); err != nil {
		t.Fatal(err)
	}
	m.mustInstall(t, in)
	if tree := m.tree(t); tree["/usr/local/bin/kedge"] != "755 program 2" || tree["/var/lib/kedge/previous/kedge"] != "755 program 1" {
		t.Errorf("%v", tree)
	}
}

// TestBinDir: the executable goes where there is a writable file system with room, and the errors name the way forward.
func TestBinDir(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts")
	}
	m, _, in := newMachine(t)
	usual := m.path("/usr/local/bin")
	if err := unix.Mount("tmpfs", usual, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(usual, unix.MNT_DETACH) })
	if _, err := m.Plan(t.Context(), in); err == nil || !strings.HasPrefix(err.Error(), "the file system of /usr/local/bin has 0 MiB free, and kedge needs 8 MiB there; free some space") {
		t.Errorf("no room: %v", err)
	}
	if err := unix.Mount("", usual, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	if p, err := m.Plan(t.Context(), in); err != nil || p.Program() != "/opt/bin/kedge" {
		t.Errorf("read-only: %v, %v", p, err)
	}
	in.BinDir = "/usr/local/bin"
	if _, err := m.Plan(t.Context(), in); err == nil || err.Error() != "/usr/local/bin is on a read-only file system; choose another folder with --bin-dir" {
		t.Errorf("read-only and named: %v", err)
	}
	in.BinDir = "bin"
	if _, err := m.Plan(t.Context(), in); err == nil || !strings.Contains(err.Error(), "is not an absolute path") {
		t.Errorf("relative: %v", err)
	}
	if len(m.tree(t)) > 0 {
		t.Errorf("something was written: %v", m.tree(t))
	}
}

// TestContentsAreInUseBeforeTheRestart: what a bundle brings is put into use once, before kedge is restarted, and an interrupted
// run does not forget the restart.
func TestContentsAreInUseBeforeTheRestart(t *testing.T) {
	m, s, in := newMachine(t)
	m.mustInstall(t, in)
	s.calls = nil
	in.Contents = func() error { return s.call("contents", func() {}) }
	m.mustInstall(t, in)
	if want := []string{"contents", "reload", "restart"}; !slices.Equal(s.calls, want) {
		t.Errorf("calls %q, want %q", s.calls, want)
	}
	s.calls = nil
	m.fault = func(point string) error {
		if strings.HasPrefix(point, "make the service manager") {
			return errors.New("the power has failed")
		}
		return nil
	}
	p, err := m.Plan(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(t.Context()); err == nil {
		t.Fatal("the fault had no effect")
	}
	m.fault, in.Contents = nil, nil // the contents are there now
	m.mustInstall(t, in)
	if want := []string{"contents", "reload", "restart"}; !slices.Equal(s.calls, want) {
		t.Errorf("after an interruption: calls %q, want %q", s.calls, want)
	}
	// Contents that cannot be put into use change nothing else.
	in.Contents = func() error { return errors.New("no") }
	in.Settings = append(in.Settings, one("node-name", "n2"))
	before := m.tree(t)
	if p, err = m.Plan(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(t.Context()); err == nil || err.Error() != "no" {
		t.Errorf("error %v", err)
	}
	after := m.tree(t)
	delete(before, "/var/lib/kedge/install.json") // a restart is due
	delete(after, "/var/lib/kedge/install.json")
	same(t, "after contents that failed", after, before)
}

// TestProgramIsAStretchOfAFile installs the executable out of a bundle.
func TestProgramIsAStretchOfAFile(t *testing.T) {
	m, _, in := newMachine(t)
	if err := os.WriteFile(in.Program, []byte("headprogram 1tail"), 0o755); err != nil {
		t.Fatal(err)
	}
	in.ProgramAt, in.ProgramSize = 4, 9
	m.mustInstall(t, in)
	if text, err := os.ReadFile(m.path("/usr/local/bin/kedge")); err != nil || string(text) != "program 1" {
		t.Errorf("%q, %v", text, err)
	}
	if p, err := m.Plan(t.Context(), in); err != nil || p.Changes() {
		t.Errorf("a second time: %v, %v", p, err)
	}
	// A medium that returns something else the second time.
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(in.Program, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("headprogram 2tail")
	p, err := m.Plan(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	write("headprogram 3tail")
	if err := p.Apply(t.Context()); err == nil || !strings.Contains(err.Error(), "has changed while it was copied") {
		t.Errorf("a program that changes: %v", err)
	}
	if text, err := os.ReadFile(m.path("/usr/local/bin/kedge")); err != nil || string(text) != "program 1" {
		t.Errorf("%q, %v", text, err)
	}
}
