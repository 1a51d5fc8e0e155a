package e2e

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"kedge/internal/machines"
	"kedge/internal/netns"
)

// node is a kedge under test and the clients of its cluster.
type node struct {
	name       string
	dir        string // everything of it is below
	flags      []string
	env        []string          // of its process; nil: the test's own
	world      *world            // in place of the machine as it is, when not nil
	network    *netns.NS         // in place of the machine's own, when not nil
	machine    *machines.Machine // on which it runs, with directories of its own; nil for this one
	program    string            // in place of binary(), when not empty
	agent      bool              // "kedge agent" in place of "kedge server": no API and no clients
	apiPort    int
	kubeconfig string

	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended
	err  error         // how it ended; valid after done

	networkBefore []string // traces of others in its network before it first started

	client *kubernetes.Clientset
	config *rest.Config
}

// binary is the executable under test.
func binary() string {
	if b := os.Getenv("KEDGE_BIN"); b != "" {
		return b
	}
	b, err := filepath.Abs("../../bin/kedge")
	if err != nil {
		panic(err)
	}
	return b
}

var (
	baseDir  string // of everything that the tests write; removed at the end
	lastPort atomic.Int32
)

// portVar moves a run's ports and names, so that it can go on beside another.
const portVar = "KEDGE_E2E_PORT"

// slowVar says how many times slower than usual the machine is, an emulated one say.
const slowVar = "KEDGE_E2E_SLOW"

// slowness is by how much waits are longer.
var slowness = sync.OnceValues(func() (int, error) {
	n, err := strconv.Atoi(cmp.Or(os.Getenv(slowVar), "1"))
	if err == nil && n < 1 {
		err = fmt.Errorf("%d is no number of times", n)
	}
	return n, err
})

// patient is how long to wait here for what usually takes no longer than limit.
func patient(limit time.Duration) time.Duration {
	n, _ := slowness() // run has looked at the error
	return time.Duration(n) * limit
}

func TestMain(m *testing.M) {
	if w := os.Getenv(worldVar); w != "" {
		fmt.Fprintln(os.Stderr, "enter the world of a test:", enterWorld(w))
		os.Exit(125)
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: end-to-end tests run containers and need root")
		return 0
	}
	if _, err := os.Stat(binary()); err != nil {
		fmt.Println("FAIL: no executable to test; run make build:", err)
		return 1
	}
	if err := sweep(); err != nil {
		fmt.Println("FAIL: clear up after an earlier run:", err)
		return 1
	}
	var err error
	if baseDir, err = takeBaseDir(); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	clearUpOnSignal(baseDir)
	// For the program that commands without a data directory unpack.
	if err := os.Setenv("XDG_CACHE_HOME", filepath.Join(baseDir, "cache")); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	port, err := strconv.Atoi(cmp.Or(os.Getenv(portVar), "16443"))
	if err != nil {
		fmt.Println("FAIL:", portVar+":", err)
		return 1
	}
	lastPort.Store(int32(port))
	slow, err := slowness()
	if err != nil {
		fmt.Println("FAIL:", slowVar+":", err)
		return 1
	}
	// Tests wait for most of their time, some of them for a slot of [own]; go test would
	// run one per processor. A slow machine has enough to do with one.
	parallel := max(24, goruntime.GOMAXPROCS(0))
	if slow > 1 {
		parallel = 1
	}
	if err := flag.Set("test.parallel", strconv.Itoa(parallel)); err != nil {
		fmt.Println("FAIL:", err)
		return 1
	}
	code := m.Run()
	reportLacks()
	keep := code != 0 && os.Getenv("KEDGE_KEEP") != ""
	if sharedNode != nil && keep {
		fmt.Println("the node is kept; KUBECONFIG="+sharedNode.kubeconfig, "process", sharedNode.cmd.Process.Pid)
		if err := os.WriteFile(filepath.Join(baseDir, keepFile), nil, 0o600); err != nil {
			fmt.Println("and its folder is not:", err)
		}
		return code
	}
	if sharedNode != nil {
		if err := sharedNode.destroy(); err != nil {
			fmt.Println("FAIL: clean-up of the shared node:", err)
			code = 1
		}
	}
	if err := removeRun(baseDir); err != nil {
		fmt.Println("FAIL: clean-up:", err)
		code = 1
	}
	return code
}

var (
	sharedOnce sync.Once
	sharedNode *node
	sharedErr  error
)

