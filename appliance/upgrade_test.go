package appliance

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"kedge/appliance/release"
	"kedge/internal/control"
	"kedge/launcher/bootguard"
)

func TestParseVersion(t *testing.T) {
	b, err := parseVersion("kedge v1.2.3 (abcdef)\nKubernetes v1.37.1\netcd v3.7.0\ndata format 4\ngo1.26.8 linux/arm64\n")
	if want := (Build{Version: "v1.2.3", Commit: "abcdef", Kubernetes: "v1.37.1", Platform: "linux/arm64", DataFormat: 4, Watches: true}); err != nil || b != want {
		t.Errorf("%+v, %v", b, err)
	}
	if b, err := parseVersion("kedge v1 (a)\nKubernetes v1.36.0\n"); err != nil || b.DataFormat != 1 || b.Watches {
		t.Errorf("a version of before the format was printed: %+v, %v", b, err)
	}
	for want, b := range map[string]Build{"v1.2.3 (0123456789ab)": {Version: "v1.2.3", Commit: "0123456789abcdef"}, "0123456789ab-dirty": {Version: "0123456789ab-dirty", Commit: "0123456789abcdef"}} {
		if b.String() != want {
			t.Errorf("%s, want %s", b, want)
		}
	}
	for _, text := range []string{"", "hello\n", "kedge v1 (a)\n", "Kubernetes v1.36.0\n", "kedge v1 (a)\nKubernetes v1.36.0\ndata format x\n"} {
		if b, err := parseVersion(text); err == nil {
			t.Errorf("%q: %+v", text, b)
		}
	}
}

