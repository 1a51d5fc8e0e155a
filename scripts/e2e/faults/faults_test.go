package faults

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/namespaces"
	"kedge/scripts/e2e/harness"
	"kedge/throwaway/lan"
)

// faults is a cluster of three servers and an agent, each on a machine whose cable can
// be cut and whose plug can be pulled.
type faults struct {
	*harness.Fleet
	all   []*harness.Node // the servers
	agent *harness.Node
	ns    string // with a pod called after each node
	inPod kubernetes.Interface
}

// onMachine makes one more server, with a machine of its own, not yet started.
func onMachine(t *testing.T, f *harness.Fleet) *harness.Node {
	t.Helper()
	s := harness.NewNode("server")
	s.APIPort = f.APIPort // one port for all, as the service "kubernetes" needs
	f.GiveMachine(t, s)
	s.Flags = []string{"--server=" + f.URL(), "--token=" + f.ServerToken(t)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.Name, s.Tail(60))
		}
		if err := s.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	if err := harness.PrepareImages(s.DataDir()); err != nil {
		t.Fatal(err)
	}
	return s
}

// faultFlags are for servers whose nodes are to be given up soon, and whose agents need
// other certificates again and again, whatever else happens.
var faultFlags = []string{"--kube-controller-manager-arg=node-monitor-grace-period=20s", "--agent-certificate-life=1m"}

func newFaults(t *testing.T) *faults {
	t.Helper()
	f := &faults{Fleet: harness.NewFleet(t, faultFlags...)}
	f.all = []*harness.Node{f.Node}
	for range 2 {
		s := onMachine(t, f.Fleet)
		s.Flags = append(s.Flags, faultFlags...)
		begin := time.Now()
		if err := s.Start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("server %s was ready %s after the command", s.Name, harness.Since(begin))
		f.all = append(f.all, s)
	}
	f.agent = f.NewAgent(t, "--token="+f.NewToken(t))
	if err := harness.PrepareImages(f.agent.DataDir()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := f.agent.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return f.NodeIsReady(f.agent.Name) })
	t.Logf("agent %s was Ready %s after the command", f.agent.Name, harness.Since(begin))
	f.voting(t, f.Node)
	f.AwaitEndpoints(t, f.all...)
	f.ns = f.Namespace(t)
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.Apply(t, f.ns, harness.Shell(n.Name, "exec sleep 36000", "nodeName: "+n.Name+","))
	}
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.WaitPod(t, f.ns, n.Name, false)
	}
	f.inPod = f.clientInPod(t)
	return f
}

