package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	testimage "kedge/internal/test/image"
)

// composition is a way to compose Kubernetes.
type composition interface {
	name() string
	// prepare makes the preparations that are not measured, on an empty machine.
	prepare(ctx context.Context, images string) error
	// startIn makes all processes of the composition start in a folder of the cgroup hierarchy. Their shims
	// stay there; pods have cgroups of their own.
	startIn(group string)
	// start returns when the first process has started.
	start(ctx context.Context) error
	// client returns an error as long as there are no credentials.
	client() (*kubernetes.Clientset, error)
	// processes returns the processes that are measured: no shims, no containers.
	processes() []int
	// failed returns the reason why the composition cannot become ready any more.
	failed() error
	stop() error
	// remove ends all processes and removes all traces.
	remove() error
	sizes(r *report) error
	tail(lines int) string
}

// image is the image of the measured pods: a shell and its tools, imported like any bundled image.
const image = "docker.io/library/bench:1"

// pauseImage is the sandbox image of the plain composition; kedge has its own.
const pauseImage = "registry.k8s.io/pause:bench"

func writeImages(path, pause string) error {
	box, err := testimage.NewBusybox(image)
	if err != nil {
		return err
	}
	program, err := os.ReadFile(pause)
	if err != nil {
		return err
	}
	sandbox := testimage.Image{Name: pauseImage, Files: map[string]testimage.File{"/pause": {Data: program, Mode: 0o755}}, Entrypoint: []string{"/pause"}}
	// The measured pods do nothing, and exit on a signal.
	box.Files["/pause"] = testimage.File{Data: program, Mode: 0o755}
	box.Cmd = []string{"/pause"}
	return testimage.WriteFile(path, testimage.Docker, box, sandbox)
}

// process is a program that the benchmark has started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has exited
	err  error         // valid after done
}

// launch starts a program, in a cgroup folder if one is given.
func launch(log, group string, env []string, argv ...string) (*process, error) {
	if group != "" {
		argv = append([]string{"/bin/sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(group, "cgroup.procs")}, argv...)
	}
	f, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = f, f
	cmd.Env = append(os.Environ(), env...)
	// An interrupt at the terminal is handled by the benchmark, which then cleans up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	p := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

func (p *process) failed() error {
	if p == nil || !p.ended() {
		return nil
	}
	return fmt.Errorf("%s exited: %w", filepath.Base(p.cmd.Path), errors.Join(p.err, errors.New("unexpectedly")))
}

// end sends SIGTERM first.
func (p *process) end() error {
	if p == nil || p.ended() {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return nil
	case <-time.After(20 * time.Second):
	}
	_ = p.cmd.Process.Kill()
	<-p.done
	return fmt.Errorf("%s did not exit after a signal", filepath.Base(p.cmd.Path))
}

// clientFrom returns a client without rate limits.
func clientFrom(kubeconfig string) (*kubernetes.Clientset, error) {
	cfg, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return nil, err
	}
	cfg.QPS = -1
	cfg.WarningHandler = rest.NoWarnings{}
	return kubernetes.NewForConfig(cfg)
}

func tailOf(path string, lines int) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// appendFile saves a log before its folder is removed.
func appendFile(to, from string) error {
	if to == "" {
		return nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return errors.Join(err, f.Close())
}

// below returns the processes with dir in their command line, except this process.
func below(dir string) []int {
	var out []int
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil || !bytes.Contains(data, []byte(dir+"/")) {
			continue
		}
		var pid int
		if _, err := fmt.Sscanf(f, "/proc/%d/", &pid); err == nil && pid != os.Getpid() {
			out = append(out, pid)
		}
	}
	return out
}
