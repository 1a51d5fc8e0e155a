package cgroup

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

func TestEndKillsWhatIsInside(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making control groups needs root")
	}
	const root = "/kedge-test-end"
	t.Cleanup(func() { _ = Remove(root) })
	if err := Ensure(root); err != nil {
		t.Fatal(err)
	}
	if err := End(root); err != nil {
		t.Errorf("nothing to end: %v", err)
	}
	groups, err := groupsOf(root)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(groups[0], "below")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("sleep", "60")
	if err := cmd.Start(); err != nil {
		t.Skip(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		_ = cmd.Process.Kill()
		t.Fatal(err)
	}
	if err := End(root); err != nil {
		t.Error(err)
	}
	if err := <-ended; err == nil {
		t.Error("the process ended by itself")
	}
	if err := Remove(root); err != nil {
		t.Error(err)
	}
}

// A number that was read from a control group may be that of another process when it is
// to be killed.
func TestKillMemberSparesOthers(t *testing.T) {
	start := func() (pid int, ended chan error) {
		cmd := exec.Command("sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Skip(err)
		}
		ended = make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		t.Cleanup(func() { _ = cmd.Process.Kill() })
		return cmd.Process.Pid, ended
	}
	member, ended := start()
	other, _ := start()
	procs := filepath.Join(t.TempDir(), "cgroup.procs")
	if err := os.WriteFile(procs, []byte(strconv.Itoa(member)+"\n0\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, pid := range []int{other, member} {
		if err := killMember(procs, pid); err != nil {
			t.Errorf("process %d: %v", pid, err)
		}
	}
	<-ended
	if err := syscall.Kill(other, 0); err != nil {
		t.Errorf("a process that is not in the group was killed: %v", err)
	}
	if err := killMember(procs, member); err != nil {
		t.Errorf("a process that has ended: %v", err)
	}
}

func TestEnsureAndRemove(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making control groups needs root")
	}
	root := "/kedge-test-cgroup/nested"
	t.Cleanup(func() { _ = Remove("/kedge-test-cgroup") })
	for range 2 { // the second time finds everything there
		if err := Ensure(root); err != nil {
			t.Fatal(err)
		}
	}
	var groups []string
	if Unified() {
		groups = []string{filepath.Join(mountPoint, root)}
	} else {
		for _, c := range []string{"memory", "cpu", "cpuset", "pids"} {
			groups = append(groups, filepath.Join(mountPoint, c, root))
		}
	}
	for _, g := range groups {
		if _, err := os.Stat(g); err != nil {
			t.Error(err)
		}
	}
	if !Unified() {
		cpus, err := os.ReadFile(filepath.Join(mountPoint, "cpuset", root, "cpuset.cpus"))
		if err != nil || strings.TrimSpace(string(cpus)) == "" {
			t.Errorf("cpuset.cpus is %q, %v: no process could enter", cpus, err)
		}
	}
	if err := Remove("/kedge-test-cgroup"); err != nil {
		t.Fatal(err)
	}
	for _, g := range groups {
		if _, err := os.Stat(g); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", g, err)
		}
	}
}

func TestSliceIsNamedAsTheKubeletNamesIt(t *testing.T) {
	for root, want := range map[string]string{"/kedge-n1": "kedge_n1.slice", "/kedge-edge-1.site": "kedge_edge_1.site.slice"} {
		if got := Slice(root); got != want {
			t.Errorf("%s: %s, want %s", root, got, want)
		}
	}
}

func TestClaim(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("making control groups needs root")
	}
	const root = "/kedge-test-claim"
	if err := Ensure(root); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = Remove(root) })
	release, err := Claim(root)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Claim(root); !errors.Is(err, ErrClaimed) {
		t.Errorf("a second claim: %v, want ErrClaimed", err)
	}
	if err := release(); err != nil {
		t.Fatal(err)
	}
	again, err := Claim(root)
	if err != nil {
		t.Fatalf("after release: %v", err)
	}
	again()
}

// TestWholeMachine: no name of a group means the processes of the whole machine. The test asks for the paths only: to end what is
// in them would end the machine if the test had to fail.
func TestWholeMachine(t *testing.T) {
	for _, root := range []string{"", "/", "//", "/x/.."} {
		if groups, err := groupsOf(root); !errors.Is(err, errWholeMachine) {
			t.Errorf("%q: %v, %v", root, groups, err)
		}
	}
}
