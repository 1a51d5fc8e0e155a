package machine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/cgroup"
	"kedge/internal/namespaces"
	"kedge/internal/test/host"
)

// actKedge is a program that answers on port 80 and ends when it is asked to.
func actKedge() int {
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM)
	fmt.Println("started with", os.Args[1:])
	if len(os.Args) > 1 && os.Args[1] == "fail" {
		return 3
	}
	go http.ListenAndServe(":80", http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, _ := os.Hostname()
		fmt.Fprint(w, name)
	}))
	<-stop
	fmt.Println("stopped")
	return 0
}

const patience = 20 * time.Second

func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if err = f(); err == nil {
			return
		}
	}
	t.Fatalf("%s: %v", what, err)
}

// traces are what machines could leave on this machine: mounts in folders of tests,
// links, control groups and processes, as lines.
func traces(t *testing.T) []string {
	t.Helper()
	var all []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if point := strings.Fields(line)[4]; strings.Contains(point, "/Test") { // not those of other programs
			all = append(all, "mount "+point)
		}
	}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Name, "kdm-") {
			all = append(all, "link "+l.Name)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup/kedge-machines-*", "/sys/fs/cgroup/*/kedge-machines-*"} {
		groups, _ := filepath.Glob(pattern)
		for _, g := range groups {
			all = append(all, "control group "+g)
		}
	}
	commands, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, c := range commands {
		if data, err := os.ReadFile(c); err == nil && bytes.HasPrefix(data, []byte("kedge-machine")) {
			all = append(all, "process "+c)
		}
	}
	slices.Sort(all)
	return all
}

// cleanAfter checks at the test's end that what is there was there before.
func cleanAfter(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces, mounts and control groups")
	}
	before := traces(t)
	t.Cleanup(func() {
		for _, line := range traces(t) {
			if !slices.Contains(before, line) {
				t.Errorf("left behind: %s", line)
			}
		}
	})
}

func config(t *testing.T) Config {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return Config{Dir: filepath.Join(t.TempDir(), "site"), Program: self, Supervisor: self}
}

func create(t *testing.T, c Config) *Site {
	t.Helper()
	cleanAfter(t)
	s, err := Create(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", c.Dir, err)
		}
	})
	return s
}

func add(t *testing.T, s *Site, n int) *Machine {
	t.Helper()
	m, err := s.Add(fmt.Sprint("m", n), addresses(n))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.PowerOn(); err != nil {
		t.Fatal(err)
	}
	return m
}

func addresses(n int) []netip.Prefix {
	return []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.213.98.%d/24", n)), netip.MustParsePrefix(fmt.Sprintf("fd00:98::%d/64", n))}
}

func run(t *testing.T, m *Machine, args ...string) string {
	t.Helper()
	out, err := m.Output(t.Context(), args...)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return out
}

// name asks the machine with a number for its name, from another.
func name(t *testing.T, from *Machine, n int) (string, error) {
	t.Helper()
	h, err := from.Host()
	if err != nil {
		return "", err
	}
	client := http.Client{Timeout: time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, time.Second) // or it goes on trying when nobody waits any more
		defer cancel()
		return h.Dial(ctx, network, addr)
	}}}
	resp, err := client.Get("http://" + net.JoinHostPort(addresses(n)[n%2].Addr().String(), "80"))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return string(body), err
}

func answers(t *testing.T, from *Machine, n int) {
	t.Helper()
	eventually(t, "an answer from another machine", func() error {
		got, err := name(t, from, n)
		if err == nil && got != fmt.Sprint("m", n) {
			err = fmt.Errorf("it says that it is %q", got)
		}
		return err
	})
}

// TestInside looks at what a machine looks like from inside.
func TestInside(t *testing.T) {
	s := create(t, config(t))
	m := add(t, s, 1)
	if out := run(t, m, "/bin/cat", "/proc/sys/kernel/hostname", "/etc/hostname"); out != "m1\nm1\n" {
		t.Errorf("host name %q", out)
	}
	if out := run(t, m, "/bin/cat", "/proc/1/comm"); !strings.HasPrefix(out, "kedge-machine") && !strings.HasPrefix(out, "exe") {
		t.Errorf("process 1 is %q", out)
	}
	if out := run(t, m, "/bin/sh", "-c", "cut -d: -f3 /proc/self/cgroup | sort -u"); out != "/init\n" {
		t.Errorf("control groups of a command: %q", out)
	}
	if out := run(t, m, "/bin/ls", "/sys/class/net"); out != "eth0\nlo\n" {
		t.Errorf("links: %q", out)
	}
	// Folders of the host that are not shared, and that cannot be changed.
	if out, err := m.Output(t.Context(), "/bin/ls", s.Dir()); err == nil {
		t.Errorf("the host's files are visible: %s", out)
	}
	if out, err := m.Output(t.Context(), "/bin/sh", "-c", "touch /usr/x"); err == nil {
		t.Errorf("the host's programs can be changed: %s", out)
	}
	if out := run(t, m, "/bin/sh", "-c", "grep ' / / ' /proc/self/mountinfo | grep -c shared:; mkdir /sys/fs/cgroup/memory/x && rmdir /sys/fs/cgroup/memory/x; echo y > /var/x; echo z > /run/z; echo w > /tmp/w; mount -t tmpfs none /mnt; grep -c /mnt /proc/mounts"); !strings.HasSuffix(out, "1\n") {
		t.Errorf("mounting: %q", out)
	}
	if data, err := os.ReadFile(m.Disk("/var/x")); err != nil || string(data) != "y\n" {
		t.Errorf("a file of the disk, from outside: %q, %v", data, err)
	}
	live, err := m.Live("/run/z")
	if err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(live); err != nil || string(data) != "z\n" {
		t.Errorf("a file in memory, from outside: %q, %v", data, err)
	}
	if out, err := m.Output(t.Context(), "nonsense"); err == nil || !strings.Contains(out, `no program "nonsense"`) {
		t.Errorf("a program that does not exist: %q, %v", out, err)
	}
}

func TestPowerOffRebootWipe(t *testing.T) {
	s := create(t, config(t))
	m, other := add(t, s, 1), add(t, s, 2)
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	boot := run(t, m, "/bin/cat", "/proc/sys/kernel/random/boot_id")
	mac := run(t, m, "/bin/cat", "/sys/class/net/eth0/address")
	id := run(t, m, "/bin/cat", "/etc/machine-id")
	run(t, m, "/bin/sh", "-c", "echo disk > /var/lib/file; echo x > /run/file; echo x > /tmp/file; mount -t tmpfs none /mnt; (setsid sleep 1000 </dev/null >/dev/null 2>&1 &)")
	if err := m.Reboot(); err != nil {
		t.Fatal(err)
	}
	if _, err := name(t, other, 1); err == nil {
		t.Error("kedge runs after a reboot without having been started")
	}
	if out := run(t, m, "/bin/cat", "/var/lib/file"); out != "disk\n" {
		t.Errorf("the disk after a reboot: %q", out)
	}
	for _, gone := range []string{"ls /run/file", "ls /tmp/file", "grep /mnt /proc/mounts", "grep -l sleep /proc/[0-9]*/comm"} {
		if out, err := m.Output(t.Context(), "/bin/sh", "-c", gone); err == nil {
			t.Errorf("%s after a reboot: %s", gone, out)
		}
	}
	if now := run(t, m, "/bin/cat", "/proc/sys/kernel/random/boot_id"); now == boot {
		t.Error("the machine has the same boot as before")
	}
	if now := run(t, m, "/bin/cat", "/sys/class/net/eth0/address"); now != mac {
		t.Errorf("hardware address %s, before %s", now, mac)
	}
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	if err := m.Wipe(); err != nil {
		t.Fatal(err)
	}
	if m.On() {
		t.Error("a wiped machine is on")
	}
	if err := m.PowerOn(); err != nil {
		t.Fatal(err)
	}
	if out, err := m.Output(t.Context(), "/bin/cat", "/var/lib/file"); err == nil {
		t.Errorf("after wiping: %s", out)
	}
	if now := run(t, m, "/bin/cat", "/etc/machine-id"); now == id {
		t.Error("a wiped machine is the same")
	}
}

