package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/namespaces"
	"kedge/throwaway/machine"
)

// Node is a kedge under test and the clients of its cluster.
type Node struct {
	Name       string              // of the node, of its control group and of its tables
	Dir        string              // everything of it is below
	Flags      []string            // besides those that make it independent of other nodes
	Env        []string            // of its process; nil: the test's own
	World      *World              // in place of the machine as it is, when not nil
	Network    *namespaces.Network // in place of the machine's own, when not nil
	Machine    *machine.Machine    // on which it runs, with directories of its own; nil for this one
	Program    string              // in place of [Binary], when not empty: a path on its machine
	Agent      bool                // "kedge agent" in place of "kedge server": no API and no clients
	Witness    bool                // of --witness: no API and no clients
	APIPort    int                 // the kubelet's is the next one
	Kubeconfig string              // the path of the administrator's

	Cmd  *exec.Cmd     // the process; nil before the first start
	Done chan struct{} // closed when the process has ended
	Err  error         // how it ended; valid after done

	etcd          *Etcd    // its datastore, if the run has external ones
	networkBefore []string // traces of others in its network before it first started

	// For the API, as the administrator; nil until the node was ready once, and always for an agent.
	Client *kubernetes.Clientset
	Config *rest.Config
}

var (
	sharedOnce sync.Once
	sharedNode *Node
	sharedErr  error
)

// Shared is the node that most tests use. Tests must not stop it.
func Shared(t *testing.T) *Node {
	t.Helper()
	sharedOnce.Do(func() {
		n := NewNode("e2e")
		n.Flags = append(n.Flags, "--node-label=kedge.test/label=yes")
		if sharedErr = PrepareImages(n.DataDir()); sharedErr != nil {
			return
		}
		sharedNode = n
		sharedErr = n.Start()
	})
	if sharedErr != nil {
		t.Fatalf("the shared node: %v", sharedErr)
	}
	return sharedNode
}

// ownSlots is how many nodes besides the shared one run at a time: more than the
// machine's processors can boot would only slow each other down, and the kernel's
// default of 128 inotify instances is enough for five or so.
var ownSlots = make(chan struct{}, 3)

// TakeSlot waits until the machine has room for one more node, which the test has until it ends.
func TakeSlot(t *testing.T) {
	ownSlots <- struct{}{}
	t.Cleanup(func() { <-ownSlots })
}

// Own makes a node for one test, not yet started. It and all it left are gone
// when the test ends.
func Own(t *testing.T, flags ...string) *Node {
	t.Helper()
	TakeSlot(t)
	n := NewNode(strings.ToLower(strings.NewReplacer("Test", "", "/", "", "_", "").Replace(t.Name())))
	// Nodes that run at the same time share the machine's routes.
	n.Flags = append([]string{
		fmt.Sprintf("--cluster-cidr=10.%d.0.0/16", 100+n.APIPort/2%100),
		fmt.Sprintf("--service-cidr=10.%d.0.0/16", 200+n.APIPort/2%50),
	}, flags...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the node:\n%s", n.Tail(60))
		}
		if err := n.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return n
}

// NewNode makes a node with ports and folders of its own, not yet started. The caller destroys it.
func NewNode(name string) *Node {
	port := int(lastPort.Add(2))
	if len(name) > 10 { // or the run directory is too long for sockets in it
		name = name[:10]
	}
	name = fmt.Sprint(name, "-", port) // it is in cgroups and rules, which other runs have too
	n := &Node{Name: name, Dir: filepath.Join(BaseDir, name), APIPort: port, Env: BareEnv()}
	n.Kubeconfig = filepath.Join(n.Dir, "kubeconfig")
	return n
}

// BareEnv is the environment of nodes under test: kedge must not need a program of the host,
// so it finds none.
func BareEnv() []string { return []string{"HOME=/root", "PATH="} }

// LogFile is where the output of the node's process is.
func (n *Node) LogFile() string { return filepath.Join(n.Dir, "log") }

// DataDir is where the test finds what the node finds in its data directory.
func (n *Node) DataDir() string {
	if n.Machine != nil {
		return n.Machine.Disk("/var/lib/kedge")
	}
	return filepath.Join(n.Dir, "data")
}

// RunDir is where the test finds what the node finds in its run directory.
func (n *Node) RunDir() string {
	if n.Machine == nil {
		return filepath.Join(n.Dir, "run")
	}
	dir, err := n.Machine.Live("/run/kedge")
	if err != nil {
		return "/nonexistent" // the machine is off
	}
	return dir
}

