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

	"kedge/internal/testimage"
)

// composition is one way to put Kubernetes together.
type composition interface {
	name() string
	// prepare does what is not measured, on an empty machine.
	prepare(ctx context.Context, images string) error
	// startIn makes all processes of the composition start in a folder of a control
	// group's hierarchy; their shims stay there, pods do not.
	startIn(group string)
	// start returns when the first process has been started.
	start(ctx context.Context) error
	// client fails as long as there are no credentials.
	client() (*kubernetes.Clientset, error)
	// processes are those whose memory and work count: no shims, no containers.
	processes() []int
	// failed says why it cannot become ready any more.
	failed() error
	stop() error
	// remove ends whatever still runs and removes every trace.
	remove() error
	sizes(r *report) error
	tail(lines int) string
}

// image is what the measured pods run: a shell and its tools, to be imported like
// any bundled image.
const image = "docker.io/library/bench:1"

// pauseImage is what the plain composition uses for sandboxes; kedge has its own.
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
	// The measured pods do nothing and end when they are told to.
	box.Files["/pause"] = testimage.File{Data: program, Mode: 0o755}
	box.Cmd = []string{"/pause"}
	return testimage.WriteFile(path, testimage.Docker, box, sandbox)
}

// process is a program that this one has started.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // valid after done
}

// launch starts a program, in a control group's folder if one is given.
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
	// An interrupt at the terminal is for the benchmark, which then cleans up.
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
	return fmt.Errorf("%s ended: %w", filepath.Base(p.cmd.Path), errors.Join(p.err, errors.New("unexpectedly")))
}

// end asks nicely first.
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
	return fmt.Errorf("%s did not end when it was told to", filepath.Base(p.cmd.Path))
}

// clientFrom makes a client that is not slowed down.
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

// appendFile keeps a log beyond the life of its folder.
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

// below are the processes with dir in their command line, besides this one.
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
