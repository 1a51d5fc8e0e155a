package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/internal/lan"
	"kedge/internal/netns"
)

// faults is a cluster of three servers and an agent, each on a machine whose cable can
// be cut and whose plug can be pulled.
type faults struct {
	*fleet
	all   []*node // the servers
	agent *node
	ns    string // with a pod called after each node
	inPod kubernetes.Interface
}

// onMachine makes one more server, with a machine of its own, not yet started.
func (f *fleet) onMachine(t *testing.T) *node {
	t.Helper()
	s := newNode("server")
	s.apiPort = f.apiPort // one port for all, as the service "kubernetes" needs
	f.on(t, s)
	s.flags = []string{"--server=" + f.url(), "--token=" + f.serverToken(t)}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", s.name, s.tail(60))
		}
		if err := s.destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	if err := prepareImages(s.dataDir()); err != nil {
		t.Fatal(err)
	}
	return s
}

// faultFlags are for servers whose nodes are to be given up soon, and whose agents need
// other certificates again and again, whatever else happens.
var faultFlags = []string{"--kube-controller-manager-arg=node-monitor-grace-period=20s", "--agent-certificate-life=1m"}

func newFaults(t *testing.T) *faults {
	t.Helper()
	f := &faults{fleet: newFleet(t, faultFlags...)}
	f.all = []*node{f.node}
	for range 2 {
		s := f.onMachine(t)
		s.flags = append(s.flags, faultFlags...)
		begin := time.Now()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("server %s was ready %s after the command", s.name, since(begin))
		f.all = append(f.all, s)
	}
	f.agent = f.newAgent(t, "--token="+f.token(t))
	if err := prepareImages(f.agent.dataDir()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	if err := f.agent.launch(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 60*time.Second, func() error { return f.nodeIsReady(f.agent.name) })
	t.Logf("agent %s was Ready %s after the command", f.agent.name, since(begin))
	f.voting(t, f.node)
	f.published(t, f.all...)
	f.ns = f.namespace(t)
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.apply(t, f.ns, shell(n.name, "exec sleep 36000", "nodeName: "+n.name+","))
	}
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.waitPod(t, f.ns, n.name, false)
	}
	f.inPod = f.clientInPod(t)
	return f
}

// clientInPod is a client in the agent's pod, which knows the service and no server.
func (f *faults) clientInPod(t *testing.T) kubernetes.Interface {
	t.Helper()
	pod := f.agent.inPod(t, f.ns, f.agent.name)
	config := rest.CopyConfig(f.config)
	config.Host = "https://10.43.0.1"
	// Which gives up a connection with a request that is not answered, where HTTP/2
	// would keep asking over it for half a minute.
	config.TLSClientConfig.NextProtos = []string{"http/1.1"}
	config.Dial = func(_ context.Context, network, address string) (net.Conn, error) {
		return dialFrom(pod, network, address)
	}
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func since(begin time.Time) time.Duration { return time.Since(begin).Round(time.Millisecond) }

func (f *faults) others(s *node) []*node {
	return slices.DeleteFunc(slices.Clone(f.all), func(o *node) bool { return o == s })
}

// leader is who leads by its own account, and the others.
func (f *faults) leader(t *testing.T) (leader *node, rest []*node) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		for _, s := range f.all {
			if says, err := s.detail("datastore"); err == nil && says == "leads" {
				leader = s
				return nil
			}
		}
		return errors.New("nobody leads")
	})
	return leader, f.others(leader)
}

// cut unplugs a node until restore is called, or the test ends.
func (n *node) cut(t *testing.T) (restore func()) {
	t.Helper()
	cable := n.cable(t)
	if err := cable.Cut(); err != nil {
		t.Fatal(err)
	}
	return undone(t, cable.Restore)
}

// deafen makes nodes throw away what they send to another, until undo is called, or the
// test ends.
func deafen(t *testing.T, to *node, from ...*node) (undo func()) {
	t.Helper()
	for _, n := range from {
		if err := n.cable(t).Drop(to.uplink()); err != nil {
			t.Fatal(err)
		}
	}
	return undone(t, func() (err error) {
		for _, n := range from {
			err = errors.Join(err, n.cable(t).Undrop(to.uplink()))
		}
		return err
	})
}

