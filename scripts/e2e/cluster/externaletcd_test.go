package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// externalFolder is where the first server's machine has the files of TLS.
const externalFolder = "/etc/kedge"

// TestExternalEtcd: servers whose datastore is a real etcd with mutual TLS. It may go away and come back, and so may they.
func TestExternalEtcd(t *testing.T) {
	t.Parallel()
	e := harness.NewEtcd(t, net.IPv4(192, 0, 2, 1))
	f := harness.NewPreparedFleet(t, func(n *harness.Node) {
		e.ListenIn(n.Network)
		for _, file := range []string{e.CA, e.Cert, e.Key} {
			data, err := os.ReadFile(file)
			if err == nil {
				err = errors.Join(os.MkdirAll(n.Machine.Disk(externalFolder), 0o755), os.WriteFile(filepath.Join(n.Machine.Disk(externalFolder), filepath.Base(file)), data, 0o600))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := e.Start(); err != nil {
			t.Fatal(err)
		}
	}, e.Flags(externalFolder)...)
	ns := f.Namespace(t)
	c := &externalCluster{Fleet: f, etcd: e, ns: ns}
	f.Apply(t, ns, harness.Shell("client", "exec sleep 3600", ""))
	f.WaitPod(t, ns, "client", false)
	f.Servers(t, ns, "web", 1, "")
	f.Service(t, ns, "web", "web", "")
	c.answers(t, "web")
	c.noOwnStore(t, f.Node)
	t.Run("what needs kedge's own datastore is refused", c.refuses)
	t.Run("the etcd is killed", c.etcdKilled)
	t.Run("kedge starts before the etcd", c.startsFirst)
	t.Run("a second server leads when the first is killed", c.secondServer)
	t.Run("another datastore is refused", c.otherDatastore)
}

type externalCluster struct {
	*harness.Fleet
	etcd *harness.Etcd
	ns   string
}

// answers waits until a pod reaches a service by its name.
func (c *externalCluster) answers(t *testing.T, service string) {
	t.Helper()
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := c.TryKubectl(nil, "exec", "-n", c.ns, "client", "--", "probe", "get", "http://"+service+"."+c.ns+"/")
		if err == nil && strings.TrimSpace(out) != service+"-0" {
			err = fmt.Errorf("it answers %q", out)
		}
		return err
	})
}

// noOwnStore makes sure that nothing of kedge's own datastore is there.
func (c *externalCluster) noOwnStore(t *testing.T, n *harness.Node) {
	t.Helper()
	if _, err := os.Stat(filepath.Join(n.DataDir(), "server", "store")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the folder of kedge's own datastore: %v", err)
	}
	if conn, err := n.Dial("tcp", "127.0.0.1:2380"); err == nil {
		conn.Close()
		t.Error("something listens on the port of kedge's own datastore")
	}
	if s := n.StatusOf(t, "datastore"); !strings.HasPrefix(s.Detail, "external etcd") {
		t.Errorf("the status is %+v", s)
	}
}

func (c *externalCluster) refuses(t *testing.T) {
	for _, args := range [][]string{{"snapshot", "save"}, {"recovery-key", "show"}, {"secrets-encrypt", "status"}, {"secrets-encrypt", "rotate"}} {
		if out, err := c.TryKedge(args...); err == nil || !strings.Contains(out, "the datastore of this server is an external etcd") || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: %v, %s", strings.Join(args, " "), err, out)
		}
	}
}

// etcdKilled kills the etcd for a while: kedge says so, and works again without a start.
func (c *externalCluster) etcdKilled(t *testing.T) {
	c.etcd.Kill()
	harness.Eventually(t, 30*time.Second, func() error {
		s, err := c.TryStatusOf("datastore")
		if err == nil && !strings.Contains(s.Error, "the external etcd does not answer at "+c.etcd.URL) {
			err = fmt.Errorf("the status is %+v", s)
		}
		return err
	})
	harness.Eventually(t, 30*time.Second, func() error { // it has no leader any more
		s, err := c.TryStatusOf("controllers")
		if err == nil && s.Detail != "standing by" {
			err = fmt.Errorf("the status is %+v", s)
		}
		return err
	})
	select {
	case <-c.Done:
		t.Fatalf("kedge ended: %v\n%s", c.Err, c.Tail(20))
	default:
	}
	if err := c.etcd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	c.works(t, "after-the-etcd")
	c.StillRuns(t, c.ns, "client")
}

// works runs a new pod behind a new service.
func (c *externalCluster) works(t *testing.T, name string) {
	t.Helper()
	c.Servers(t, c.ns, name, 1, "")
	c.Service(t, c.ns, name, name, "")
	c.answers(t, name)
}

