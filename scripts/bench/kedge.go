package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"k8s.io/client-go/kubernetes"
)

// kedgeNode is a kedge with its own directories and ports.
type kedgeNode struct {
	o   options
	dir string
	p   *process

	group string // cgroup in which it starts
}

func newKedge(o options) *kedgeNode { return &kedgeNode{o: o, dir: filepath.Join(o.dir, "k")} }

func (k *kedgeNode) name() string       { return "kedge" }
func (k *kedgeNode) dataDir() string    { return filepath.Join(k.dir, "data") }
func (k *kedgeNode) runDir() string     { return filepath.Join(k.dir, "run") }
func (k *kedgeNode) kubeconfig() string { return filepath.Join(k.dir, "kubeconfig") }
func (k *kedgeNode) log() string        { return filepath.Join(k.dir, "log") }

func (k *kedgeNode) args() []string {
	return []string{
		"--config=" + filepath.Join(k.dir, "config.yaml"), "--private-registry=" + filepath.Join(k.dir, "registries.yaml"),
		"--data-dir=" + k.dataDir(), "--run-dir=" + k.runDir(), "--write-kubeconfig=" + k.kubeconfig(), "--node-name=bench",
		fmt.Sprint("--https-listen-port=", k.o.port), fmt.Sprint("--kubelet-port=", k.o.port+1),
	}
}

func (k *kedgeNode) prepare(_ context.Context, images string) error {
	dir := filepath.Join(k.dataDir(), "images")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(k.dir, "config.yaml"), []byte("# of a benchmark\n"), 0o600); err != nil {
		return err
	}
	return os.Link(images, filepath.Join(dir, "images.tar"))
}

func (k *kedgeNode) start(context.Context) error {
	// Otherwise it might use a program unpacked by another kedge on this machine.
	env := []string{"HOME=" + k.dir, "XDG_CACHE_HOME=", "TMPDIR=" + k.dir}
	var err error
	k.p, err = launch(k.log(), k.group, env, append([]string{k.o.kedge, "server"}, k.args()...)...)
	return err
}

func (k *kedgeNode) client() (*kubernetes.Clientset, error) { return clientFrom(k.kubeconfig()) }
func (k *kedgeNode) startIn(group string)                   { k.group = group }
func (k *kedgeNode) processes() []int                       { return []int{k.p.cmd.Process.Pid} }
func (k *kedgeNode) failed() error                          { return k.p.failed() }
func (k *kedgeNode) stop() error                            { return k.p.end() }
func (k *kedgeNode) tail(lines int) string                  { return tailOf(k.log(), lines) }

func (k *kedgeNode) remove() error {
	if _, err := os.Stat(k.dir); err != nil {
		return nil
	}
	errs := []error{k.p.end()}
	if out, err := exec.Command(k.o.kedge, append([]string{"killall"}, k.args()...)...).CombinedOutput(); err != nil {
		errs = append(errs, fmt.Errorf("killall: %w: %s", err, out))
	}
	if k.p != nil {
		errs = append(errs, appendFile(k.o.keepLog, k.log()))
	}
	return errors.Join(append(errs, os.RemoveAll(k.dir))...)
}

func (k *kedgeNode) sizes(r *report) error {
	st, err := os.Stat(k.o.kedge)
	if err != nil {
		return fmt.Errorf("run make build: %w", err)
	}
	r.add(figure{"executables", "MB"}, k.name(), float64(st.Size())/1e6)
	if st, err = os.Stat(k.o.program); err == nil {
		r.add(figure{"executables, unpacked", "MB"}, k.name(), float64(st.Size())/1e6)
	}
	return nil
}
