package cluster

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/internal/namespaces"
	"kedge/internal/test/host"
	"kedge/scripts/e2e/harness"
	"kedge/throwaway/machine"
)

// earlierVar names the executable of an earlier kedge. With it the test makes its clusters with that kedge and upgrades them
// while their pods run. Without it the test takes the data directories in testdata/upgrade, which commit cd4a154 has written:
// the machines were off while their executable was replaced, and have lost their containers.
const earlierVar = "KEDGE_TEST_EARLIER"

// saveVar names a folder in which a run with [earlierVar] leaves the earlier kedge's data directories.
const saveVar = "KEDGE_TEST_SAVE"

// TestUpgrade runs kedge on the data of an earlier kedge: of one server with an agent, and of three servers with an agent.
func TestUpgrade(t *testing.T) {
	for _, servers := range []int{1, 3} {
		t.Run(fmt.Sprint(servers), func(t *testing.T) {
			s := newUpgradeSite(t)
			for i := range servers {
				s.add(t, fmt.Sprint("upgrade-", i+1), false)
			}
			s.add(t, "upgrade-agent", true)
			if earlier := os.Getenv(earlierVar); earlier == "" {
				s.resume(t)
			} else {
				s.upgrade(t, earlier)
			}
			s.goesOn(t)
		})
	}
}

// upgradeSite is hosts on one switch with nodes of fixed names, addresses and ports, which their data directories have too.
type upgradeSite struct {
	dir   string
	site  *machine.Site
	nodes []*harness.Node // servers, then an agent
}

// The secrets with which agents and servers of the site may join for ever.
const (
	upgradeToken       = "0123456789abcdef-upgraded-agents"
	upgradeServerToken = "0123456789abcdef-upgraded-servers"
)

func newUpgradeSite(t *testing.T) *upgradeSite {
	t.Helper()
	host.RequireRoot(t)
	dir, err := os.MkdirTemp(harness.BaseDir, "up")
	if err != nil {
		t.Fatal(err)
	}
	site, err := machine.Create(machine.Config{Dir: filepath.Join(dir, "site"), Program: harness.Binary(), Supervisor: harness.Binary(), Tethered: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(site.Remove(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	return &upgradeSite{dir: dir, site: site}
}

// add makes the next node, which has not started yet: a server that joins the first one, if there is one.
func (s *upgradeSite) add(t *testing.T, name string, agent bool) *harness.Node {
	t.Helper()
	i := byte(len(s.nodes) + 1)
	h, err := s.site.LAN().Host(fmt.Sprint("h", i), netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 0, 2, i}), 24))
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Route(netip.MustParsePrefix("0.0.0.0/0"), netip.MustParseAddr("192.0.2.254")); err != nil {
		t.Fatal(err)
	}
	n := &harness.Node{Name: name, Dir: filepath.Join(s.dir, fmt.Sprint(i)), APIPort: 6443, Env: harness.BareEnv(), Agent: agent}
	n.Kubeconfig = filepath.Join(n.Dir, "kubeconfig")
	if n.Network, err = namespaces.OpenNetwork(h.Path()); err != nil {
		t.Fatal(err)
	}
	switch {
	case i == 1:
		n.Flags = []string{"--token=" + upgradeToken, "--server-token=" + upgradeServerToken}
	case agent:
		n.Flags = []string{"--server=https://192.0.2.1:6443", "--token=" + upgradeToken}
	default:
		n.Flags = []string{"--server=https://192.0.2.1:6443", "--token=" + upgradeServerToken}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of %s:\n%s", n.Name, n.Tail(40))
		}
		if err := n.Destroy(); err != nil {
			t.Errorf("clean-up: %v", err)
		}
	})
	s.nodes = append(s.nodes, n)
	return n
}

func (s *upgradeSite) servers() []*harness.Node { return s.nodes[:len(s.nodes)-1] }

// kept is the archive of the data directories of all nodes.
func (s *upgradeSite) kept(dir string) string {
	return filepath.Join(dir, fmt.Sprintf("cd4a154-%d.tar.zst", len(s.servers())))
}