// undone makes undo be called once, at the end of the test at the latest.
func undone(t *testing.T, undo func() error) func() {
	once := sync.OnceFunc(func() {
		if err := undo(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(once)
	return once
}

// voting waits until all servers vote and answer, as one of them sees it.
func (f *faults) voting(t *testing.T, at *node) {
	t.Helper()
	eventually(t, 60*time.Second, func() error {
		out, err := at.tryKedge("server", "ls")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		for _, s := range f.all {
			good := false
			for line := range strings.Lines(out) {
				fields := strings.Fields(line)
				good = good || len(fields) >= 3 && fields[0] == s.name && (fields[1] == "leader" || fields[1] == "follower") && fields[2] == "reachable"
			}
			if !good {
				return fmt.Errorf("%s does not take part:\n%s", s.name, out)
			}
		}
		return nil
	})
}

// cable is the node's, to be cut.
func (n *node) cable(t *testing.T) *lan.Host {
	t.Helper()
	h, err := n.machine.Host()
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// uplink is the address of the node's machine, as a range of one.
func (n *node) uplink() netip.Prefix {
	a := n.machine.Addrs()[0].Addr()
	return netip.PrefixFrom(a, a.BitLen())
}

// detail is what "kedge status" says of a component.
func (n *node) detail(component string) (string, error) {
	_, detail, err := n.component(component)
	return detail, err
}

// component is what "kedge status" knows of one.
func (n *node) component(name string) (state, detail string, err error) {
	out, err := exec.Command(binary(), "status", "-o", "json", "--run-dir="+n.runDir()).Output()
	var report struct {
		Components []struct{ Name, State, Detail string }
	}
	if jsonErr := json.Unmarshal(out, &report); jsonErr != nil {
		return "", "", errors.Join(err, jsonErr)
	}
	for _, c := range report.Components {
		if c.Name == name {
			return c.State, c.Detail, nil
		}
	}
	return "", "", fmt.Errorf("no component %s", name)
}

// says waits until "kedge status" has the text about a component.
func (n *node) says(t *testing.T, component, text string) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		got, err := n.detail(component)
		if err == nil && !strings.Contains(got, text) {
			err = fmt.Errorf("%s says of %s %q, want %q", n.name, component, got, text)
		}
		return err
	})
}

// logged are the lines of the node's log from an offset that are warnings or errors.
func (n *node) logged(t *testing.T, from int64) (lines []string, end int64) {
	t.Helper()
	file, err := os.Open(n.logFile())
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
		_, from[i] = n.logged(t, 0)
	}
	do()
	for i, n := range nodes {
		if lines, _ := n.logged(t, from[i]); len(lines) > most {
			t.Errorf("%s has logged %d warnings and errors:\n%s", n.name, len(lines), strings.Join(lines, "\n"))
		} else {
			t.Logf("%s has logged %d warnings and errors", n.name, len(lines))
		}
	}
}

// works makes sure that servers serve: a write, a pod that is scheduled, the service
// "kubernetes" from a pod, exec by way of the agent's tunnel.
func (f *faults) works(t *testing.T, name string, by *node) {
	t.Helper()
	begin := time.Now()
	eventually(t, 30*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_, err := f.inPod.CoreV1().Namespaces().Get(ctx, f.ns, metav1.GetOptions{})
		return err
	})
	t.Logf("a pod on the agent was answered after %s", since(begin))
	begin = time.Now()
	eventually(t, 30*time.Second, func() error {
		out, err := by.tryKubectl(strings.NewReader(shell(name, "exec sleep 36000", "")), "apply", "-n", f.ns, "-f", "-")
		if err != nil {
			err = fmt.Errorf("apply: %w: %s", err, out)
		}
		return err
	})
	eventually(t, 30*time.Second, func() error {
		p, err := by.pod(f.ns, name)
		if err == nil && p.Spec.NodeName == "" {
			err = errors.New("not scheduled")
		}
		return err
	})
	t.Logf("a pod was scheduled after %s", since(begin))
}

// untouched makes sure that the nodes' own pods run as ever.
func (f *faults) untouched(t *testing.T) {
	t.Helper()
	for _, n := range append(slices.Clone(f.all), f.agent) {
		f.stillRuns(t, f.ns, n.name)
	}
}

// awaitCutOff waits until a server that is cut off says so: /readyz, and the watches.
func (f *faults) awaitCutOff(t *testing.T, s *node, begin time.Time, watch <-chan error) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		if s.client.RESTClient().Get().AbsPath("/readyz").MaxRetries(0).Do(ctx).Error() == nil {
			return fmt.Errorf("%s is ready without the others", s.name)
		}
		return nil
	})
	t.Logf("%s was not ready after %s", s.name, since(begin))
	select {
	case <-watch:
		t.Logf("its watches had ended after %s", since(begin))
	case <-time.After(20 * time.Second):
		t.Errorf("the watches of %s are open", s.name)
	}
	s.says(t, "controllers", "standing by")
	s.says(t, "datastore", "nobody leads")
}