// clientInPod is a client in the agent's pod, which knows the service and no server.
func (f *faults) clientInPod(t *testing.T) kubernetes.Interface {
	t.Helper()
	pod := f.agent.PodNetwork(t, f.ns, f.agent.Name)
	config := rest.CopyConfig(f.Config)
	config.Host = "https://10.43.0.1"
	// Which gives up a connection with a request that is not answered, where HTTP/2
	// would keep asking over it for half a minute.
	config.TLSClientConfig.NextProtos = []string{"http/1.1"}
	config.Dial = func(_ context.Context, network, address string) (net.Conn, error) {
		return harness.DialFrom(pod, network, address)
	}
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (f *faults) others(s *harness.Node) []*harness.Node {
	return slices.DeleteFunc(slices.Clone(f.all), func(o *harness.Node) bool { return o == s })
}

// leader is who leads by its own account, and the others.
func (f *faults) leader(t *testing.T) (leader *harness.Node, rest []*harness.Node) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		for _, s := range f.all {
			if says, err := detailOf(s, "datastore"); err == nil && says == "leads" {
				leader = s
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return leader, f.others(leader)
}

// unplug unplugs a node until restore is called, or the test ends.
func unplug(t *testing.T, n *harness.Node) (restore func()) {
	t.Helper()
	cable := cable(t, n)
	if err := cable.Cut(); err != nil {
		t.Fatal(err)
	}
	return harness.UndoOnce(t, cable.Restore)
}

// deafen makes nodes throw away what they send to another, until undo is called, or the
// test ends.
func deafen(t *testing.T, to *harness.Node, from ...*harness.Node) (undo func()) {
	t.Helper()
	for _, n := range from {
		if err := cable(t, n).Drop(uplink(to)); err != nil {
			t.Fatal(err)
		}
	}
	return harness.UndoOnce(t, func() (err error) {
		for _, n := range from {
			err = errors.Join(err, cable(t, n).Undrop(uplink(to)))
		}
		return err
	})
}

// voting waits until all servers vote and answer, as one of them sees it.
func (f *faults) voting(t *testing.T, at *harness.Node) {
	t.Helper()
	harness.Eventually(t, 60*time.Second, func() error {
		out, err := at.TryKedge("server", "ls")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		for _, s := range f.all {
			good := false
			for line := range strings.Lines(out) {
				fields := strings.Fields(line)
				good = good || len(fields) >= 3 && fields[0] == s.Name && (fields[1] == "leader" || fields[1] == "follower") && fields[2] == "reachable"
			}
			if !good {
				return fmt.Errorf("%s does not take part:\n%s", s.Name, out)
			}
		}
		return nil
	})
}

// cable is the node's, to be cut.
func cable(t *testing.T, n *harness.Node) *lan.Host {
	t.Helper()
	h, err := n.Machine.Host()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// uplink is the address of the node's machine, as a range of one.
func uplink(n *harness.Node) netip.Prefix {
	a := n.Machine.Addrs()[0].Addr()
	return netip.PrefixFrom(a, a.BitLen())
}

// detailOf is what "kedge status" says of a component.
func detailOf(n *harness.Node, component string) (string, error) {
	status, err := n.TryStatusOf(component)
	return status.Detail, err
}

// awaitStatus waits until "kedge status" has the text about a component.
func awaitStatus(t *testing.T, n *harness.Node, component, text string) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		got, err := detailOf(n, component)
		if err == nil && !strings.Contains(got, text) {
			err = fmt.Errorf("%s says of %s %q, want %q", n.Name, component, got, text)
		}
		return err
	})
}

// warnings are the lines of the node's log from an offset that are warnings or errors.
func warnings(t *testing.T, n *harness.Node, from int64) (lines []string, end int64) {
	t.Helper()
	file, err := os.Open(n.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := file.Seek(from, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	data, err := io.ReadAll(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return lines, from + int64(len(data))
}

// quietly does something, and makes sure that it does not fill the logs: a handful of
// lines say what has happened, and what embedded components miss meanwhile is left out.
func (f *faults) quietly(t *testing.T, do func()) {
	t.Helper()
	const most = 15
	nodes := append(slices.Clone(f.all), f.agent)
	from := make([]int64, len(nodes))
	for i, n := range nodes {
		_, from[i] = warnings(t, n, 0)
	}
	do()
	for i, n := range nodes {
		if lines, _ := warnings(t, n, from[i]); len(lines) > most {
			t.Errorf("%s has logged %d warnings and errors:\n%s", n.Name, len(lines), strings.Join(lines, "\n"))
		} else {
			t.Logf("%s has logged %d warnings and errors", n.Name, len(lines))
		}
	}
}

// works makes sure that servers serve: a write, a pod that is scheduled, the service
// "kubernetes" from a pod, exec by way of the agent's tunnel.
func (f *faults) works(t *testing.T, name string, by *harness.Node) {
	t.Helper()
	begin := time.Now()
	harness.Eventually(t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := f.inPod.CoreV1().Namespaces().Get(ctx, f.ns, metav1.GetOptions{})
		return err
	})
	t.Logf("a pod on the agent was answered after %s", harness.Since(begin))
	begin = time.Now()
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := by.TryKubectl(strings.NewReader(harness.Shell(name, "exec sleep 36000", "")), "apply", "-n", f.ns, "-f", "-")
		if err != nil {
			err = fmt.Errorf("apply: %w: %s", err, out)
		}
		return err
	})
	harness.Eventually(t, 30*time.Second, func() error {
		p, err := by.Pod(f.ns, name)
		if err == nil && p.Spec.NodeName == "" {
			err = errors.New("not scheduled")
		}
		return err
	})
	t.Logf("a pod was scheduled after %s", harness.Since(begin))
}