// resume starts all nodes with the kept data directories.
func (s *upgradeSite) resume(t *testing.T) {
	t.Helper()
	if err := unpackArchive(s.kept("testdata/upgrade"), s.dir); err != nil {
		t.Fatal(err)
	}
	for _, n := range s.nodes {
		if err := errors.Join(harness.PrepareImages(n.DataDir()), n.Launch()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range s.nodes {
		if err := n.WaitReady(90 * time.Second); err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
	}
	s.has(t)
	s.serves(t)
}

// upgrade makes the cluster with an earlier kedge, and then restarts one node after the other with this one.
func (s *upgradeSite) upgrade(t *testing.T, earlier string) {
	t.Helper()
	for _, n := range s.nodes {
		n.Program = earlier
		if err := os.MkdirAll(n.DataDir(), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(harness.PrepareImages(n.DataDir()), n.Start()); err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
	}
	s.create(t)
	s.has(t)
	s.serves(t)
	before := s.containers(t)
	if dir := os.Getenv(saveVar); dir != "" {
		s.stop(t)
		if err := packArchive(s.kept(dir), s.dir, s.nodes); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range s.nodes {
		n.Program = ""
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Fatal(err)
		}
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
		if os.Getenv(saveVar) == "" { // else the others are off, too
			if err := n.WaitReady(90 * time.Second); err != nil {
				t.Fatalf("%s: %v", n.Name, err)
			}
		}
	}
	for _, n := range s.nodes {
		if err := n.WaitReady(90 * time.Second); err != nil {
			t.Fatalf("%s: %v", n.Name, err)
		}
	}
	s.has(t)
	s.serves(t)
	if after := s.containers(t); after != before {
		t.Errorf("containers before the upgrade\n%s\nand after\n%s", before, after)
	}
}

func (s *upgradeSite) stop(t *testing.T) {
	t.Helper()
	for _, n := range s.nodes {
		if err := n.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
			t.Fatal(err)
		}
	}
}

// create makes the cluster's objects.
func (s *upgradeSite) create(t *testing.T) {
	t.Helper()
	first := s.nodes[0]
	first.Kubectl(t, "create", "namespace", "upgrade")
	first.Kubectl(t, "create", "configmap", "-n", "upgrade", "settings", "--from-literal=color=green")
	first.Kubectl(t, "create", "secret", "generic", "-n", "upgrade", "password", "--from-literal=word=open sesame")
	first.Apply(t, "upgrade", `{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: boats.example.com}, spec: {group: example.com, scope: Namespaced,
		names: {plural: boats, singular: boat, kind: Boat}, versions: [{name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object, x-kubernetes-preserve-unknown-fields: true}}}]}}`)
	first.Kubectl(t, "wait", "--for=condition=Established", "crd/boats.example.com")
	harness.Eventually(t, 20*time.Second, func() error {
		out, err := first.TryKubectl(strings.NewReader(`{apiVersion: example.com/v1, kind: Boat, metadata: {name: ark}, spec: {length: 137}}`), "apply", "-n", "upgrade", "-f", "-")
		if err != nil {
			return errors.New(out)
		}
		return nil
	})
	for _, n := range s.nodes {
		first.Apply(t, "upgrade", fmt.Sprintf(`{apiVersion: apps/v1, kind: Deployment, metadata: {name: on-%s}, spec: {selector: {matchLabels: {app: web, on: %s}}, template: {metadata: {labels: {app: web, on: %s}},
			spec: {nodeName: %s, terminationGracePeriodSeconds: 1, containers: [{name: main, image: %q, command: [probe, serve, ":8080", %s], readinessProbe: {httpGet: {port: 8080, path: /}, periodSeconds: 1}}]}}}}`,
			n.Name, n.Name, n.Name, n.Name, harness.Busybox, n.Name))
		first.Kubectl(t, "rollout", "status", "-n", "upgrade", "deployment/on-"+n.Name, "--timeout=60s")
	}
	first.Apply(t, "upgrade", `{apiVersion: v1, kind: Service, metadata: {name: web}, spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 30080}]}}`)
	first.Apply(t, "upgrade", `{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: only-web}, spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 8080}]}]}}`)
}

// has looks for the objects of create, by way of each server.
func (s *upgradeSite) has(t *testing.T) {
	t.Helper()
	for _, n := range s.servers() {
		for object, want := range map[[2]string]string{
			{"configmap/settings", "{.data.color}"}:          "green",
			{"secret/password", "{.data.word}"}:              "b3BlbiBzZXNhbWU=",
			{"boat/ark", "{.spec.length}"}:                   "137",
			{"service/web", "{.spec.ports[0].nodePort}"}:     "30080",
			{"networkpolicy/only-web", "{.spec.ingress[*]}"}: `{"ports":[{"port":8080,"protocol":"TCP"}]}`,
		} {
			if got := n.Kubectl(t, "get", "-n", "upgrade", object[0], "-o", "jsonpath="+object[1]); got != want {
				t.Errorf("%s of %s is %q by way of %s, want %q", object[1], object[0], got, n.Name, want)
			}
		}
		if list := serverList(t, n); len(list) != len(s.servers()) {
			t.Errorf("by way of %s the servers are %v", n.Name, list)
		}
	}
}

// serves waits until the pod of each node answers, directly and by way of the service, and every node is Ready.
func (s *upgradeSite) serves(t *testing.T) {
	t.Helper()
	first := s.nodes[0]
	for _, n := range s.nodes {
		first.Kubectl(t, "wait", "--for=condition=Ready", "node/"+n.Name, "--timeout=60s")
		first.Kubectl(t, "rollout", "status", "-n", "upgrade", "deployment/on-"+n.Name, "--timeout=90s")
	}
	for _, n := range s.nodes {
		harness.Eventually(t, 30*time.Second, func() error {
			heard := map[string]bool{}
			for range 40 {
				answer, err := n.Get("http://192.0.2.1:30080/")
				if err != nil {
					return fmt.Errorf("from %s: %w", n.Name, err)
				}
				heard[answer] = true
			}
			if len(heard) != len(s.nodes) {
				return fmt.Errorf("from %s only these answer: %v", n.Name, heard)
			}
			return nil
		})
		if out, err := first.TryKubectl(nil, "exec", "-n", "upgrade", "deployment/on-"+n.Name, "--", "echo", "here"); err != nil || out != "here\n" {
			t.Errorf("exec on %s: %q, %v", n.Name, out, err)
		}
	}
}

// containers are the containers of all pods, and how often each was restarted.
func (s *upgradeSite) containers(t *testing.T) string {
	t.Helper()
	return s.nodes[0].Kubectl(t, "get", "pods", "-n", "upgrade", "--sort-by=.metadata.name", "-o",
		`jsonpath={range .items[*]}{.metadata.name} {.status.containerStatuses[0].containerID} {.status.containerStatuses[0].restartCount}{"\n"}{end}`)
}

// goesOn has a node join with a secret of the earlier kedge, and looks for what is written now after a restart.
func (s *upgradeSite) goesOn(t *testing.T) {
	t.Helper()
	first := s.nodes[0]
	another := s.add(t, "upgrade-another", true)
	if err := another.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error { return first.NodeIsReady(another.Name) })
	s.nodes = s.nodes[:len(s.nodes)-1]
	first.Kubectl(t, "create", "configmap", "-n", "upgrade", "after", "--from-literal=color=red")
	if err := errors.Join(first.Signal(syscall.SIGTERM, 20*time.Second), first.Start()); err != nil {
		t.Fatal(err)
	}
	if got := first.Kubectl(t, "get", "configmap", "-n", "upgrade", "after", "-o", "jsonpath={.data.color}"); got != "red" {
		t.Errorf("after a restart the object is %q", got)
	}
	s.has(t)
}

// packArchive writes the data directories of nodes, which are below root, to a file: without programs, images and containers,
// which are large and made anew.
func packArchive(file, root string, nodes []*harness.Node) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	z, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	if err != nil {
		return err
	}
	w := tar.NewWriter(z)
	for _, n := range nodes {
		err := filepath.WalkDir(n.DataDir(), func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			below, err := filepath.Rel(n.DataDir(), path)
			if err != nil {
				return err
			}
			switch below {
			case "program", "images", "containerd", "runtime", "logs":
				return fs.SkipDir
			}
			info, err := e.Info()
			if err != nil || !info.Mode().IsRegular() && !info.IsDir() {
				return err
			}
			h, err := tar.FileInfoHeader(info, "")
			if err != nil {
				return err
			}
			if h.Name, err = filepath.Rel(root, path); err != nil {
				return err
			}
			if err := w.WriteHeader(h); err != nil || info.IsDir() {
				return err
			}
			in, err := os.Open(path)
			if err != nil {
				return err
			}
			defer in.Close()
			_, err = io.Copy(w, in)
			return err
		})
		if err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), z.Close())
}

// unpackArchive writes the contents of a file of packArchive below root.
func unpackArchive(file, root string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		return err
	}
	defer z.Close()
	r := tar.NewReader(z)
	for {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		path := filepath.Join(root, h.Name)
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(path, h.FileInfo().Mode()); err != nil {
				return err
			}
			continue
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		out, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, h.FileInfo().Mode())
		if err != nil {
			return err
		}
		_, err = io.Copy(out, r)
		if err := errors.Join(err, out.Close()); err != nil {
			return err
		}
	}
}