func TestCheckStep(t *testing.T) {
	build := func(kubernetes string, format int) Build {
		return Build{Version: "of " + kubernetes, Kubernetes: kubernetes, DataFormat: format}
	}
	for name, tc := range map[string]struct {
		from, to Build
		in       Upgrade
		cluster  clusterVersions
		want     string // of the error; empty for none
	}{
		"patch":              {build("v1.37.1", 1), build("v1.37.4", 1), Upgrade{Role: "server"}, clusterVersions{}, ""},
		"earlier patch":      {build("v1.37.4", 1), build("v1.37.1", 1), Upgrade{Role: "server"}, clusterVersions{}, ""},
		"minor":              {build("v1.37.1", 1), build("v1.38.0", 2), Upgrade{Role: "server"}, clusterVersions{}, ""},
		"two minors":         {build("v1.37.1", 1), build("v1.39.0", 1), Upgrade{Role: "server"}, clusterVersions{}, "upgrade to a kedge with Kubernetes 1.38 first"},
		"agent, two minors":  {build("v1.37.1", 1), build("v1.39.0", 1), Upgrade{Role: "agent"}, clusterVersions{server: "v1.39.2"}, ""},
		"agent before":       {build("v1.37.1", 1), build("v1.38.0", 1), Upgrade{Role: "agent"}, clusterVersions{server: "v1.37.1"}, "upgrade the servers first"},
		"back":               {build("v1.38.0", 1), build("v1.37.1", 1), Upgrade{Role: "server"}, clusterVersions{}, "older than the present"},
		"rollback":           {build("v1.38.0", 1), build("v1.37.1", 1), Upgrade{Role: "server", Rollback: true}, clusterVersions{}, ""},
		"far rollback":       {build("v1.38.0", 1), build("v1.36.1", 1), Upgrade{Role: "server", Rollback: true}, clusterVersions{}, "more than one minor version older"},
		"rollback of format": {build("v1.38.0", 2), build("v1.37.1", 1), Upgrade{Role: "server", Rollback: true}, clusterVersions{}, "cannot read the data"},
		"old agent":          {build("v1.37.1", 1), build("v1.38.0", 1), Upgrade{Role: "server"}, clusterVersions{kubelets: map[string]string{"a": "v1.34.9"}}, "node a has Kubernetes v1.34.9"},
		"agent in time":      {build("v1.37.1", 1), build("v1.38.0", 1), Upgrade{Role: "server"}, clusterVersions{kubelets: map[string]string{"a": "v1.35.0+x"}}, ""},
		"no version":         {build("v1.37.1", 1), build("x", 1), Upgrade{Role: "server"}, clusterVersions{}, "not a version of Kubernetes"},
	} {
		err := checkStep(tc.from, tc.to, tc.in, tc.cluster)
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// pod returns a pod with one running container.
func podWith(uid, containerID string, ended *metav1.Time) corev1.Pod {
	s := corev1.ContainerStatus{Name: "main", ContainerID: containerID, State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	if ended != nil {
		s.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{FinishedAt: *ended}
	}
	return corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: "ns", Name: "pod-" + uid, UID: types.UID(uid)},
		Status:     corev1.PodStatus{ContainerStatuses: []corev1.ContainerStatus{s}},
	}
}

func TestRestarted(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) *metav1.Time { return &metav1.Time{Time: now.Add(-d)} }
	ended := podWith("ended", "3", nil)
	ended.Status.ContainerStatuses[0].State = corev1.ContainerState{}
	before := steady([]corev1.Pod{podWith("a", "1", nil), podWith("crashes", "2", ago(time.Minute)), podWith("calm", "4", ago(time.Hour)), ended}, now)
	if len(before) != 2 || before[0].Pod != "ns/pod-a" || before[1].ID != "4" {
		t.Fatalf("steady containers: %+v", before)
	}
	deleted := podWith("a", "9", nil)
	deleted.DeletionTimestamp = ago(0)
	for name, tc := range map[string]struct {
		pods []corev1.Pod
		want bool
	}{
		"the same":                        {[]corev1.Pod{podWith("a", "1", nil), podWith("calm", "4", nil)}, false},
		"one crashes as before":           {[]corev1.Pod{podWith("a", "1", nil), podWith("calm", "4", nil), podWith("crashes", "5", nil)}, false},
		"deleted meanwhile":               {[]corev1.Pod{podWith("calm", "4", nil)}, false},
		"being deleted":                   {[]corev1.Pod{deleted}, false},
		"another pod of the name":         {[]corev1.Pod{podWith("other", "7", nil)}, false},
		"started again":                   {[]corev1.Pod{podWith("a", "6", nil), podWith("calm", "4", nil)}, true},
		"its status is not known yet":     {[]corev1.Pod{podWith("a", "", nil)}, false},
		"the second one is started again": {[]corev1.Pod{podWith("a", "1", nil), podWith("calm", "8", nil)}, true},
	} {
		if err := restarted(before, tc.pods); (err != nil) != tc.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// releases serves files over HTTPS.
func releases(t *testing.T, files map[string]string) (base string, client *http.Client) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, found := files[r.URL.Path]
		if !found {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write([]byte(text))
	}))
	t.Cleanup(srv.Close)
	return srv.URL, srv.Client()
}

