package preflight

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/hostfirewall"
	"kedge/internal/test/host"
)

// goodMachine is one on which every check is content.
func goodMachine() (Config, probes) {
	c := DefaultConfig()
	c.BuildDate = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	files := map[string]string{
		"/proc/self/status":                       "Name:\tkedge\nCapEff:\t000001ffffffffff\n",
		"/proc/sys/user/max_user_namespaces":      "15000\n",
		"/sys/fs/cgroup/cgroup.controllers":       "cpuset cpu io memory hugetlb pids\n",
		"/proc/cgroups":                           "",
		"/proc/meminfo":                           "MemTotal:        2048000 kB\nMemFree: 1 kB\n",
		"/proc/swaps":                             "Filename Type Size Used Priority\n",
		"/proc/sys/fs/inotify/max_user_instances": "8192\n",
		"/proc/sys/fs/inotify/max_user_watches":   "524288\n",
	}
	return c, probes{
		readFile: func(path string) ([]byte, error) {
			if text, ok := files[path]; ok {
				return []byte(text), nil
			}
			return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
		},
		statfs: func(path string) (fsInfo, error) {
			if path == "/sys/fs/cgroup" {
				return fsInfo{kind: unix.CGROUP2_SUPER_MAGIC}, nil
			}
			return fsInfo{kind: unix.EXT4_SUPER_MAGIC, size: 100 * gibi, free: 50 * gibi, inodes: 1000, avail: 500}, nil
		},
		euid:          func() int { return 0 },
		hostname:      func() (string, error) { return "Node-1.example", nil },
		now:           func() time.Time { return c.BuildDate.AddDate(0, 1, 0) },
		clockSynced:   func() (bool, error) { return true, nil },
		openFileLimit: func() (uint64, error) { return 1 << 20, nil },
		memoryLimit:   func() (int64, bool) { return 0, false },
		readable:      func(string) error { return nil },
		writable:      func(string) error { return nil },
		inPath:        func(string) error { return nil },
		tryFiles:      func(string) error { return nil },
		tryNamespace:  func(int) error { return nil },
		tryInotify:    func(int) error { return nil },
		trySeccomp:    func() error { return nil },
		tryOverlay:    func(string) error { return nil },
		tryLink:       func(string) error { return nil },
		tryNft:        func(nftFeature) error { return nil },
		tryConntrack:  func() error { return nil },
		dropsPods:     func(Config) ([]hostfirewall.Drop, error) { return nil, nil },
		defaultRoute:  func() (bool, error) { return true, nil },
		routes:        func() ([]route, error) { return nil, nil },
		listen:        func(string, string) error { return nil },
	}
}

// unreadable makes opening one path fail.
func (p *probes) unreadable(path string, err error) {
	open := p.readable
	p.readable = func(name string) error {
		if name == path {
			return err
		}
		return open(name)
	}
}

// file makes one path read as text.
func (p *probes) file(path, text string) {
	read := p.readFile
	p.readFile = func(name string) ([]byte, error) {
		if name == path {
			return []byte(text), nil
		}
		return read(name)
	}
}

// disk changes what statfs says of everything but the control groups.
func (p *probes) disk(info fsInfo) {
	stat := p.statfs
	p.statfs = func(path string) (fsInfo, error) {
		if strings.HasPrefix(path, "/sys/") {
			return stat(path)
		}
		return info, nil
	}
}

func TestGoodMachine(t *testing.T) {
	c, p := goodMachine()
	results := run(t.Context(), c, p)
	if len(results) != len(checks()) {
		t.Errorf("%d results of %d checks", len(results), len(checks()))
	}
	for _, r := range results {
		if r.Level != OK || r.Message == "" || r.Remedy != "" {
			t.Errorf("%+v", r)
		}
	}
	if err := verdict(results); err != nil {
		t.Error(err)
	}
}

func TestMissingNamesEverything(t *testing.T) {
	c, p := goodMachine()
	p.unreadable("/dev/kmsg", unix.EPERM)
	p.trySeccomp = func() error { return unix.ENOSYS }
	err := verdict(run(t.Context(), c, p))
	var missing *Missing
	if !errors.As(err, &missing) || len(missing.Results) != 2 {
		t.Fatalf("verdict: %v", err)
	}
	for _, part := range []string{"kernel-log: ", "/dev/kmsg", "seccomp: ", "CONFIG_SECCOMP_FILTER"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error does not say %q: %v", part, err)
		}
	}
}

func TestWithoutPrivilegesNothingElseIsSaid(t *testing.T) {
	c, p := goodMachine()
	p.euid = func() int { return 1 }
	p.trySeccomp = func() error { return unix.EPERM }
	var missing *Missing
	if err := verdict(run(t.Context(), c, p)); !errors.As(err, &missing) || len(missing.Results) != 1 || missing.Results[0].Check != privileges {
		t.Errorf("verdict: %v", err)
	}
}

