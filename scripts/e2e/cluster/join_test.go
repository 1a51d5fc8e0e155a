package cluster

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/scripts/e2e/harness"
)

// refused starts an agent that must end with a sentence.
func refused(t *testing.T, what string, a *harness.Node, sentence string) {
	t.Helper()
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-a.Done:
	case <-time.After(harness.Patient(20 * time.Second)):
		_ = a.Signal(syscall.SIGKILL, 5*time.Second)
		t.Fatalf("%s: still running\n%s", what, a.Tail(10))
	}
	if last := a.Tail(1); a.Err == nil || !strings.HasPrefix(last, "kedge: ") || !strings.Contains(last, sentence) {
		t.Errorf("%s: it ended with %v and %q, want %q", what, a.Err, last, sentence)
	}
}

// twoAgents is a server with two agents.
type twoAgents struct {
	*harness.Fleet
	agents []*harness.Node
	ns     string // with a pod on each agent: pod-0 and pod-1
}

func newTwoAgents(t *testing.T) *twoAgents {
	t.Helper()
	f := harness.NewFleet(t)
	two := &twoAgents{Fleet: f}
	for i := range 2 {
		a := two.NewAgent(t, "--token="+two.NewToken(t), "--node-label=zone="+fmt.Sprint(i))
		if err := harness.PrepareImages(a.DataDir()); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := a.Launch(); err != nil {
			t.Fatal(err)
		}
		harness.Eventually(t, 60*time.Second, func() error { return two.NodeIsReady(a.Name) })
		t.Logf("%s was Ready %s after the command", a.Name, time.Since(begin).Round(time.Millisecond))
		if err := a.WaitReady(60 * time.Second); err != nil {
			t.Fatal(err)
		}
		two.agents = append(two.agents, a)
	}
	two.ns = f.Namespace(t)
	return two
}

// onNode are fields of a pod that is to run on a node.
func onNode(a *harness.Node) string { return fmt.Sprintf("nodeName: %s,", a.Name) }

func TestAgents(t *testing.T) {
	t.Parallel()
	two := newTwoAgents(t)
	two.tokensAreUsed(t)
	two.podsRun(t)
	two.serviceAnswers(t)
	t.Run("restart without a token", two.restartWithoutToken)
	t.Run("what a node may not do", two.mayNot)
	t.Run("start while the server is down", two.startWithoutServer)
	t.Run("tokens that are refused", two.refusedTokens)
	t.Run("a name belongs to its key", two.nameBelongsToKey)
}

// tokensAreUsed sees the tokens of the agents used up, and none made on an agent.
func (two *twoAgents) tokensAreUsed(t *testing.T) {
	if out := two.Kedge(t, "token", "ls"); strings.Count(out, " 0 ") != 2 {
		t.Errorf("two tokens of one use each were used:\n%s", out)
	}
	if out, err := two.agents[0].TryKedge("token", "create"); err == nil || !strings.Contains(out, "run the command on a server") {
		t.Errorf("a token made on an agent: %v, %s", err, out)
	}
}

// podsRun starts a pod on each agent, and asks it by the server.
func (two *twoAgents) podsRun(t *testing.T) {
	for i, a := range two.agents {
		name := fmt.Sprint("pod-", i)
		two.Apply(t, two.ns, harness.Shell(name, "echo said by "+name+"; exec sleep 3600", onNode(a)))
		two.WaitPod(t, two.ns, name, false)
		if out := two.Kubectl(t, "logs", "-n", two.ns, name); out != "said by "+name+"\n" {
			t.Errorf("logs: %q", out)
		}
		if out := two.Kubectl(t, "exec", "-n", two.ns, name, "--", "echo", "run in", name); out != "run in "+name+"\n" {
			t.Errorf("exec: %q", out)
		}
	}
}

