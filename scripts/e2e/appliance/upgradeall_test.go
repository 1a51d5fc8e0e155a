package appliance

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/scripts/e2e/harness"
)

// clusterSite is a cluster whose nodes have executables of their own, and are started again when they end.
type clusterSite struct {
	*upgradeSite
	nodes []*harness.Node

	stop chan struct{}
	all  sync.WaitGroup
}

// newClusterSite makes a cluster of servers and agents, of which site is the first.
func newClusterSite(t *testing.T, site *upgradeSite, servers, agents int) *clusterSite {
	t.Helper()
	s := &clusterSite{upgradeSite: site, stop: make(chan struct{})}
	s.nodes = []*harness.Node{s.Node}
	for range servers - 1 {
		n := harness.NewNode("server")
		n.APIPort = s.APIPort // that of all servers of a cluster: nodes connect to each of them
		s.GiveMachine(t, n)
		n.Flags = []string{"--server=" + s.URL(), "--token=" + s.ServerToken(t)}
		s.add(t, n, harness.Binary())
	}
	for range agents {
		s.add(t, s.NewAgent(t, "--token="+s.NewToken(t)), harness.Binary())
	}
	s.podOnEach(t)
	return s
}

// podOnEach runs a pod on each node.
func (s *clusterSite) podOnEach(t *testing.T) {
	t.Helper()
	for i, n := range s.nodes {
		name := fmt.Sprint("on-", i)
		s.Apply(t, s.ns, harness.Shell(name, "trap 'exit 0' TERM; while true; do sleep 1; done", "nodeName: "+n.Name+","))
		s.WaitPod(t, s.ns, name, false)
	}
	s.containers = s.running()
}

// putByHand puts an executable of this machine on a node's, as a person does.
func putByHand(t *testing.T, n *harness.Node, program string) {
	t.Helper()
	data, err := os.ReadFile(program)
	if err == nil {
		err = os.MkdirAll(n.Machine.Disk(filepath.Dir(installedProgram)), 0o755)
	}
	if err == nil {
		err = os.WriteFile(n.Machine.Disk(installedProgram), data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	n.Program = installedProgram
}

// add starts a node with a copy of an executable of its own.
func (s *clusterSite) add(t *testing.T, n *harness.Node, program string) {
	t.Helper()
	if !n.Agent {
		t.Cleanup(func() {
			if t.Failed() {
				t.Logf("log of %s:\n%s", n.Name, n.Tail(40))
			}
			if err := n.Destroy(); err != nil {
				t.Errorf("clean-up: %v", err)
			}
		})
	}
	putByHand(t, n, program)
	if err := errors.Join(harness.PrepareImages(n.DataDir()), n.Start()); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 60*time.Second, func() error { return s.NodeIsReady(n.Name) })
	s.nodes = append(s.nodes, n)
}

// supervise starts the nodes again whenever they end, until release is called or the test ends.
func (s *clusterSite) supervise(t *testing.T) (release func()) {
	t.Helper()
	for _, n := range s.nodes {
		s.all.Go(func() {
			for {
				select {
				case <-s.stop:
					return
				case <-n.Done:
				}
				if err := n.Launch(); err != nil {
					t.Errorf("start %s again: %v", n.Name, err)
					return
				}
			}
		})
	}
	release = sync.OnceFunc(func() {
		close(s.stop)
		s.all.Wait()
		s.stop = make(chan struct{})
	})
	t.Cleanup(release)
	return release
}

// load writes objects until release is called, and returns the names of those that were acknowledged.
func (s *clusterSite) load(t *testing.T) (release func() []string) {
	t.Helper()
	stop, done := make(chan struct{}), make(chan struct{})
	var written []string
	go func() {
		defer close(done)
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			case <-time.After(50 * time.Millisecond):
			}
			name := fmt.Sprint("load-", i)
			if _, err := s.TryKubectl(nil, "create", "configmap", "-n", s.ns, name, "--from-literal=text="+name); err == nil {
				written = append(written, name)
			}
		}
	}()
	return func() []string {
		close(stop)
		<-done
		return written
	}
}

