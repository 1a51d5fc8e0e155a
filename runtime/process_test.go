package runtime

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/mounts"
)

// childEnv makes the test program run a node's containers instead of tests, so that
// stopping, killing and starting again are done to a real process.
const childEnv = "KEDGE_TEST_RUNTIME_CONFIG"

func child(text string) error {
	var cfg Config
	if err := json.Unmarshal([]byte(text), &cfg); err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	r, images := New(cfg, log), NewImages(cfg, log)
	for {
		err := serve(ctx, r, images)
		if ctx.Err() != nil {
			return err
		}
		// It is started again in the same process, as kedge does.
		fmt.Println("failed:", err)
	}
}

// serve runs both until ctx ends or one of them fails.
func serve(ctx context.Context, r *Runtime, images *Images) error {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan error, 2)
	running := 1
	ready := make(chan struct{})
	go func() { ended <- r.Run(ctx, func() { close(ready) }) }()
	var errs []error
	for running > 0 {
		select {
		case <-ready:
			ready = nil
			running++
			fmt.Println("ready")
			go func() { ended <- images.Run(ctx, func() { fmt.Println("imported") }) }()
		case err := <-ended:
			running--
			if err == nil && ctx.Err() == nil {
				err = errors.New("ended early")
			}
			errs = append(errs, err)
			cancel()
		}
	}
	cancel()
	return errors.Join(errs...)
}

// node is a directory pair and, between start and stop, a process that serves it.
type node struct {
	t      *testing.T
	cfg    Config
	cmd    *exec.Cmd
	lines  chan string
	logged *os.File
}

func newNode(t *testing.T) *node {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("runs containers, which needs root")
	}
	if _, err := embeddedPayload(); err != nil {
		t.Skipf("needs scripts/build-payload.sh to have run: %v", err)
	}
	// Short, and not the test's own temporary folder: sockets are made in it.
	dir, err := os.MkdirTemp("/tmp", "krt")
	if err != nil {
		t.Fatal(err)
	}
	cfg := DefaultConfig()
	cfg.NodeName = "test"
	cfg.DataDir = filepath.Join(dir, "data")
	cfg.RunDir = filepath.Join(dir, "run")
	cfg.CNIConfDir = filepath.Join(dir, "run/cni/net.d")
	cfg.CNIBinDir = filepath.Join(dir, "run/cni/bin")
	cfg.RegistriesFile = filepath.Join(dir, "registries.yaml")
	n := &node{t: t, cfg: cfg}
	t.Cleanup(func() {
		n.kill()
		log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelError}))
		if err := KillAll(context.Background(), cfg, log); err != nil {
			t.Errorf("clean up: %v", err)
		}
		if t.Failed() && n.logged != nil {
			text, _ := os.ReadFile(n.logged.Name())
			t.Logf("log of the node:\n%s", tail(string(text), 60))
		}
		if err := mounts.DetachBelow(dir); err != nil {
			t.Error(err)
		}
		n.removeCgroup()
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return n
}

// cgroup is the parent of the pods' cgroups, which the kubelet makes and removes
// where there is one.
func (n *node) cgroup() string { return "/kedge-test-" + filepath.Base(filepath.Dir(n.cfg.DataDir)) }

func (n *node) removeCgroup() {
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		found, _ := filepath.Glob(pattern + n.cgroup())
		for _, dir := range found {
			var dirs []string
			filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			slices.Reverse(dirs)
			for _, d := range dirs {
				if err := os.Remove(d); err != nil && !errors.Is(err, os.ErrNotExist) {
					n.t.Errorf("left behind: %v", err)
				}
			}
		}
	}
}

// start runs the process with an empty PATH and returns when it has said ready.
func (n *node) start() {
	n.t.Helper()
	text, err := json.Marshal(n.cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	if n.logged == nil {
		n.logged, err = os.Create(filepath.Join(filepath.Dir(n.cfg.DataDir), "log"))
		if err != nil {
			n.t.Fatal(err)
		}
	}
	n.cmd = exec.Command("/proc/self/exe")
	n.cmd.Env = []string{childEnv + "=" + string(text), "PATH="}
	n.cmd.Stderr = n.logged
	// A test that is killed takes its node along; pods stay, as they should.
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		n.t.Fatal(err)
	}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	lines := make(chan string, 10)
	n.lines = lines
	go func() {
		defer close(lines)
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	n.expect("ready")
}

func (n *node) expect(want string) {
	n.t.Helper()
	select {
	case line, ok := <-n.lines:
		if !ok || line != want {
			n.t.Fatalf("node said %q, want %q", line, want)
		}
	case <-time.After(60 * time.Second):
		n.t.Fatalf("node did not say %q within a minute", want)
	}
}

// stop ends the process the polite way and demands that it succeeds.
func (n *node) stop() {
	n.t.Helper()
	n.cmd.Process.Signal(syscall.SIGTERM)
	if err := n.wait(); err != nil {
		n.t.Fatalf("node: %v", err)
	}
}

// kill ends the process as a crash does.
func (n *node) kill() {
	if n.cmd == nil {
		return
	}
	n.cmd.Process.Kill()
	n.wait()
}

// wait returns how the process ended, when it has.
func (n *node) wait() error {
	for range n.lines {
	}
	err := n.cmd.Wait()
	n.cmd = nil
	return err
}

func tail(text string, lines int) string {
	all := strings.Split(strings.TrimSpace(text), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}