// Args are the flags that make this node independent of all others.
func (n *Node) Args() []string {
	if n.Witness && n.Machine != nil {
		return append([]string{"--witness", "--node-name=" + n.Name}, n.Flags...)
	}
	if n.Machine != nil { // everything is where it usually is
		args := []string{"--node-name=" + n.Name, fmt.Sprint("--kubelet-port=", n.APIPort+1)}
		if !n.Agent {
			args = append(args, fmt.Sprint("--https-listen-port=", n.APIPort))
		}
		return append(args, n.Flags...)
	}
	if n.Witness {
		return append([]string{
			"--witness", "--config=" + filepath.Join(n.Dir, "config.yaml"), "--data-dir=" + n.DataDir(), "--run-dir=" + n.RunDir(), "--node-name=" + n.Name,
		}, n.Flags...)
	}
	if n.Agent {
		return append([]string{
			"--config=" + filepath.Join(n.Dir, "config.yaml"), "--data-dir=" + n.DataDir(), "--run-dir=" + n.RunDir(),
			"--node-name=" + n.Name, fmt.Sprint("--kubelet-port=", n.APIPort+1), "--private-registry=" + filepath.Join(n.Dir, "registries.yaml"),
		}, n.Flags...)
	}
	return append([]string{
		"--config=" + filepath.Join(n.Dir, "config.yaml"), "--data-dir=" + n.DataDir(), "--run-dir=" + n.RunDir(), "--write-kubeconfig=" + n.Kubeconfig,
		"--node-name=" + n.Name, fmt.Sprint("--https-listen-port=", n.APIPort), fmt.Sprint("--kubelet-port=", n.APIPort+1),
		"--private-registry=" + filepath.Join(n.Dir, "registries.yaml"),
	}, n.Flags...)
}

// Launch starts the process and returns at once.
func (n *Node) Launch() error {
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		return err
	}
	if err := n.giveEtcd(); err != nil {
		return fmt.Errorf("start the etcd of %s: %w", n.Name, err)
	}
	config := filepath.Join(n.Dir, "config.yaml")
	if _, err := os.Stat(config); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(config, []byte("# of a test\n"), 0o600); err != nil {
			return err
		}
	}
	if err := n.Remember(); err != nil {
		return err
	}
	if n.networkBefore == nil && n.Machine == nil {
		before, err := n.networkTraces()
		if err != nil {
			return err
		}
		n.networkBefore = before
	}
	log, err := os.OpenFile(n.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	role := "server"
	if n.Agent {
		role = "agent"
	}
	cmd := n.kedgeCommand(append([]string{role}, n.Args()...)...)
	switch {
	case n.Program != "" && n.Machine != nil:
		cmd.Args[1] = n.Program
	case n.Program != "":
		cmd.Path = n.Program
	}
	cmd.Stdout, cmd.Stderr = log, log
	// The node must not end with the test's terminal, nor its signals reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.begin(cmd); err != nil {
		return err
	}
	n.Cmd, n.Done = cmd, make(chan struct{})
	done := n.Done
	go func() {
		n.Err = cmd.Wait()
		close(done)
	}()
	return nil
}

// Start launches the node and waits until all of it is ready.
func (n *Node) Start() error {
	if err := n.Launch(); err != nil {
		return err
	}
	return n.WaitReady(90 * time.Second)
}

func (n *Node) WaitReady(limit time.Duration) error {
	deadline := time.Now().Add(Patient(limit))
	for {
		if exec.Command(Binary(), "status", "--run-dir="+n.RunDir()).Run() == nil {
			break
		}
		select {
		case <-n.Done:
			return fmt.Errorf("kedge ended: %v\n%s", n.Err, n.Tail(20))
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			out, _ := exec.Command(Binary(), "status", "--run-dir="+n.RunDir()).CombinedOutput()
			return fmt.Errorf("not ready after %s:\n%s\n%s", Patient(limit), out, n.Tail(20))
		}
	}
	if n.Agent || n.Witness {
		return nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", n.Kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1
	if n.Network != nil {
		config.Dial = func(_ context.Context, network, address string) (net.Conn, error) { return n.Dial(network, address) }
	}
	n.Config = config
	n.Client, err = kubernetes.NewForConfig(config)
	return err
}

// Signal sends sig to the process and waits until it has ended.
func (n *Node) Signal(sig syscall.Signal, limit time.Duration) error {
	if n.Cmd == nil {
		return nil
	}
	if err := n.Cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.Done:
		return nil
	case <-time.After(Patient(limit)):
		return fmt.Errorf("still running %s after %s", Patient(limit), sig)
	}
}