// shared is the node that most tests use. Tests must not stop it.
func shared(t *testing.T) *node {
	t.Helper()
	sharedOnce.Do(func() {
		n := newNode("e2e")
		n.flags = append(n.flags, "--node-label=kedge.test/label=yes")
		if sharedErr = prepareImages(n.dataDir()); sharedErr != nil {
			return
		}
		sharedNode = n
		sharedErr = n.start()
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

// own makes a node for one test, not yet started. It and all it left are gone
// when the test ends.
func own(t *testing.T, flags ...string) *node {
	t.Helper()
	ownSlots <- struct{}{}
	t.Cleanup(func() { <-ownSlots })
	n := newNode(strings.ToLower(strings.NewReplacer("Test", "", "/", "", "_", "").Replace(t.Name())))
	// Nodes that run at the same time share the machine's routes.
	n.flags = append([]string{
		fmt.Sprintf("--cluster-cidr=10.%d.0.0/16", 100+n.apiPort/2%100),
		fmt.Sprintf("--service-cidr=10.%d.0.0/16", 200+n.apiPort/2%50),
	}, flags...)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of the node:\n%s", n.tail(60))
		}
		if err := n.destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	return n
}

func newNode(name string) *node {
	port := int(lastPort.Add(2))
	if len(name) > 10 { // or the run directory is too long for sockets in it
		name = name[:10]
	}
	name = fmt.Sprint(name, "-", port) // it is in cgroups and rules, which other runs have too
	n := &node{name: name, dir: filepath.Join(baseDir, name), apiPort: port, env: bare()}
	n.kubeconfig = filepath.Join(n.dir, "kubeconfig")
	return n
}

// bare is the environment of nodes under test: kedge must not need a program of the host,
// so it finds none.
func bare() []string { return []string{"HOME=/root", "PATH="} }

func (n *node) logFile() string { return filepath.Join(n.dir, "log") }

// dataDir is where the test finds what the node finds in its data directory.
func (n *node) dataDir() string {
	if n.machine != nil {
		return n.machine.Disk("/var/lib/kedge")
	}
	return filepath.Join(n.dir, "data")
}

func (n *node) runDir() string {
	if n.machine == nil {
		return filepath.Join(n.dir, "run")
	}
	dir, err := n.machine.Live("/run/kedge")
	if err != nil {
		return "/nonexistent" // the machine is off
	}
	return dir
}

// args are the flags that make this node independent of all others.
func (n *node) args() []string {
	if n.machine != nil { // everything is where it usually is
		args := []string{"--node-name=" + n.name, fmt.Sprint("--kubelet-port=", n.apiPort+1)}
		if !n.agent {
			args = append(args, fmt.Sprint("--https-listen-port=", n.apiPort))
		}
		return append(args, n.flags...)
	}
	if n.agent {
		return append([]string{
			"--config=" + filepath.Join(n.dir, "config.yaml"), "--data-dir=" + n.dataDir(), "--run-dir=" + n.runDir(),
			"--node-name=" + n.name, fmt.Sprint("--kubelet-port=", n.apiPort+1), "--private-registry=" + filepath.Join(n.dir, "registries.yaml"),
		}, n.flags...)
	}
	return append([]string{
		"--config=" + filepath.Join(n.dir, "config.yaml"), "--data-dir=" + n.dataDir(), "--run-dir=" + n.runDir(), "--write-kubeconfig=" + n.kubeconfig,
		"--node-name=" + n.name, fmt.Sprint("--https-listen-port=", n.apiPort), fmt.Sprint("--kubelet-port=", n.apiPort+1),
		"--private-registry=" + filepath.Join(n.dir, "registries.yaml"),
	}, n.flags...)
}

// launch starts the process and returns at once.
func (n *node) launch() error {
	if err := os.MkdirAll(n.dir, 0o755); err != nil {
		return err
	}
	config := filepath.Join(n.dir, "config.yaml")
	if _, err := os.Stat(config); errors.Is(err, os.ErrNotExist) {
		if err := os.WriteFile(config, []byte("# of a test\n"), 0o600); err != nil {
			return err
		}
	}
	if err := n.remember(); err != nil {
		return err
	}
	if n.networkBefore == nil && n.machine == nil {
		before, err := n.networkTraces()
		if err != nil {
			return err
		}
		n.networkBefore = before
	}
	log, err := os.OpenFile(n.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	role := "server"
	if n.agent {
		role = "agent"
	}
	cmd := n.kedgeCommand(append([]string{role}, n.args()...)...)
	if n.program != "" {
		cmd.Path = n.program
	}
	cmd.Stdout, cmd.Stderr = log, log
	// The node must not end with the test's terminal, nor its signals reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.begin(cmd); err != nil {
		return err
	}
	n.cmd, n.done = cmd, make(chan struct{})
	done := n.done
	go func() {
		n.err = cmd.Wait()
		close(done)
	}()
	return nil
}

// start launches the node and waits until all of it is ready.
func (n *node) start() error {
	if err := n.launch(); err != nil {
		return err
	}
	return n.waitReady(90 * time.Second)
}

func (n *node) waitReady(limit time.Duration) error {
	deadline := time.Now().Add(patient(limit))
	for {
		if exec.Command(binary(), "status", "--run-dir="+n.runDir()).Run() == nil {
			break
		}
		select {
		case <-n.done:
			return fmt.Errorf("kedge ended: %v\n%s", n.err, n.tail(20))
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			out, _ := exec.Command(binary(), "status", "--run-dir="+n.runDir()).CombinedOutput()
			return fmt.Errorf("not ready after %s:\n%s\n%s", limit, out, n.tail(20))
		}
	}
	if n.agent {
		return nil
	}
	config, err := clientcmd.BuildConfigFromFlags("", n.kubeconfig)
	if err != nil {
		return err
	}
	config.QPS = -1
	if n.network != nil {
		config.Dial = func(_ context.Context, network, address string) (net.Conn, error) { return n.dial(network, address) }
	}
	n.config = config
	n.client, err = kubernetes.NewForConfig(config)
	return err
}

// signal sends sig to the process and waits until it has ended.
func (n *node) signal(sig syscall.Signal, limit time.Duration) error {
	if n.cmd == nil {
		return nil
	}
	if err := n.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-n.done:
		return nil
	case <-time.After(patient(limit)):
		return fmt.Errorf("still running %s after %s", limit, sig)
	}
}

// destroy stops the node, ends its containers and checks that nothing is left.
func (n *node) destroy() error {
	var errs []error
	if n.cmd != nil {
		if err := n.signal(syscall.SIGTERM, 15*time.Second); err != nil {
			errs = append(errs, err, n.signal(syscall.SIGKILL, 5*time.Second))
		}
	}
	if _, err := os.Stat(n.dataDir()); err == nil {
		if out, err := n.command("killall"); err != nil {
			errs = append(errs, fmt.Errorf("killall: %v: %s", err, out))
		}
	}
	errs = append(errs, n.networkLeftovers())
	if n.network != nil {
		errs = append(errs, n.network.Close())
	}
	if n.machine != nil {
		errs = append(errs, n.machine.Remove())
	}
	errs = append(errs, n.leftovers(), os.RemoveAll(n.dir))
	return errors.Join(errs...)
}

// command runs another kedge command with this node's flags.
func (n *node) command(name string, more ...string) (string, error) {
	return n.runKedge(append(append([]string{name}, n.args()...), more...)...)
}

// runKedge runs kedge where the node is and returns what it printed.
func (n *node) runKedge(args ...string) (string, error) {
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
func (n *node) kedgeCommand(args ...string) *exec.Cmd {
	if n.machine != nil {
		return n.machine.Command(context.Background(), append([]string{"kedge"}, args...)...)
	}
	return n.world.command(n.env, args...)
}

// begin starts a prepared command.
func (n *node) begin(cmd *exec.Cmd) error {
	if n.machine != nil {
		return n.machine.Start(cmd)
	}
	return n.inside(cmd.Start)
}

// tail is the end of the node's log.
func (n *node) tail(lines int) string {
	data, err := os.ReadFile(n.logFile())
	if err != nil {
		return err.Error()
	}
	all := strings.Split(strings.TrimSpace(string(data)), "\n")
	return strings.Join(all[max(0, len(all)-lines):], "\n")
}

// kubectl runs kedge's kubectl and fails the test when it does.
func (n *node) kubectl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := n.tryKubectl(nil, args...)
	if err != nil {
		t.Fatalf("kubectl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

// tryKubectl returns standard output, and on failure standard error too.
func (n *node) tryKubectl(stdin io.Reader, args ...string) (string, error) {
	cmd := exec.Command(binary(), append([]string{"kubectl"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+n.kubeconfig, "KUBECACHEDIR="+filepath.Join(baseDir, "cache"))
	cmd.Stdin = stdin
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := n.inside(cmd.Run); err != nil {
		return out.String() + errOut.String(), err
	}
	return out.String(), nil
}

// apply creates what the manifest says in the namespace.
func (n *node) apply(t *testing.T, namespace, manifest string) {
	t.Helper()
	if out, err := n.tryKubectl(strings.NewReader(manifest), "apply", "-n", namespace, "-f", "-"); err != nil {
		t.Fatalf("apply: %v\n%s\n%s", err, out, manifest)
	}
}

// namespace makes one for the test and removes it afterwards.
func (n *node) namespace(t *testing.T) string {
	t.Helper()
	ns, err := n.client.CoreV1().Namespaces().Create(context.Background(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "t-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			out, _ := n.tryKubectl(nil, "get", "all", "-n", ns.Name)
			events, _ := n.tryKubectl(nil, "events", "-n", ns.Name, "--types=Warning")
			t.Logf("what there was:\n%s%s", out, events)
		}
		zero := int64(0)
		_ = n.client.CoreV1().Namespaces().Delete(context.Background(), ns.Name, metav1.DeleteOptions{GracePeriodSeconds: &zero})
	})
	// Pods need the service account, which a controller makes.
	eventually(t, 20*time.Second, func() error {
		_, err := n.client.CoreV1().ServiceAccounts(ns.Name).Get(context.Background(), "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
}

// eventually calls f until it returns nil, and fails the test when it never does.
func eventually(t *testing.T, limit time.Duration, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patient(limit))
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s still: %v", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