func TestKedgeIsStartedStoppedKilledAndPaused(t *testing.T) {
	s := create(t, config(t))
	m, other := add(t, s, 1), add(t, s, 2)
	if err := m.StartKedge("fail"); err != nil {
		t.Fatal(err)
	}
	if st, err := m.WaitKedge(); err != nil || st.Running || st.Ended != "exit code 3" {
		t.Errorf("it ended as %+v, %v", st, err)
	}
	if err := m.Kill(); err == nil {
		t.Error("what does not run can be killed")
	}
	if err := m.StartKedge("run", "flag"); err != nil {
		t.Fatal(err)
	}
	if err := m.StartKedge("run"); err == nil || !strings.Contains(err.Error(), "is already running") {
		t.Errorf("started twice: %v", err)
	}
	answers(t, other, 1)
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	if _, err := name(t, other, 1); err == nil {
		t.Error("a paused machine answers")
	}
	if err := m.Resume(); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	// What kedge has started goes on when kedge is killed.
	run(t, m, "/bin/sh", "-c", "(setsid sleep 1000 </dev/null >/dev/null 2>&1 &)")
	if err := m.Kill(); err != nil {
		t.Fatal(err)
	}
	if st, err := m.Kedge(); err != nil || st.Ended != "signal: killed" {
		t.Errorf("after Kill: %+v, %v", st, err)
	}
	run(t, m, "/bin/sh", "-c", "grep -l sleep /proc/[0-9]*/comm")
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	if err := m.SignalKedge(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if st, err := m.WaitKedge(); err != nil || st.Ended != "exit code 0" {
		t.Errorf("after SIGTERM: %+v, %v", st, err)
	}
	log, err := os.ReadFile(m.Log())
	if err != nil || !bytes.Contains(log, []byte("started with [run flag]")) {
		t.Errorf("log: %s, %v", log, err)
	}
	// A paused machine can be removed.
	if err := m.Pause(); err != nil {
		t.Fatal(err)
	}
	if err := m.Remove(); err != nil {
		t.Fatal(err)
	}
	if s.Machine("m1") != nil || len(s.Machines()) != 1 {
		t.Error("a removed machine is still there")
	}
}

// TestFaultsFromInside: what is wrong with a link is seen on the machines.
func TestFaultsFromInside(t *testing.T) {
	s := create(t, config(t))
	m, other := add(t, s, 1), add(t, s, 2)
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	h, err := m.Host()
	if err != nil {
		t.Fatal(err)
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	silent := func(what string) {
		t.Helper()
		if _, err := name(t, other, 1); err == nil {
			t.Errorf("%s: the machine answers", what)
		}
	}
	cable := host.CableOf(h)
	must(h.Cut())
	silent("cut")
	must(h.Restore())
	answers(t, other, 1)
	for what, f := range map[string][2]host.Fault{"deaf": {{}, {Loss: 1}}, "dumb": {{Loss: 1}, {}}} {
		must(cable.Impair(f[0], f[1]))
		silent(what)
		must(cable.Repair())
		answers(t, other, 1)
	}
	must(cable.Impair(host.Fault{Delay: 20 * time.Millisecond, Loss: 0.05, Duplicate: 0.1, Reorder: 0.1}, host.Fault{Delay: 20 * time.Millisecond}))
	answers(t, other, 1)
	must(cable.Repair())
	must(cable.Impair(host.Fault{Delay: 20 * time.Millisecond}, host.Fault{Delay: 20 * time.Millisecond}))
	begin := time.Now()
	answers(t, other, 1)
	if took := time.Since(begin); took < 80*time.Millisecond { // connecting and asking: two ways each
		t.Errorf("an answer over a slow link after %s", took)
	}
	must(cable.Repair())
	must(m.Renumber(addresses(3)))
	silent("renumbered")
	eventually(t, "an answer from the new address", func() error { _, err := name(t, other, 3); return err })
	must(m.Reboot())
	must(m.StartKedge("run"))
	eventually(t, "an answer from the new address", func() error { _, err := name(t, other, 3); return err })
}

// TestPortsAndHost: this machine reaches the others, and publishes a port of theirs.
func TestPortsAndHost(t *testing.T) {
	c := config(t)
	c.Host = []netip.Prefix{netip.MustParsePrefix("10.213.98.254/24")}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c.Ports = []Port{{Listen: netip.MustParseAddrPort(l.Addr().String()), To: 80}}
	if os.Geteuid() == 0 {
		if s, err := Create(c); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("a port that is in use: %v", err)
			s.Remove()
		}
	}
	l.Close()
	s := create(t, c)
	m := add(t, s, 1)
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	for _, url := range []string{"http://10.213.98.1/", "http://" + c.Ports[0].Listen.String()} {
		eventually(t, url, func() error {
			resp, err := http.Get(url)
			if err != nil {
				return err
			}
			defer resp.Body.Close()
			if body, err := io.ReadAll(resp.Body); err != nil || string(body) != "m1" {
				return fmt.Errorf("%q, %v", body, err)
			}
			return nil
		})
	}
}

// TestAnotherProcess: a site goes on without the process that made it, and another
// finds everything.
func TestAnotherProcess(t *testing.T) {
	c := config(t)
	c.Host = []netip.Prefix{netip.MustParsePrefix("10.213.98.254/24")}
	s := create(t, c)
	m := add(t, s, 1)
	other := add(t, s, 2)
	if err := m.StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, other, 1)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := Open(c.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if all := again.Machines(); len(all) != 2 || all[0].Name() != "m1" || all[0].Addrs()[0] != addresses(1)[0] {
		t.Fatalf("machines %v", all)
	}
	// Both the switch and this machine's way to it go on.
	for range 20 {
		pids, err := cgroup.Processes(again.switchGroup())
		if err != nil || len(pids) != 1 {
			t.Fatalf("supervisors of the switch: %v, %v", pids, err)
		}
		resp, err := http.Get("http://10.213.98.1/")
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		time.Sleep(10 * time.Millisecond)
	}
	answers(t, again.Machine("m2"), 1)
	if err := again.Machine("m1").Reboot(); err != nil {
		t.Fatal(err)
	}
	if err := again.Machine("m1").StartKedge("run"); err != nil {
		t.Fatal(err)
	}
	answers(t, again.Machine("m2"), 1)
	// All of it is gone but the record, as after a reboot of this machine.
	for _, m := range again.Machines() {
		if err := m.PowerOff(); err != nil {
			t.Fatal(err)
		}
	}
	add(t, again, 3)
}

const victimVar = "KEDGE_TEST_VICTIM"

// actVictim makes machines until it is killed.
func actVictim(dir string) int {
	self, err := os.Executable()
	if err != nil {
		fmt.Println(err)
		return 1
	}
	s, err := Create(Config{Dir: dir, Program: self, Supervisor: self, Tethered: strings.HasSuffix(dir, "tethered"), Host: []netip.Prefix{netip.MustParsePrefix("10.213.98.254/24")}})
	for n := 1; err == nil; n++ {
		fmt.Println("made", n-1)
		var m *Machine
		if m, err = s.Add(fmt.Sprint("m", n), addresses(n)); err == nil {
			err = m.PowerOn()
		}
		if err == nil {
			err = m.StartKedge("run")
		}
	}
	fmt.Println(err)
	return 1
}

// TestToolIsKilled: whenever the process that makes machines is killed, Remove finds
// all of it; of a tethered site nothing runs even before.
func TestToolIsKilled(t *testing.T) {
	cleanAfter(t)
	for i, kind := range []string{"site", "tethered", "site", "tethered", "site", "tethered"} {
		dir := filepath.Join(t.TempDir(), kind)
		cmd := exec.Command("/proc/self/exe")
		cmd.Env = append(os.Environ(), victimVar+"="+dir)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// It prints after each machine; kill it in the middle of the next.
		buf := make([]byte, 64)
		for range i/2 + 1 {
			if n, err := out.Read(buf); err != nil || !bytes.HasPrefix(buf, []byte("made")) {
				t.Errorf("it says %q, %v", buf[:n], err)
			}
		}
		time.Sleep(time.Duration(i*7) * time.Millisecond)
		cmd.Process.Kill()
		cmd.Wait()
		if kind == "tethered" {
			eventually(t, "the end of a tethered site", func() error {
				r, err := load(dir)
				if err != nil {
					return err
				}
				procs, _ := filepath.Glob("/sys/fs/cgroup/*" + r.cgroup() + "/*/cgroup.procs")
				more, _ := filepath.Glob("/sys/fs/cgroup/*" + r.cgroup() + "/*/*/cgroup.procs")
				for _, p := range append(procs, more...) {
					if data, _ := os.ReadFile(p); len(data) > 0 {
						return fmt.Errorf("%s: %s", p, data)
					}
				}
				return nil
			})
		}
		for range 2 { // the second time there is nothing
			if err := Remove(dir); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", dir, err)
		}
	}
}

func TestBadInput(t *testing.T) {
	c := config(t)
	for want, change := range map[string]func(*Config){
		"absolute":   func(c *Config) { c.Dir = "x" },
		"no such":    func(c *Config) { c.Program = "/nonexistent" },
		"executable": func(c *Config) { c.Supervisor = "/" },
		"ports can":  func(c *Config) { c.Ports = []Port{{}} },
	} {
		bad := c
		change(&bad)
		if _, err := Create(bad); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	s := create(t, c)
	for _, bad := range []string{"", "A", "a_b", "-a", "switch", "../x", strings.Repeat("x", 64)} {
		if _, err := s.Add(bad, nil); err == nil {
			t.Errorf("a machine with the name %q", bad)
		}
	}
	if _, err := Create(c); err == nil {
		t.Error("two sites in one folder")
	}
	m, err := s.Add("m1", addresses(1))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Add("m1", addresses(1)); err == nil {
		t.Error("two machines of one name")
	}
	if _, err := m.Output(t.Context(), "true"); !errors.Is(err, ErrOff) {
		t.Errorf("a command on a machine that is off: %v", err)
	}
	if err := m.StartKedge(); !errors.Is(err, ErrOff) {
		t.Errorf("kedge on a machine that is off: %v", err)
	}
}

// TestThreadsComeHome: no thread of this process stays on a machine.
func TestThreadsComeHome(t *testing.T) {
	s := create(t, config(t))
	m := add(t, s, 1)
	home, err := namespaces.ProbeNetwork("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	for range 32 {
		go func() {
			_, err := m.Output(context.Background(), "/bin/true")
			done <- err
		}()
	}
	for range 32 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	eventually(t, "threads", func() error {
		tasks, err := os.ReadDir("/proc/self/task")
		for _, task := range tasks {
			id, err := namespaces.ProbeNetwork("/proc/self/task/" + task.Name() + "/ns/net")
			if err == nil && id != home {
				return fmt.Errorf("thread %s is still there", task.Name())
			}
		}
		return err
	})
}