// untouched makes sure that the nodes' own pods run as ever.
func (f *faults) untouched(t *testing.T) {
	t.Helper()
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.StillRuns(t, f.ns, n.Name)
	}
}

// awaitCutOff waits until a server that is cut off says so: /readyz, and the watches.
func (f *faults) awaitCutOff(t *testing.T, s *harness.Node, begin time.Time, watch <-chan error) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if s.Client.RESTClient().Get().AbsPath("/readyz").MaxRetries(0).Do(ctx).Error() == nil {
			return fmt.Errorf("%s is ready without the others", s.Name)
		}
		return nil
	})
	t.Logf("%s was not ready after %s", s.Name, harness.Since(begin))
	select {
	case <-watch:
		t.Logf("its watches had ended after %s", harness.Since(begin))
	case <-time.After(harness.Patient(20 * time.Second)):
		t.Errorf("the watches of %s are open", s.Name)
	}
	awaitStatus(t, s, "controllers", "standing by")
	awaitStatus(t, s, "datastore", "no leader")
}

// watched opens a watch, and tells when it has ended.
func (f *faults) watched(t *testing.T, at *harness.Node) <-chan error {
	t.Helper()
	w, err := at.Client.CoreV1().ConfigMaps("kube-public").Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() {
		for range w.ResultChan() {
		}
		ended <- nil
	}()
	t.Cleanup(w.Stop)
	return ended
}

// elsewhere waits until the agent uses another server than this one.
func (f *faults) elsewhere(t *testing.T, s *harness.Node, begin time.Time) {
	t.Helper()
	harness.Eventually(t, 20*time.Second, func() error {
		in, err := detailOf(f.agent, "servers")
		if err == nil && strings.HasPrefix(in, uplink(s).Addr().String()+":") {
			err = fmt.Errorf("the agent uses %s", in)
		}
		return err
	})
	t.Logf("the agent used another server %s after", harness.Since(begin))
}

// TestFaults: three servers and an agent, of which each in turn is cut off, in both
// directions or in one, paused, switched off, lost for good and replaced. What clients
// of all three servers are told meanwhile fits one store.
func TestFaults(t *testing.T) {
	t.Parallel()
	f := newFaults(t)
	apart := f.Namespace(t)
	h := harness.RecordHistory(t, apart, f.all...)

	t.Run("the leader is cut off", func(t *testing.T) {
		leader, _ := f.leader(t)
		f.cutOff(t, "the leader", leader)
	})
	t.Run("a follower is cut off", func(t *testing.T) {
		_, rest := f.leader(t)
		f.cutOff(t, "a follower", rest[0])
	})
	t.Run("the leader is not heard", func(t *testing.T) {
		f.oneWay(t, "the leader is not heard", func(s *harness.Node, rest []*harness.Node) func() {
			undo := []func(){deafen(t, rest[0], s), deafen(t, rest[1], s)}
			return func() { undo[0](); undo[1]() }
		})
	})
	t.Run("the leader does not hear", func(t *testing.T) {
		f.oneWay(t, "the leader does not hear", func(s *harness.Node, rest []*harness.Node) func() { return deafen(t, s, rest...) })
	})
	for _, pause := range []time.Duration{5 * time.Second, 15 * time.Second} {
		t.Run(fmt.Sprintf("the leader is paused for %s", pause), func(t *testing.T) { f.paused(t, pause) })
	}
	t.Run("the agent is cut off", f.agentCutOff)
	h.End(t)

	t.Run("a server is switched off and on", f.switchedOffAndOn)
	t.Run("a server dies for good and is replaced", f.replaced)
	t.Run("the agent's certificates were renewed", f.certificatesRenewed)
	t.Run("a node dies and its pods move", f.podsMove)
}