// serviceAnswers asks a service, by its name, from pods of both agents and of the server. The endpoint is on one agent, and
// sees the address of the pod that asks.
func (two *twoAgents) serviceAnswers(t *testing.T) {
	two.Servers(t, two.ns, "web", 1, onNode(two.agents[1]))
	two.Service(t, two.ns, "shop", "web", "")
	two.Apply(t, two.ns, harness.Shell("pod-of-server", "exec sleep 3600", onNode(two.Node)))
	for _, name := range []string{"pod-1", "pod-0", "pod-of-server"} {
		pod := two.WaitPod(t, two.ns, name, false)
		ask := func(path string) (string, error) {
			out, err := two.TryKubectl(nil, "exec", "-n", two.ns, name, "--", "probe", "get", "http://shop."+two.ns+path)
			return strings.TrimSpace(out), err
		}
		harness.Eventually(t, 20*time.Second, func() error {
			out, err := ask("/")
			if err == nil && out != "web-0" {
				err = fmt.Errorf("it answers %q to %s", out, name)
			}
			return err
		})
		if out, err := ask("/addr"); err != nil || !strings.HasPrefix(out, pod.Status.PodIP+":") {
			t.Errorf("the endpoint saw %s, with address %s, as %q (%v)", name, pod.Status.PodIP, out, err)
		}
	}
}

// restartWithoutToken starts an agent again whose token is spent: it has certificates.
func (two *twoAgents) restartWithoutToken(t *testing.T) {
	a := two.agents[0]
	a.Stop(t, syscall.SIGTERM, 15*time.Second)
	a.Flags = []string{"--server=" + two.URL()}
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	two.StillRuns(t, two.ns, "pod-0")
}