func TestSource(t *testing.T) {
	name := release.Executable(runtime.GOARCH)
	list, err := release.Parse(nil)
	if err != nil {
		list = &release.List{}
	}
	for file, text := range map[string]string{name: "executable", release.VersionName: "v2\n"} {
		if err := list.Add(file, strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]string{
		"/channels/stable": "v2\n", "/channels/strange": "../v2\n",
		"/v2/" + release.ListName: string(list.Text()), "/v2/" + release.VersionName: "v2\n", "/v2/" + name: "executable",
		"/bad/" + release.ListName: string(list.Text()), "/bad/" + release.VersionName: "v2\n", "/bad/" + name: "another",
		"/v3/" + release.ListName: string(list.Text()), "/v3/" + release.VersionName: "v2\n", "/v3/" + name: "executable",
	}
	base, client := releases(t, files)
	unsigned := filepath.Join(t.TempDir(), "kedge")
	if err := os.WriteFile(unsigned, nil, 0o755); err != nil {
		t.Fatal(err)
	}
	for what, tc := range map[string]struct {
		source Source
		want   string // of the error; empty for none
	}{
		"newest":           {Source{Channel: "stable"}, ""},
		"version":          {Source{Version: "v2"}, ""},
		"folder":           {Source{URL: base + "/v2/"}, ""},
		"wrong hash":       {Source{URL: base + "/bad"}, name},
		"older as newer":   {Source{Version: "v3"}, "v3"},
		"missing":          {Source{Version: "v9"}, "404"},
		"missing channel":  {Source{Channel: "latest"}, "404"},
		"strange channel":  {Source{Channel: "strange"}, "does not have the name of a version"},
		"channel is path":  {Source{Channel: "../x"}, "is not the name of a channel"},
		"version is path":  {Source{Version: "../x"}, "is not the name of a version"},
		"not over HTTPS":   {Source{URL: "http://192.0.2.1/v2"}, "https://"},
		"no such file":     {Source{File: "/none/kedge"}, "/none/kedge: no such file or directory"},
		"unsigned, a file": {Source{File: unsigned}, ""},
	} {
		tc.source.Base, tc.source.Client = base, client
		path, note, err := tc.source.Take(t.Context(), t.TempDir())
		if (err == nil) != (tc.want == "") || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", what, err, tc.want)
			continue
		}
		if err == nil && note == "" {
			t.Errorf("%s: nothing is said of the missing signature", what)
		}
		if err == nil && tc.source.File == "" {
			if data, err := os.ReadFile(path); err != nil || string(data) != "executable" {
				t.Errorf("%s: %q, %v", what, data, err)
			}
		}
	}
	// With a key nothing without a signature is taken.
	keys := []release.Key{{}}
	for what, s := range map[string]Source{"version": {Version: "v2"}, "file": {File: unsigned}} {
		s.Base, s.Client, s.Keys = base, client, keys
		if path, _, err := s.Take(t.Context(), t.TempDir()); err == nil {
			t.Errorf("%s: %s is taken without a signature", what, path)
		}
	}
}