// cutOff unplugs a server under load. which is the server in words.
func (f *faults) cutOff(t *testing.T, which string, s *harness.Node) {
	rest := f.others(s)
	f.quietly(t, func() {
		writes := harness.KeepWriting(t, f.ns, s, rest[0], rest[1])
		watch := f.watched(t, s)
		restore, begin := unplug(t, s), time.Now()
		f.elsewhere(t, s, begin)
		f.works(t, strings.ReplaceAll(which, " ", "-"), rest[0])
		f.awaitCutOff(t, s, begin, watch)
		rest[1].AwaitEndpoints(t, rest...)
		restore()
		f.voting(t, s)
		f.AwaitEndpoints(t, f.all...)
		writes.Check(t, which+" is cut off", f.ns, s)
	})
	f.untouched(t)
}

// oneWay has the leader's packets dropped in one direction.
func (f *faults) oneWay(t *testing.T, what string, drop func(s *harness.Node, rest []*harness.Node) (undo func())) {
	s, rest := f.leader(t)
	writes := harness.KeepWriting(t, f.ns, s, rest[0], rest[1])
	begin := time.Now()
	undo := drop(s, rest)
	awaitStatus(t, s, "controllers", "standing by")
	t.Logf("it led no more after %s", harness.Since(begin))
	f.works(t, strings.ReplaceAll(what, " ", "-"), rest[0])
	undo()
	f.voting(t, s)
	writes.Check(t, what, f.ns, s)
}

// paused stops the leader's process for some time.
func (f *faults) paused(t *testing.T, pause time.Duration) {
	s, rest := f.leader(t)
	writes := harness.KeepWriting(t, f.ns, rest[0], rest[1])
	begin := time.Now()
	if err := s.Cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := harness.UndoOnce(t, func() error { return s.Cmd.Process.Signal(syscall.SIGCONT) })
	f.elsewhere(t, s, begin)
	f.works(t, fmt.Sprintf("pause-%d", pause/time.Second), rest[0])
	time.Sleep(time.Until(begin.Add(pause)))
	resume()
	f.voting(t, s)
	writes.Check(t, "the leader is paused", f.ns, s)
	if err := f.NodeIsReady(s.Name); err != nil {
		t.Error(err)
	}
	f.untouched(t)
}

// agentCutOff unplugs the agent until its node is given up, and plugs it in again.
func (f *faults) agentCutOff(t *testing.T) {
	restore := unplug(t, f.agent)
	harness.Eventually(t, 40*time.Second, func() error {
		if f.NodeIsReady(f.agent.Name) == nil {
			return errors.New("the node of an agent that is cut off is Ready")
		}
		return nil
	})
	restore()
	begin := time.Now()
	harness.Eventually(t, 30*time.Second, func() error { return f.NodeIsReady(f.agent.Name) })
	t.Logf("its node was Ready again after %s", harness.Since(begin))
	f.untouched(t)
}

// switchedOffAndOn boots a server that does not lead.
func (f *faults) switchedOffAndOn(t *testing.T) {
	_, rest := f.leader(t)
	s := rest[0]
	writes := harness.KeepWriting(t, f.ns, f.others(s)...)
	if err := reboot(s); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := s.Start(); err != nil {
		t.Fatal(err)
	}
	t.Logf("it was ready after %s", harness.Since(begin))
	f.voting(t, s)
	writes.Check(t, "a server is switched off and on", f.ns, s)
	f.Apply(t, f.ns, harness.Shell("after-the-boot", "exec sleep 36000", "nodeName: "+s.Name+","))
	f.all[0].WaitPod(t, f.ns, "after-the-boot", false)
}