// supportOfAll collects the state of all nodes in one file.
func (s *clusterSite) supportOfAll(t *testing.T) {
	t.Helper()
	out, err := s.RunKedge("support-bundle", "--all", "--output=/root/all.tar.zst")
	if err != nil || !strings.Contains(out, fmt.Sprintf(": %d files, ", len(s.nodes))) {
		t.Fatalf("support-bundle: %v\n%s", err, out)
	}
	f, err := os.Open(s.Machine.Disk("/root/all.tar.zst"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	found := map[string]bool{}
	eachFile(t, f, func(name string, r io.Reader) {
		eachFile(t, r, func(inner string, _ io.Reader) { found[name+" "+filepath.Base(inner)] = true })
	})
	for _, n := range s.nodes {
		for _, file := range []string{"status.json", "doctor.txt", "version.txt"} {
			if !found[n.Name+".tar.zst "+file] {
				t.Errorf("the state of %s has no %s", n.Name, file)
			}
		}
	}
}

// eachFile calls f for each file of a compressed archive.
func eachFile(t *testing.T, r io.Reader, f func(name string, r io.Reader)) {
	t.Helper()
	z, err := zstd.NewReader(r)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	for archive := tar.NewReader(z); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		f(h.Name, archive)
	}
}

// TestUpgradeOfCluster upgrades all nodes from one server, under load: to a version that panics, which stops at the first
// node, and to a good one. KEDGE_TEST_LONG makes it three servers with two agents in place of one with one.
func TestUpgradeOfCluster(t *testing.T) {
	servers, agents := 1, 1
	if os.Getenv(longVar) != "" {
		servers, agents = 3, 2
	}
	s := newClusterSite(t, newUpgradeSite(t), servers, agents)
	release := s.supervise(t)
	stopped := s.load(t)

	out, err := s.RunKedge("upgrade", "--all", "--observe=2s", "--file="+s.faulty(fault{Fault: "panic"}))
	if err == nil || !strings.Contains(out, "the upgrade stopped at node "+s.Name) || !strings.Contains(out, "did not become healthy in 3 starts") || strings.Count(out, " untouched ") != len(s.nodes)-1 {
		t.Errorf("a faulty version: %v\n%s", err, out)
	}
	good := s.newer("good")
	out, err = s.RunKedge("upgrade", "--all", "--observe=2s", "--parallel=2", "--file="+good)
	if err != nil || strings.Count(out, ": upgraded\n") != len(s.nodes) {
		t.Errorf("a good version: %v\n%s", err, out)
	}
	t.Logf("it prints\n%s", out)
	written := stopped()
	release()
	want, err := os.ReadFile(s.Machine.Disk(good))
	if err != nil {
		t.Fatal(err)
	}
	s.allHave(t, want, written)
	s.supportOfAll(t)
	// Once more: nothing to do, and nothing restarts.
	if out, err := s.RunKedge("upgrade", "--all", "--file="+good); err != nil || strings.Count(out, ": has the version already\n") != len(s.nodes) {
		t.Errorf("again: %v\n%s", err, out)
	}
	if out, err := s.nodes[len(s.nodes)-1].RunKedge("upgrade", "--all", "--file="+installedProgram); err == nil || !strings.Contains(out, "run \"kedge upgrade --all\" on a server") {
		t.Errorf("on an agent: %v\n%s", err, out)
	}
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Error(err)
		}
	}
}