// Destroy stops the node, ends its containers and checks that nothing is left.
func (n *Node) Destroy() error {
	var errs []error
	if n.Cmd != nil {
		if err := n.Signal(syscall.SIGTERM, 15*time.Second); err != nil {
			errs = append(errs, err, n.Signal(syscall.SIGKILL, 5*time.Second))
		}
	}
	if _, err := os.Stat(n.DataDir()); err == nil {
		if out, err := n.Command("killall"); err != nil {
			errs = append(errs, fmt.Errorf("killall: %v: %s", err, out))
		}
	}
	if n.etcd != nil {
		n.etcd.Kill()
	}
	errs = append(errs, n.networkLeftovers())
	if n.Network != nil {
		errs = append(errs, n.Network.Close())
	}
	if n.Machine != nil {
		errs = append(errs, n.Machine.Remove())
	}
	errs = append(errs, n.Leftovers(), os.RemoveAll(n.Dir))
	return errors.Join(errs...)
}

// Command runs another kedge command with this node's flags.
func (n *Node) Command(name string, more ...string) (string, error) {
	return n.RunKedge(append(append([]string{name}, n.Args()...), more...)...)
}

// RunKedge runs kedge where the node is and returns what it printed.
func (n *Node) RunKedge(args ...string) (string, error) {
	var out bytes.Buffer
	cmd := n.kedgeCommand(args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	err := n.begin(cmd)
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// kedgeCommand prepares kedge to be run where the node is, by begin.
func (n *Node) kedgeCommand(args ...string) *exec.Cmd {
	if n.Machine != nil {
		return n.Machine.Command(context.Background(), append([]string{"kedge"}, args...)...)
	}
	return n.World.Command(n.Env, args...)
}

// begin starts a prepared command.
func (n *Node) begin(cmd *exec.Cmd) error {
	if n.Machine != nil {
		return n.Machine.Start(cmd)
	}
	return n.Inside(cmd.Start)
}

// Tail is the end of the node's log.
func (n *Node) Tail(lines int) string {
	data, err := os.ReadFile(n.LogFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// Kubectl runs kedge's kubectl, and fails the test when kubectl fails.
func (n *Node) Kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.TryKubectl(nil, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// TryKubectl returns standard output, and on failure standard error too.
func (n *Node) TryKubectl(stdin io.Reader, args ...string) (string, error) {
	cmd := exec.Command(Binary(), append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.Kubeconfig, "KUBECACHEDIR="+filepath.Join(BaseDir, "cache"))
	cmd.Stdin = stdin
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := n.Inside(cmd.Run); err != nil {
		return out.String() + errOut.String(), err
	}
	return out.String(), nil
}

// Apply creates what the manifest says in the namespace.
func (n *Node) Apply(t *testing.T, namespace, manifest string) {
	t.Helper()
	if out, err := n.TryKubectl(strings.NewReader(manifest), "apply", "-n", namespace, "-f", "-"); err != nil {
		t.Fatalf("apply: %v\n%s\n%s", err, out, manifest)
	}
}

// Namespace makes one for the test and removes it afterwards.
func (n *Node) Namespace(t *testing.T) string {
	t.Helper()
	ns, err := n.Client.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := n.TryKubectl(nil, "get", "all", "-n", ns.Name)
			events, _ := n.TryKubectl(nil, "events", "-n", ns.Name, "--types=Warning")
			t.Logf("what there was:\n%s%s", out, events)
		}
		zero := int64(0)
		_ = n.Client.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero})
	})
	// Pods need the service account, which a controller makes.
	Eventually(t, 20*time.Second, func() error {
		_, err := n.Client.CoreV1().ServiceAccounts(ns.Name).Get(context.Background(), "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
}

// Eventually calls f until it returns nil, and fails the test when it never does.
func Eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(Patient(limit))
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s still: %v", Patient(limit), err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// HostDir makes a folder on the machine that pods may write to.
func HostDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(BaseDir, "host")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	return dir
}

// FileContent is what is in the file, "" when it is not there.
func FileContent(parts ...string) string {
	data, _ := os.ReadFile(filepath.Join(parts...))
	return strings.TrimSpace(string(data))
}