// replaced wipes the leader, removes it, and has it join as a new server.
func (f *faults) replaced(t *testing.T) {
	dead, rest := f.leader(t)
	writes := harness.KeepWriting(t, f.ns, rest...)
	if err := wipe(dead); err != nil {
		t.Fatal(err)
	}
	f.works(t, "after-the-death", rest[0])
	begin := time.Now()
	harness.Eventually(t, 20*time.Second, func() error {
		out, err := rest[0].TryKedge("server", "remove", dead.Name)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})
	dead.Flags = append([]string{fmt.Sprintf("--server=https://%s:%d", uplink(rest[0]).Addr(), f.APIPort), "--token=" + rest[0].ServerToken(t)}, faultFlags...)
	if err := harness.PrepareImages(dead.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := dead.Start(); err != nil {
		t.Fatal(err)
	}
	t.Logf("it was replaced after %s", harness.Since(begin))
	f.voting(t, rest[1])
	rest[1].AwaitEndpoints(t, f.all...)
	writes.Check(t, "a server dies for good", f.ns, dead)
}

// certificatesRenewed sees the agent renew its certificates, by whatever server there was.
func (f *faults) certificatesRenewed(t *testing.T) {
	harness.Eventually(t, time.Minute, func() error {
		if got := len(f.agent.LogLines(t, "this node's certificates were renewed")); got < 3 {
			return fmt.Errorf("%d times", got)
		}
		return nil
	})
	harness.Eventually(t, 20*time.Second, func() error { return f.all[0].NodeIsReady(f.agent.Name) })
	f.StillRuns(t, f.ns, f.agent.Name)
}

// podsMove switches the agent off, whose pod then runs elsewhere.
func (f *faults) podsMove(t *testing.T) {
	by := f.all[0]
	by.Apply(t, f.ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: mover}, spec: {selector: {matchLabels: {app: mover}},
		template: {metadata: {labels: {app: mover}}, spec: {terminationGracePeriodSeconds: 0,
		affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}}]}},
		tolerations: [{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}, {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 1}],
		containers: [{name: main, image: %q, command: [sleep, "36000"]}]}}}}`, f.agent.Name, harness.Busybox))
	on := func() (nodes []string) {
		for _, p := range by.PodsOf(t, f.ns, "mover") {
			if p.Status.Phase == "Running" && p.DeletionTimestamp == nil {
				nodes = append(nodes, p.Spec.NodeName)
			}
		}
		return nodes
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if nodes := on(); !slices.Equal(nodes, []string{f.agent.Name}) {
			return fmt.Errorf("it runs on %v", nodes)
		}
		return nil
	})
	if err := powerOff(f.agent); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	harness.Eventually(t, 90*time.Second, func() error {
		if nodes := on(); len(nodes) != 1 || nodes[0] == f.agent.Name {
			return fmt.Errorf("it runs on %v", nodes)
		}
		return nil
	})
	t.Logf("the pod ran elsewhere %s after its node had died", harness.Since(begin))
	if err := errors.Join(powerOn(f.agent), f.agent.Launch()); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return by.NodeIsReady(f.agent.Name) })
}

// powerOff pulls the machine's plug.
func powerOff(n *harness.Node) error {
	err := errors.Join(n.Machine.PowerOff(), n.Network.Close())
	<-n.Done
	return err
}

// powerOn gives it power; kedge is not started.
func powerOn(n *harness.Node) error {
	if err := n.Machine.PowerOn(); err != nil {
		return err
	}
	h, err := n.Machine.Host()
	if err != nil {
		return err
	}
	n.Network, err = namespaces.OpenNetwork(h.Path())
	return err
}

// reboot switches the machine off and on.
func reboot(n *harness.Node) error {
	if err := powerOff(n); err != nil {
		return err
	}
	return powerOn(n)
}

// wipe is reboot with another disk, which is empty.
func wipe(n *harness.Node) error {
	if err := errors.Join(powerOff(n), n.Machine.Wipe()); err != nil {
		return err
	}
	return powerOn(n)
}