// TestHistory: an outcome is recorded once, a damaged history does not keep a trial from its end, and the list is bounded.
func TestHistory(t *testing.T) {
	m, dir := Machine{Root: t.TempDir()}, "/data"
	if err := os.MkdirAll(m.path(bootguard.Path(dir)), 0o700); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := m.addOutcome(dir, Outcome{ID: "1", Result: Upgraded}); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := m.Upgrades(dir); err != nil || len(s.History) != 1 || s.Trial != nil {
		t.Errorf("%+v, %v", s, err)
	}
	for i := range maxOutcomes + 3 {
		if err := m.addOutcome(dir, Outcome{ID: fmt.Sprint("n", i), Result: WentBack, Reason: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := m.Upgrades(dir); err != nil || len(s.History) != maxOutcomes {
		t.Errorf("%d outcomes, %v", len(s.History), err)
	}
	if err := os.WriteFile(m.path(bootguard.Path(dir, historyName)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Upgrades(dir); err == nil || !strings.Contains(err.Error(), "remove it") {
		t.Errorf("a damaged history: %v", err)
	}
	if err := m.addOutcome(dir, Outcome{ID: "after", Result: Upgraded}); err != nil {
		t.Error(err)
	}
	if o, found := m.LastUpgrade(dir); !found || o.ID != "after" {
		t.Errorf("%+v, %v", o, found)
	}
	if err := m.EndTrial(dir, "x"); !errors.Is(err, ErrNoUpgrade) {
		t.Errorf("without a trial: %v", err)
	}
	if _, err := m.Follow(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a trial: %v", err)
	}
}

// TestWatched: who asks whether a trial is watched keeps nobody from watching it.
func TestWatched(t *testing.T) {
	m, dir := Machine{Root: t.TempDir()}, "/data"
	if err := os.MkdirAll(m.path(bootguard.Path(dir)), 0o700); err != nil {
		t.Fatal(err)
	}
	if m.watched(dir) {
		t.Error("watched by nobody")
	}
	lock, err := m.lockWatch(dir)
	if err != nil || lock == nil {
		t.Fatal(lock, err)
	}
	for range 2 {
		if !m.watched(dir) {
			t.Error("not watched")
		}
	}
	if second, err := m.lockWatch(dir); second != nil || err != nil {
		t.Errorf("two watch: %v, %v", second, err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if m.watched(dir) {
		t.Error("watched after the end")
	}
}

// TestOneCommandAtATime: two commands that change the installation exclude each other.
func TestOneCommandAtATime(t *testing.T) {
	m, _, in := newMachine(t)
	m.mustInstall(t, in)
	lock, err := m.alone(in.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	in.Settings = append(in.Settings, Setting{Key: "node-label", Values: []string{"a=b"}, List: true})
	p, err := m.Plan(t.Context(), in)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(t.Context()); !errors.Is(err, ErrAtWork) {
		t.Errorf("install: %v", err)
	}
	if _, err := m.Stage(t.Context(), Upgrade{File: in.Program, DataDir: in.DataDir}); !errors.Is(err, ErrAtWork) {
		t.Errorf("upgrade: %v", err)
	}
	removal, err := m.PlanRemoval(Uninstall{DataDir: in.DataDir})
	if err != nil {
		t.Fatal(err)
	}
	if err := removal.Apply(t.Context()); !errors.Is(err, ErrAtWork) {
		t.Errorf("uninstall: %v", err)
	}
	if err := lock.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Apply(t.Context()); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// TestKeepNewIsGone: a new version whose executable was removed after the verdict does not keep the trial for ever.
func TestKeepNewIsGone(t *testing.T) {
	for text, want := range map[string]Result{"old": WentBack, "new": Upgraded} {
		m, dir := Machine{Root: t.TempDir()}, "/data"
		program := m.path("/kedge")
		if err := os.WriteFile(program, []byte("new"), 0o755); err != nil {
			t.Fatal(err)
		}
		sum, err := hashFile(program)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(program, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.MkdirAll(m.path(bootguard.Path(dir)), 0o700); err != nil {
			t.Fatal(err)
		}
		trial := bootguard.Trial{ID: "1", Candidate: bootguard.Path(dir, serviceName), Base: filepath.Join(dir, "previous", serviceName), MaxStarts: 3}
		if err := bootguard.Begin(m.path(dir), trial); err != nil {
			t.Fatal(err)
		}
		w := watching{machine: m, dataDir: dir, trial: trial, details: trialDetails{Program: "/kedge", To: Build{Hash: sum}}}
		if err := w.keepNew(); err != nil {
			t.Fatal(err)
		}
		if s, err := m.Upgrades(dir); err != nil || s.Trial != nil || len(s.History) != 1 || s.History[0].Result != want {
			t.Errorf("%s in its place: %+v, %v", text, s, err)
		}
	}
}

// TestLauncherIn: an upgrade replaces what was started by hand, and not a file of the upgrade before.
func TestLauncherIn(t *testing.T) {
	for environ, want := range map[string]string{
		"A=b\x00KEDGE_LAUNCHER=/opt/kedge":                                      "/opt/kedge",
		"KEDGE_LAUNCHER=/data/upgrade/kedge\x00KEDGE_STARTED_BY=/opt/kedge\x00": "/opt/kedge",
		"KEDGE_LAUNCHER=/data/previous/kedge\x00KEDGE_STARTED_BY=/opt/kedge":    "/opt/kedge",
		"KEDGE_LAUNCHER=/data/upgrade/kedge":                                    "stop kedge, start it again",
		"KEDGE_LAUNCHER=/data/previous/kedge":                                   "stop kedge, start it again",
		"A=b":                                                                   "without its launcher",
	} {
		path, err := launcherIn(variables(environ), "/data")
		if err != nil {
			path = err.Error()
		}
		if !strings.Contains(path, want) || err == nil && path != want {
			t.Errorf("%q: %s", environ, path)
		}
	}
}

// TestOnlyKedge: a program of somebody else is refused before it is executed.
func TestOnlyKedge(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := checkMachineCode(Upgrade{File: self}); err != nil {
		t.Errorf("a program of this module: %v", err)
	}
	if arch, err := Architecture(self); err != nil || arch != runtime.GOARCH {
		t.Errorf("a program of this module is for %q, %v", arch, err)
	}
	if _, err := Architecture("/bin/sh"); err == nil || !strings.Contains(err.Error(), "/bin/sh is not an executable of kedge") {
		t.Errorf("a shell, for all nodes: %v", err)
	}
	if err := checkMachineCode(Upgrade{File: "/bin/sh"}); err == nil || !strings.Contains(err.Error(), "is not an executable of kedge") {
		t.Errorf("a shell: %v", err)
	}
}

// TestNoTrial: while an upgrade is on trial the error says how to end it, and not once that was done.
func TestNoTrial(t *testing.T) {
	m, dir := Machine{Root: t.TempDir()}, "/data"
	if err := os.MkdirAll(m.path(bootguard.Path(dir)), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := m.noTrial(dir); err != nil {
		t.Error(err)
	}
	trial := bootguard.Trial{ID: "1", Candidate: "/new", Base: "/old", MaxStarts: 3}
	if err := bootguard.Begin(m.path(dir), trial); err != nil {
		t.Fatal(err)
	}
	if err := m.noTrial(dir); !errors.Is(err, ErrOnTrial) || !strings.Contains(err.Error(), "rollback\" ends it") {
		t.Errorf("on trial: %v", err)
	}
	if err := m.EndTrial(dir, "of the test"); err != nil {
		t.Fatal(err)
	}
	if err := m.noTrial(dir); !errors.Is(err, ErrOnTrial) || !strings.Contains(err.Error(), "start kedge again") {
		t.Errorf("with a verdict: %v", err)
	}
}

// trialOf makes a trial in which the new version has the wanted place already.
func trialOf(t *testing.T) (m Machine, dir string, trial bootguard.Trial) {
	t.Helper()
	m, dir = Machine{Root: t.TempDir(), Manager: noManager{}}, "/data"
	if err := os.MkdirAll(m.path(bootguard.Path(dir)), 0o700); err != nil {
		t.Fatal(err)
	}
	details, err := json.Marshal(trialDetails{Program: "/kedge", RunDir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	trial = bootguard.Trial{ID: "1", Candidate: bootguard.Path(dir, bootguard.CandidatePrefix+"1"), Base: "/kedge", MaxStarts: 3, Details: details}
	for _, path := range []string{trial.Candidate, trial.Base} {
		if err := os.WriteFile(m.path(path), nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := bootguard.Begin(m.path(dir), trial); err != nil {
		t.Fatal(err)
	}
	return m, dir, trial
}

// TestFollowerTakesOver: who follows an upgrade completes it if the process that watches was killed.
func TestFollowerTakesOver(t *testing.T) {
	m, dir, trial := trialOf(t)
	if _, err := bootguard.Decide(m.path(dir), trial, true, ""); err != nil {
		t.Fatal(err)
	}
	b, err := m.Follow(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if o, err := b.Wait(ctx, func(string) {}); err != nil || o.Result != Upgraded {
		t.Errorf("%+v, %v", o, err)
	}
}

// TestLateWatcher: who comes late gives no verdict for a trial that has ended meanwhile, which would be in the way of the next.
func TestLateWatcher(t *testing.T) {
	m, dir, trial := trialOf(t)
	m.fault = func(string) error { return bootguard.End(m.path(dir)) }
	if err := m.Watch(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if v, found, err := bootguard.ReadVerdict(m.path(dir), trial); found || err != nil {
		t.Errorf("verdict %+v, %v", v, err)
	}
}

// TestWatchOnAFullDisk: who watches a trial ends it when there is room again. Without an end it would last until the next start.
func TestWatchOnAFullDisk(t *testing.T) {
	m, dir, trial := trialOf(t)
	if _, err := bootguard.Decide(m.path(dir), trial, true, ""); err != nil {
		t.Fatal(err)
	}
	attempts := 0
	m.fault = func(string) error {
		if attempts++; attempts < 4 {
			return &os.PathError{Op: "write", Path: "verdict.json", Err: unix.ENOSPC}
		}
		return nil
	}
	synctest.Test(t, func(t *testing.T) {
		if err := m.Watch(t.Context(), dir); err != nil {
			t.Error(err)
		}
	})
	if o, found := m.LastUpgrade(dir); !found || o.Result != Upgraded || attempts != 4 {
		t.Errorf("%+v after %d attempts", o, attempts)
	}
	m.fault = func(string) error { return errors.New("of another kind") }
	if err := bootguard.Begin(m.path(dir), trial); err != nil {
		t.Fatal(err)
	}
	if err := m.Watch(t.Context(), dir); err == nil {
		t.Error("an error of another kind is ignored")
	}
}

// TestBaseRunsInstead: the launcher starts the version of before if it cannot record the start of the new one. The upgrade is
// over then, and does not wait for what never comes.
func TestBaseRunsInstead(t *testing.T) {
	m, dir, _ := trialOf(t)
	_, d, err := m.readTrial(dir)
	if err != nil {
		t.Fatal(err)
	}
	base := exec.Command("sleep", "600")
	base.Env = []string{"KEDGE_LAUNCHER=" + m.path("/kedge")}
	if err := base.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = base.Process.Kill()
		_ = base.Wait()
	})
	requests := control.NewServer(d.RunDir, func(context.Context) control.Report { return control.Report{PID: base.Process.Pid} })
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- requests.Run(ctx, func() { close(ready) }) }()
	<-ready
	if err := m.Watch(ctx, dir); err != nil {
		t.Error(err)
	}
	if s, err := m.Upgrades(dir); err != nil || s.Trial != nil || len(s.History) != 1 || s.History[0].Result != WentBack || !strings.Contains(s.History[0].Reason, "could not be recorded") {
		t.Errorf("%+v, %v", s, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestGoBackBehindNewGuard: where the version of before does not know the boot guard, the new launcher stays in its place until it
// has started that version.
func TestGoBackBehindNewGuard(t *testing.T) {
	m, dir, trial := trialOf(t)
	trial.Base, trial.Watcher = filepath.Join(dir, "previous", "kedge"), trial.Candidate
	if err := os.MkdirAll(filepath.Dir(m.path(trial.Base)), 0o700); err != nil {
		t.Fatal(err)
	}
	for path, text := range map[string]string{trial.Base: "old", "/kedge": "new"} {
		if err := os.WriteFile(m.path(path), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := bootguard.Begin(m.path(dir), trial); err != nil {
		t.Fatal(err)
	}
	if _, err := bootguard.Decide(m.path(dir), trial, false, "of the test"); err != nil {
		t.Fatal(err)
	}
	program := func() string {
		data, err := os.ReadFile(m.path("/kedge"))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	synctest.Test(t, func(t *testing.T) { // no kedge starts afterwards, for which it would wait long
		done := make(chan error, 1)
		go func() { done <- m.Watch(t.Context(), dir) }()
		time.Sleep(2 * pollInterval)
		if text := program(); text != "new" {
			t.Errorf("before its start the executable is %q", text)
		}
		bootguard.Choose(m.path(dir), m.path("/kedge"))
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	})
	if text := program(); text != "old" {
		t.Errorf("after its start the executable is %q", text)
	}
	if o, found := m.LastUpgrade(dir); !found || o.Result != WentBack {
		t.Errorf("%+v, %v", o, found)
	}
}

// TestBaseGetsItsTime: the patience for the new version does not end the waiting for the version of before, which may start
// more slowly than that.
func TestBaseGetsItsTime(t *testing.T) {
	w := watching{machine: Machine{Manager: noManager{}}, details: trialDetails{RunDir: t.TempDir(), Patience: time.Second}}
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		w.untilBack(t.Context())
		if took := time.Since(begin); took < backLimit {
			t.Errorf("it waits for %s, want %s", took, backLimit)
		}
	})
}