// allHave looks at what an upgrade of the cluster must leave: the executable on each node, nodes that are ready, the containers of
// before, and what was acknowledged meanwhile.
func (s *clusterSite) allHave(t *testing.T, want []byte, written []string) {
	t.Helper()
	for _, n := range s.nodes {
		if x, err := os.ReadFile(n.Machine.Disk(installedProgram)); err != nil || !bytes.Equal(x, want) {
			t.Errorf("%s has another executable, %v", n.Name, err)
		}
		harness.Eventually(t, 60*time.Second, func() error { return s.NodeIsReady(n.Name) })
	}
	if now := s.running(); now != s.containers {
		t.Errorf("the containers were\n%sand are\n%s", s.containers, now)
	}
	have := "\n" + s.Kubectl(t, "get", "configmap", "-n", s.ns, "-o", `jsonpath={range .items[*]}{.metadata.name}{"\n"}{end}`)
	for _, name := range written {
		if !strings.Contains(have, "\n"+name+"\n") {
			t.Errorf("%s was acknowledged and is lost", name)
		}
	}
	t.Logf("%d objects were written meanwhile", len(written))
}

// TestUpgradeDrains: before the upgrade of a node its pods are evicted, and come back; afterwards the node is uncordoned, also if
// it went back. A node that was cordoned before stays so. KEDGE_TEST_LONG enables it.
func TestUpgradeDrains(t *testing.T) {
	requireLong(t)
	s := newClusterSite(t, newUpgradeSite(t), 1, 1)
	server, agent := s.Name, s.nodes[1].Name
	release := s.supervise(t)
	s.Apply(t, s.ns, fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: web}, spec: {replicas: 3, selector: {matchLabels: {app: web}}, template: {metadata: {labels: {app: web}},
		spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [sh, -c, "trap 'exit 0' TERM; while true; do sleep 1; done"]}]}}}}`, harness.Busybox))
	// webs waits until all pods of the Deployment are ready, and returns their UIDs.
	webs := func() map[string]bool {
		t.Helper()
		s.Kubectl(t, "rollout", "status", "-n", s.ns, "deployment/web", "--timeout=90s")
		uids := map[string]bool{}
		for _, p := range s.PodsOf(t, s.ns, "web") {
			uids[string(p.UID)] = true
		}
		return uids
	}
	cordoned := func(want string) {
		t.Helper()
		if got := s.Kubectl(t, "get", "nodes", "--field-selector=spec.unschedulable=true", "-o", "jsonpath={.items[*].metadata.name}"); got != want {
			t.Errorf("cordoned are %q, and should be %q", got, want)
		}
	}
	before := webs()
	out, err := s.RunKedge("upgrade", "--all", "--drain", "--observe=2s", "--file="+s.newer("drained"))
	if err != nil || strings.Count(out, ": upgraded\n") != 2 || !strings.Contains(out, "node/"+server+" drained") || !strings.Contains(out, "node/"+agent+" drained") {
		t.Errorf("a good version: %v\n%s", err, out)
	}
	cordoned("")
	after := webs()
	for uid := range after {
		if before[uid] {
			t.Error("a pod of before still runs: it was not evicted")
		}
	}

	out, err = s.RunKedge("upgrade", "--all", "--drain", "--observe=2s", "--file="+s.faulty(fault{Fault: "panic"}))
	if err == nil || !strings.Contains(out, "the upgrade stopped at node "+server) || !strings.Contains(out, "node/"+server+" uncordoned") || strings.Contains(out, "node/"+agent+" ") {
		t.Errorf("a faulty version: %v\n%s", err, out)
	}
	cordoned("")
	webs()

	s.Kubectl(t, "cordon", agent)
	out, err = s.RunKedge("upgrade", "--all", "--drain", "--observe=2s", "--file="+s.newer("again"))
	if err != nil || strings.Count(out, ": upgraded\n") != 2 {
		t.Errorf("with a cordoned node: %v\n%s", err, out)
	}
	cordoned(agent)
	webs()
	for _, p := range s.PodsOf(t, s.ns, "web") {
		if p.Spec.NodeName != server {
			t.Errorf("%s is on %s", p.Name, p.Spec.NodeName)
		}
	}
	release()
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Error(err)
		}
	}
}