// startsFirst starts kedge while its etcd is away.
func (c *externalCluster) startsFirst(t *testing.T) {
	c.Stop(t, syscall.SIGTERM, 20*time.Second)
	c.etcd.Kill()
	if err := c.Launch(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		s, err := c.TryStatusOf("datastore")
		if err == nil && !strings.HasPrefix(s.Detail, "waiting for the external etcd: ") {
			err = fmt.Errorf("the status is %+v", s)
		}
		return err
	})
	if err := c.etcd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := c.WaitReady(60 * time.Second); err != nil {
		t.Fatal(err)
	}
	if lines := c.LogLines(t, "waiting for the external etcd"); len(lines) != 1 {
		t.Errorf("it said that it waits in %q, want one line", lines)
	}
	c.StillRuns(t, c.ns, "client")
	c.works(t, "after-the-start")
	c.noOwnStore(t, c.Node)
}

// secondServer joins a second server, which leads after the first has died, and stops in order.
func (c *externalCluster) secondServer(t *testing.T) {
	second := newServer(t, c.Fleet)
	join := second.Flags
	refused(t, "a server without the etcd", second, "which is an external etcd here")
	second.Flags = append(join, c.etcd.Flags(filepath.Dir(c.etcd.CA))...)
	if err := harness.PrepareImages(second.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	c.noOwnStore(t, second)
	both := []*harness.Node{c.Node, second}
	if list := serverList(t, second); len(list) != 2 || list[c.Name] != [2]string{"leader", "reachable"} || list[second.Name] != [2]string{"follower", "reachable"} {
		t.Errorf("the servers are %v", list)
	}
	second.AwaitEndpoints(t, both...)

	begin := time.Now()
	if err := c.Signal(syscall.SIGKILL, 5*time.Second); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if list := serverList(t, second); list[second.Name][0] != "leader" {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	t.Logf("the second server led %s after the first was killed", harness.Since(begin))
	second.AwaitEndpoints(t, second)
	second.Servers(t, c.ns, "by-the-second", 1, "nodeName: "+second.Name+",")
	second.Apply(t, c.ns, deployment)
	harness.Eventually(t, 60*time.Second, func() error {
		out, err := second.TryKubectl(nil, "rollout", "status", "-n", c.ns, "deployment/d", "--timeout=1s")
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		return err
	})

	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	if list := serverList(t, c.Node); list[c.Name] != [2]string{"follower", "reachable"} {
		t.Errorf("the servers are %v", list)
	}
	c.AwaitEndpoints(t, both...)
	begin = time.Now()
	second.Stop(t, syscall.SIGTERM, 20*time.Second)
	harness.Eventually(t, 30*time.Second, func() error {
		if list := serverList(t, c.Node); list[c.Name][0] != "leader" {
			return fmt.Errorf("the servers are %v", list)
		}
		return nil
	})
	t.Logf("the first server led %s after the second was told to stop", harness.Since(begin))

	// A server that is removed stops, and comes back with a token.
	second.Flags = second.Flags[:1]
	second.Flags = append(second.Flags, c.etcd.Flags(filepath.Dir(c.etcd.CA))...)
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	c.Kedge(t, "server", "remove", second.Name)
	select {
	case <-second.Done:
	case <-time.After(harness.Patient(20 * time.Second)):
		t.Fatal("a removed server goes on")
	}
	harness.Eventually(t, 30*time.Second, func() error { return forgotten(c.Node, second.Name) })
	refused(t, "a removed server", second, "was removed from the cluster")
	second.Flags = append(second.Flags, "--token="+c.ServerToken(t))
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	c.AwaitEndpoints(t, both...)
	second.Stop(t, syscall.SIGTERM, 20*time.Second)
}

const deployment = `{apiVersion: apps/v1, kind: Deployment, metadata: {name: d}, spec: {replicas: 1, selector: {matchLabels: {app: d}}, template: {metadata: {labels: {app: d}},
	spec: {terminationGracePeriodSeconds: 1, containers: [{name: main, image: ` + harness.Busybox + `, command: [sleep, "3600"]}]}}}}`

// otherDatastore starts the server without the etcd, and with one whose authority it does not trust.
func (c *externalCluster) otherDatastore(t *testing.T) {
	c.Stop(t, syscall.SIGTERM, 20*time.Second)
	with := c.Flags
	defer func() { c.Flags = with }()
	c.Flags = nil
	refused(t, "a start without the etcd", c.Node, "are in an external etcd, and kedge cannot move them")
	c.Flags = with[:1]
	refused(t, "a start without the files of TLS", c.Node, "does not trust")
	c.Flags = []string{"--datastore-endpoint=mysql://root:secret@db/k"}
	refused(t, "another database", c.Node, "kedge supports etcd only")
	c.Flags = append([]string{"--server=" + c.URL()}, with...)
	for _, args := range [][]string{{"server", "reset"}, {"recover"}} {
		if out, err := c.RunKedge(append(args, with...)...); err == nil || !strings.Contains(out, "the datastore of this server is an external etcd") {
			t.Errorf("%s: %v, %s", strings.Join(args, " "), err, out)
		}
	}
	c.Flags = with
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
}