// watched opens a watch, and tells when it has ended.
func (f *faults) watched(t *testing.T, at *node) <-chan error {
	t.Helper()
	w, err := at.client.CoreV1().ConfigMaps("kube-public").Watch(t.Context(), metav1.ListOptions{})
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
func (f *faults) elsewhere(t *testing.T, s *node, begin time.Time) {
	t.Helper()
	eventually(t, 20*time.Second, func() error {
		in, err := f.agent.detail("servers")
		if err == nil && strings.HasPrefix(in, s.uplink().Addr().String()+":") {
			err = fmt.Errorf("the agent uses %s", in)
		}
		return err
	})
	t.Logf("the agent used another server %s after", since(begin))
}

// TestFaults: three servers and an agent, of which each in turn is cut off, in both
// directions or in one, paused, switched off, lost for good and replaced. What clients
// of all three servers are told meanwhile fits one store.
func TestFaults(t *testing.T) {
	t.Parallel()
	f := newFaults(t)
	apart := f.namespace(t)
	h := record(t, apart, f.all...)

	cutOff := func(which string, pick func(t *testing.T) *node) {
		t.Run(which+" is cut off", func(t *testing.T) {
			s := pick(t)
			rest := f.others(s)
			f.quietly(t, func() {
				writes := keepWriting(t, f.ns, s, rest[0], rest[1])
				watch := f.watched(t, s)
				restore, begin := s.cut(t), time.Now()
				f.elsewhere(t, s, begin)
				f.works(t, strings.ReplaceAll(which, " ", "-"), rest[0])
				f.awaitCutOff(t, s, begin, watch)
				rest[1].published(t, rest...)
				restore()
				f.voting(t, s)
				f.published(t, f.all...)
				writes.check(t, which+" is cut off", f.ns, s)
			})
			f.untouched(t)
		})
	}
	cutOff("the leader", func(t *testing.T) *node { s, _ := f.leader(t); return s })
	cutOff("a follower", func(t *testing.T) *node { _, rest := f.leader(t); return rest[0] })

	oneWay := func(which string, drop func(t *testing.T, s *node, rest []*node) (undo func())) {
		t.Run(which, func(t *testing.T) {
			s, rest := f.leader(t)
			writes := keepWriting(t, f.ns, s, rest[0], rest[1])
			begin := time.Now()
			undo := drop(t, s, rest)
			s.says(t, "controllers", "standing by")
			t.Logf("it led no more after %s", since(begin))
			f.works(t, strings.ReplaceAll(which, " ", "-"), rest[0])
			undo()
			f.voting(t, s)
			writes.check(t, which, f.ns, s)
		})
	}
	oneWay("the leader is not heard", func(t *testing.T, s *node, rest []*node) func() {
		undo := []func(){deafen(t, rest[0], s), deafen(t, rest[1], s)}
		return func() { undo[0](); undo[1]() }
	})
	oneWay("the leader does not hear", func(t *testing.T, s *node, rest []*node) func() { return deafen(t, s, rest...) })

	for _, pause := range []time.Duration{5 * time.Second, 15 * time.Second} {
		t.Run(fmt.Sprintf("the leader is paused for %s", pause), func(t *testing.T) {
			s, rest := f.leader(t)
			writes := keepWriting(t, f.ns, rest[0], rest[1])
			begin := time.Now()
			if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			resume := undone(t, func() error { return s.cmd.Process.Signal(syscall.SIGCONT) })
			f.elsewhere(t, s, begin)
			f.works(t, fmt.Sprintf("pause-%d", pause/time.Second), rest[0])
			time.Sleep(time.Until(begin.Add(pause)))
			resume()
			f.voting(t, s)
			writes.check(t, "the leader is paused", f.ns, s)
			if err := f.nodeIsReady(s.name); err != nil {
				t.Error(err)
			}
			f.untouched(t)
		})
	}

	t.Run("the agent is cut off", func(t *testing.T) {
		restore := f.agent.cut(t)
		eventually(t, 40*time.Second, func() error {
			if f.nodeIsReady(f.agent.name) == nil {
				return errors.New("the node of an agent that is cut off is Ready")
			}
			return nil
		})
		restore()
		begin := time.Now()
		eventually(t, 30*time.Second, func() error { return f.nodeIsReady(f.agent.name) })
		t.Logf("its node was Ready again after %s", since(begin))
		f.untouched(t)
	})
	h.End(t)

	t.Run("a server is switched off and on", func(t *testing.T) {
		_, rest := f.leader(t)
		s := rest[0]
		writes := keepWriting(t, f.ns, f.others(s)...)
		if err := s.reboot(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := s.start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("it was ready after %s", since(begin))
		f.voting(t, s)
		writes.check(t, "a server is switched off and on", f.ns, s)
		f.apply(t, f.ns, shell("after-the-boot", "exec sleep 36000", "nodeName: "+s.name+","))
		f.all[0].waitPod(t, f.ns, "after-the-boot", false)
	})

	t.Run("a server dies for good and is replaced", func(t *testing.T) {
		dead, rest := f.leader(t)
		writes := keepWriting(t, f.ns, rest...)
		if err := dead.wipe(); err != nil {
			t.Fatal(err)
		}
		f.works(t, "after-the-death", rest[0])
		begin := time.Now()
		eventually(t, 20*time.Second, func() error {
			out, err := rest[0].tryKedge("server", "remove", dead.name)
			if err != nil {
				err = fmt.Errorf("%w: %s", err, out)
			}
			return err
		})
		dead.flags = append([]string{fmt.Sprintf("--server=https://%s:%d", rest[0].uplink().Addr(), f.apiPort), "--token=" + rest[0].serverToken(t)}, faultFlags...)
		if err := prepareImages(dead.dataDir()); err != nil {
			t.Fatal(err)
		}
		if err := dead.start(); err != nil {
			t.Fatal(err)
		}
		t.Logf("it was replaced after %s", since(begin))
		f.voting(t, rest[1])
		rest[1].published(t, f.all...)
		writes.check(t, "a server dies for good", f.ns, dead)
	})

	t.Run("the agent's certificates were renewed", func(t *testing.T) {
		eventually(t, time.Minute, func() error {
			if got := len(f.agent.logLines(t, "this node's certificates were renewed")); got < 3 {
				return fmt.Errorf("%d times", got)
			}
			return nil
		})
		eventually(t, 20*time.Second, func() error { return f.all[0].nodeIsReady(f.agent.name) })
		f.stillRuns(t, f.ns, f.agent.name)
	})

	t.Run("a node dies and its pods move", func(t *testing.T) {
		by := f.all[0]
		by.apply(t, f.ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: mover}, spec: {selector: {matchLabels: {app: mover}},
			template: {metadata: {labels: {app: mover}}, spec: {terminationGracePeriodSeconds: 0,
			affinity: {nodeAffinity: {preferredDuringSchedulingIgnoredDuringExecution: [{weight: 100, preference: {matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [%s]}]}}]}},
			tolerations: [{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute, tolerationSeconds: 1}, {key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute, tolerationSeconds: 1}],
			containers: [{name: main, image: %q, command: [sleep, "36000"]}]}}}}`, f.agent.name, busybox))
		on := func() (nodes []string) {
			for _, p := range by.podsOf(t, f.ns, "mover") {
				if p.Status.Phase == "Running" && p.DeletionTimestamp == nil {
					nodes = append(nodes, p.Spec.NodeName)
				}
			}
			return nodes
		}
		eventually(t, 30*time.Second, func() error {
			if nodes := on(); !slices.Equal(nodes, []string{f.agent.name}) {
				return fmt.Errorf("it runs on %v", nodes)
			}
			return nil
		})
		if err := f.agent.powerOff(); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		eventually(t, 90*time.Second, func() error {
			if nodes := on(); len(nodes) != 1 || nodes[0] == f.agent.name {
				return fmt.Errorf("it runs on %v", nodes)
			}
			return nil
		})
		t.Logf("the pod ran elsewhere %s after its node had died", since(begin))
		if err := errors.Join(f.agent.powerOn(), f.agent.launch()); err != nil {
			t.Fatal(err)
		}
		eventually(t, 60*time.Second, func() error { return by.nodeIsReady(f.agent.name) })
	})
}

// powerOff pulls the machine's plug.
func (n *node) powerOff() error {
	err := errors.Join(n.machine.PowerOff(), n.network.Close())
	<-n.done
	return err
}

// powerOn gives it power; kedge is not started.
func (n *node) powerOn() error {
	if err := n.machine.PowerOn(); err != nil {
		return err
	}
	h, err := n.machine.Host()
	if err != nil {
		return err
	}
	n.network, err = netns.Open(h.Path())
	return err
}

// reboot switches the machine off and on.
func (n *node) reboot() error {
	if err := n.powerOff(); err != nil {
		return err
	}
	return n.powerOn()
}

// wipe is reboot with another disk, which is empty.
func (n *node) wipe() error {
	if err := errors.Join(n.powerOff(), n.machine.Wipe()); err != nil {
		return err
	}
	return n.powerOn()
}