// mayNot tries with an agent's own certificates what is not an agent's to do.
func (two *twoAgents) mayNot(t *testing.T) {
	a := two.agents[0]
	dir := filepath.Join(a.DataDir(), "agent")
	as := func(cert string) *kubernetes.Clientset {
		config := &rest.Config{Host: two.URL(), QPS: -1, Dial: two.Config.Dial, TLSClientConfig: rest.TLSClientConfig{
			CAFile: filepath.Join(dir, "server-ca.crt"), CertFile: filepath.Join(dir, cert), KeyFile: filepath.Join(dir, "node.key"),
		}}
		c, err := kubernetes.NewForConfig(config)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	ctx, node, network := context.Background(), as("node.crt"), as("network.crt")
	if _, err := node.CoreV1().Nodes().Get(ctx, a.Name, metav1.GetOptions{}); err != nil {
		t.Errorf("a node cannot read itself: %v", err)
	}
	if _, err := network.CoreV1().Services("").List(ctx, metav1.ListOptions{}); err != nil {
		t.Errorf("a node's network cannot read services: %v", err)
	}
	patch := []byte(`{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":"true"}}}`)
	for what, try := range map[string]func(*kubernetes.Clientset) error{
		"list Secrets": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Secrets("kube-system").List(ctx, metav1.ListOptions{})
			return err
		},
		"read the key that belongs to its name": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Secrets("kube-system").Get(ctx, "kedge-node-"+a.Name, metav1.GetOptions{})
			return err
		},
		"give another node's name to itself": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Secrets("kube-system").Patch(ctx, "kedge-node-"+two.agents[1].Name, types.MergePatchType, []byte(`{"data":{"allowed":"dHJ1ZQ=="}}`), metav1.PatchOptions{})
			return err
		},
		"make a token": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Secrets("kube-system").Create(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "kedge-token-0123456789"}, Type: "kedge.io/token"}, metav1.CreateOptions{})
			return err
		},
		"change another node": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Nodes().Patch(ctx, two.agents[1].Name, types.MergePatchType, []byte(`{"metadata":{"labels":{"a":"b"}}}`), metav1.PatchOptions{})
			return err
		},
		"have another node's address": func(c *kubernetes.Clientset) error {
			claim := fmt.Appendf(nil, `{"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, two.agents[1].Machine.Addrs()[0].Addr())
			_, err := c.CoreV1().Nodes().Patch(ctx, a.Name, types.MergePatchType, claim, metav1.PatchOptions{}, "status")
			return err
		},
		"call itself a server": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Nodes().Patch(ctx, a.Name, types.MergePatchType, patch, metav1.PatchOptions{})
			return err
		},
		"run a pod elsewhere": func(c *kubernetes.Clientset) error {
			_, err := c.CoreV1().Pods(two.ns).Create(ctx, &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "x"}, Spec: corev1.PodSpec{NodeName: two.Name, Containers: []corev1.Container{{Name: "x", Image: harness.Busybox}}}}, metav1.CreateOptions{})
			return err
		},
		"run commands in another node's pod": func(c *kubernetes.Clientset) error {
			return c.CoreV1().RESTClient().Post().Namespace(two.ns).Resource("pods").Name("pod-1").SubResource("exec").Param("command", "id").Do(ctx).Error()
		},
	} {
		for who, c := range map[string]*kubernetes.Clientset{"node": node, "network": network} {
			if err := try(c); !apierrors.IsForbidden(err) {
				t.Errorf("the %s's certificate can %s: %v", who, what, err)
			}
		}
	}
}

// startWithoutServer starts an agent that no server answers, and then the server.
func (two *twoAgents) startWithoutServer(t *testing.T) {
	a := two.agents[0]
	a.Stop(t, syscall.SIGTERM, 15*time.Second)
	two.Stop(t, syscall.SIGTERM, 15*time.Second)
	if err := a.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if log := a.Tail(100); !strings.Contains(log, "going on with the last known settings of the cluster") {
			return fmt.Errorf("it does not go on:\n%s", log)
		}
		return nil
	})
	if err := two.Start(); err != nil {
		t.Fatal(err)
	}
	if err := a.WaitReady(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	two.StillRuns(t, two.ns, "pod-0")
}

// refusedTokens joins with tokens of which each has another flaw.
func (two *twoAgents) refusedTokens(t *testing.T) {
	good := two.NewToken(t)
	hash, rest, _ := strings.Cut(good, "::")
	id, _, _ := strings.Cut(rest, ".")
	short := two.NewToken(t, "--ttl=1s")
	used := strings.TrimPrefix(two.agents[1].Flags[1], "--token=")
	removed := two.NewToken(t)
	removedID, _, _ := strings.Cut(removed[len(hash)+2:], ".")
	two.Kedge(t, "token", "rm", removedID)
	time.Sleep(1100 * time.Millisecond) // what short lives
	x := two.NewAgent(t)
	flip := map[byte]string{'0': "1"}[hash[2]]
	if flip == "" {
		flip = "0"
	}
	for what, c := range map[string]struct{ token, sentence string }{
		"expired": {short, "has expired"}, "used up": {used, "used as often as it may be"}, "removed": {removed, "does not know this token"},
		"guessed":            {hash + "::" + id + "." + strings.Repeat("0", 40), "does not know this token"},
		"of another cluster": {"K1" + flip + hash[3:] + "::" + rest, "not of the cluster that the token is for"},
		"cut short":          {good[:len(good)-3], "its secret is incomplete"}, "of another node": {two.NewToken(t, "--node-name=other"), "is for a node of another name"},
	} {
		x.Flags = []string{"--server=" + two.URL(), "--token=" + c.token}
		refused(t, what, x, c.sentence)
	}
	x.Flags = []string{"--server=" + two.URL()}
	refused(t, "no token", x, "has not joined a cluster yet")
}

// nameBelongsToKey joins under names that other machines have, and under its own after it was wiped.
func (two *twoAgents) nameBelongsToKey(t *testing.T) {
	a := two.agents[1]
	x := two.NewAgent(t)
	for _, name := range []string{a.Name, two.Name} { // an agent's, and the server's own
		x.Flags = []string{"--server=" + two.URL(), "--token=" + two.NewToken(t), "--node-name=" + name}
		refused(t, "the name of "+name, x, "another machine has this node's name")
		if err := os.RemoveAll(x.DataDir()); err != nil {
			t.Fatal(err)
		}
	}
	// The machine is wiped and comes back.
	a.Stop(t, syscall.SIGTERM, 15*time.Second)
	if err := os.RemoveAll(filepath.Join(a.DataDir(), "agent")); err != nil {
		t.Fatal(err)
	}
	a.Flags = []string{"--server=" + two.URL(), "--token=" + two.NewToken(t)}
	refused(t, "a wiped machine", a, "kedge node allow "+a.Name)
	two.Kedge(t, "node", "allow", a.Name)
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	two.StillRuns(t, two.ns, "pod-1")
}