func TestResultAsJSON(t *testing.T) {
	got, err := json.Marshal([]Result{{"ports", Error, "m", "r"}, {"swap", OK, "m", ""}})
	if err != nil {
		t.Fatal(err)
	}
	want := `[{"check":"ports","level":"error","message":"m","remedy":"r"},{"check":"swap","level":"ok","message":"m"}]`
	if string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c, p := goodMachine()
	if results := run(ctx, c, p); len(results) != 0 {
		t.Errorf("%d results after cancellation", len(results))
	}
}

func TestDefaultRouteTables(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		want       bool
	}{
		{"IPv4", "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\neth0\t00000000\t010200C0\t0003\t0\t0\t0\t00000000\t0\t0\t0\n", true},
		{"IPv4, link only", "eth0\t000200C0\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0\n", false},
		{"IPv6", strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 fd000000000000000000000000000001 00000400 00000002 00000000 00000003     eth0\n", true},
		{"IPv6, unreachable", strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " 00 " + strings.Repeat("0", 32) + " ffffffff 00000001 00000000 00200200       lo\n", false},
	} {
		if got := hasDefaultRoute(tc.text); got != tc.want {
			t.Errorf("%s: %v, want %v", tc.name, got, tc.want)
		}
	}
}

// TestThisMachine does the real trials: they must work where the tests of the
// network do, and leave nothing behind.
func TestThisMachine(t *testing.T) {
	host.RequireIsolation(t)
	dir := t.TempDir()
	before := countFiles(t, dir)
	c := Config{DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), VXLAN: true, IPv6: true,
		Ports: []Port{{6443, "tcp", "API server"}, {8472, "udp", "VXLAN"}}}
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	results := Run(t.Context(), c)
	for _, r := range results {
		t.Logf("%-20s %-8s %s; %s", r.Check, r.Level, r.Message, r.Remedy)
	}
	for _, name := range []string{"namespaces", "seccomp", "data-directory", "run-directory", "links", "nftables", "connection-tracking", "ports"} {
		for _, r := range results {
			if r.Check == name && r.Level == Error {
				t.Errorf("%s: %s", name, r.Message)
			}
		}
	}
	if after := countFiles(t, dir); after != before {
		t.Errorf("%d files and directories, %d before", after, before)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir) {
		t.Error("a mount is left behind")
	}
	// The trials meant to fail do.
	if err := tryLink("nonsense"); err == nil {
		t.Error("an interface of no kind can be made")
	}
	l, err := listenSomewhere()
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	busy := Config{DataDir: dir, RunDir: dir, Ports: []Port{{l.port, "tcp", "test"}}}
	var found bool
	for _, r := range Run(t.Context(), busy) {
		found = found || r.Check == "ports" && r.Level == Error
	}
	if !found {
		t.Error("a port in use is not found")
	}
}

func countFiles(t *testing.T, dir string) int {
	t.Helper()
	n := 0
	err := filepath.WalkDir(dir, func(string, fs.DirEntry, error) error { n++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestValidate(t *testing.T) {
	c := DefaultConfig()
	if err := c.Validate(); err != nil {
		t.Error(err)
	}
	c.Ports = append(c.Ports, Port{0, "tcp", "x"}, Port{1, "icmp", "x"})
	if err := c.Validate(); err == nil || strings.Count(fmt.Sprint(err), "does not exist") != 2 {
		t.Errorf("Validate: %v", err)
	}
}

type busyPort struct {
	net.Listener
	port int
}

func listenSomewhere() (busyPort, error) {
	l, err := net.Listen("tcp", ":0")
	if err != nil {
		return busyPort{}, err
	}
	return busyPort{l, l.Addr().(*net.TCPAddr).Port}, nil
}

func BenchmarkRun(b *testing.B) {
	host.RequireIsolation(b)
	c := Config{DataDir: b.TempDir(), RunDir: b.TempDir(), VXLAN: true}
	for b.Loop() {
		Run(b.Context(), c)
	}
}

// What a trial left that was cut short goes with the next; one that is under way is left alone.
func TestTrialsSweep(t *testing.T) {
	dir := t.TempDir()
	old, young := filepath.Join(dir, trialFile+"1"), filepath.Join(dir, trialFile+"2")
	for _, d := range []string{old, young} {
		if err := os.MkdirAll(filepath.Join(d, "work"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	hourAgo := time.Now().Add(-time.Hour)
	if err := os.Chtimes(old, hourAgo, hourAgo); err != nil {
		t.Fatal(err)
	}
	if err := tryFiles(dir); err != nil {
		t.Fatal(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 || left[0].Name() != filepath.Base(young) {
		t.Errorf("left are %v, %v", left, err)
	}
}
