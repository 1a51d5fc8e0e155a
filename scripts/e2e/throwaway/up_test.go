package throwaway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// clusters is a folder of throwaway clusters and a kubeconfig of a test's own.
type clusters struct {
	dir, kubeconfig string
}

// newClusters makes one. At the end of the test nothing may be left of its clusters.
func newClusters(t *testing.T) clusters {
	t.Helper()
	harness.TakeSlot(t)
	dir, err := os.MkdirTemp(harness.BaseDir, "up")
	if err != nil {
		t.Fatal(err)
	}
	c := clusters{dir: filepath.Join(dir, "clusters"), kubeconfig: filepath.Join(dir, "kubeconfig")}
	t.Cleanup(func() {
		if out, err := c.kedge("down", "--all").CombinedOutput(); err != nil {
			t.Errorf("kedge down --all: %v: %s", err, out)
		}
		c.nothingLeft(t)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return c
}

// kedge is a command about the clusters.
func (c clusters) kedge(args ...string) *exec.Cmd {
	cmd := exec.Command(harness.Binary(), args...)
	cmd.Env = append(os.Environ(), "KEDGE_CLUSTERS="+c.dir, "KUBECONFIG="+c.kubeconfig, "KUBECACHEDIR="+filepath.Join(harness.BaseDir, "cache"))
	return cmd
}

// must runs a command and returns its standard output.
func (c clusters) must(t *testing.T, args ...string) string {
	t.Helper()
	var out, errOut bytes.Buffer
	cmd := c.kedge(args...)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil {
		t.Fatalf("kedge %s: %v\n%s%s", strings.Join(args, " "), err, out.String(), errOut.String())
	}
	return out.String()
}

// refused runs a command that must fail with a sentence.
func (c clusters) refused(t *testing.T, sentence string, args ...string) {
	t.Helper()
	out, err := c.kedge(args...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), sentence) {
		t.Errorf("kedge %s: %v, %s; want %q", strings.Join(args, " "), err, out, sentence)
	}
}

// ids are those of the sites in the folder, as kernel objects have them.
func (c clusters) ids() []string {
	files, _ := filepath.Glob(filepath.Join(c.dir, "*", "*", "site.json"))
	more, _ := filepath.Glob(filepath.Join(c.dir, "templates", "*", "site.json"))
	var ids []string
	for _, f := range append(files, more...) {
		data, _ := os.ReadFile(f)
		if _, rest, ok := strings.Cut(string(data), `"id": "`); ok {
			ids = append(ids, rest[:8])
		}
	}
	return ids
}

// nothingLeft checks that no process, mount, link, control group or file is left.
func (c clusters) nothingLeft(t *testing.T) {
	t.Helper()
	for _, file := range []string{"mountinfo"} {
		data, err := os.ReadFile("/proc/self/" + file)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(data, []byte(c.dir)) {
			t.Errorf("mounts are left:\n%s", data)
		}
	}
	for _, p := range harness.ProcessesWith(c.dir + "/") {
		t.Errorf("left behind: process %v", p)
	}
	filepath.WalkDir(c.dir, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != "lock" {
			t.Errorf("left behind: %s", path)
		}
		return nil
	})
}

// gone checks that nothing of sites is left in the kernel.
func gone(t *testing.T, ids []string) {
	t.Helper()
	if len(ids) == 0 {
		t.Error("there were no sites to look for")
	}
	for _, id := range ids {
		groups, _ := filepath.Glob("/sys/fs/cgroup/*/kedge-machines-" + id)
		unified, _ := filepath.Glob("/sys/fs/cgroup/kedge-machines-" + id)
		for _, g := range append(groups, unified...) {
			t.Errorf("left behind: %s", g)
		}
		if _, err := net.InterfaceByName("kdm-" + id); err == nil {
			t.Errorf("left behind: link kdm-%s", id)
		}
	}
}

// upped is throwaway clusters with the cluster "one", and an application on it that is published at a port.
type upped struct {
	clusters
	img  image.Image // of the application
	port int
	made []string // what clusters are called on this machine
}

// ready is how many nodes of a cluster are Ready.
func (u *upped) ready(t *testing.T, context string) int {
	t.Helper()
	out, err := u.kedge("kubectl", "--context="+context, "get", "nodes", "--no-headers").Output()
	if err != nil {
		t.Fatal(err)
	}
	return strings.Count(string(out), " Ready ")
}

func newUpped(t *testing.T) *upped {
	t.Helper()
	u := &upped{clusters: newClusters(t)}
	archive := filepath.Join(filepath.Dir(u.dir), "web.tar")
	probe, err := harness.BuiltProgram("probe")
	if err != nil {
		t.Fatal(err)
	}
	u.img = image.Image{Name: "example.org/web:1", Files: map[string]image.File{"/bin/probe": probe}}
	image.Write(t, archive, image.Docker, u.img)
	manifests := filepath.Join(filepath.Dir(u.dir), "manifests")
	if err := os.Mkdir(manifests, 0o755); err != nil {
		t.Fatal(err)
	}
	text := `{apiVersion: v1, kind: Namespace, metadata: {name: shop}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, namespace: shop}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {terminationGracePeriodSeconds: 1, containers: [{name: web, image: "example.org/web:1", command: [/bin/probe, serve, ":8080", "from the cluster"]}]}
---
{apiVersion: v1, kind: Service, metadata: {name: web, namespace: shop}, spec: {type: NodePort, selector: {app: web}, ports: [{port: 80, targetPort: 8080, nodePort: 31000}]}}
`
	if err := os.WriteFile(filepath.Join(manifests, "web.yaml"), []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	u.port = l.Addr().(*net.TCPAddr).Port
	l.Close()
	// A context of somebody else's in the same file stays.
	other := "apiVersion: v1\nkind: Config\nclusters: [{name: theirs, cluster: {server: \"https://192.0.2.1\"}}]\ncontexts: [{name: theirs, context: {cluster: theirs, user: \"\"}}]\ncurrent-context: theirs\n"
	if err := os.WriteFile(u.kubeconfig, []byte(other), 0o600); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(filepath.Dir(u.dir), "up.yaml")
	if err := os.WriteFile(config, []byte(fmt.Sprintf("agents: 1\nimage: [%s]\nport: [\"%d:31000\"]\n", archive, u.port)), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := u.must(t, "up", "--name=one", "--config="+config, "--manifest="+manifests); out != "kubectl --context kedge-one get nodes\n" {
		t.Errorf("it printed %q", out)
	}
	u.made = u.ids()
	return u
}

// TestUp makes a cluster with everything that "kedge up" can be told, and one beside
// it; nodes are added, stopped, started and removed.
func TestUp(t *testing.T) {
	t.Parallel()
	u := newUpped(t)
	u.answers(t)
	u.besideAnother(t)
	u.nodesComeAndGo(t)
	u.loadsImages(t)
	u.down(t)
}

// answers asks the application at the published port, and looks at what kubectl knows.
func (u *upped) answers(t *testing.T) {
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", u.port))
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	if err != nil || !strings.Contains(string(body), "from the cluster") {
		t.Errorf("the published port answers %q, %v", body, err)
	}
	if out := u.must(t, "kubectl", "config", "get-contexts", "-o", "name"); out != "kedge-one\ntheirs\n" {
		t.Errorf("contexts: %q", out)
	}
	if n := u.ready(t, "kedge-one"); n != 2 {
		t.Errorf("%d nodes are Ready, want 2", n)
	}
}

// besideAnother makes the cluster "two", of both families of addresses.
func (u *upped) besideAnother(t *testing.T) {
	u.must(t, "up", "--name=two", "--dual-stack")
	u.made = append(u.made, u.ids()...)
	both := u.must(t, "kubectl", "--context=kedge-two", "get", "nodes", "-o", "jsonpath={.items[*].spec.podCIDRs} {.items[*].status.addresses[?(@.type=='InternalIP')].address}")
	for _, want := range []string{`"10.42.0.0/24"`, `"fd42::/64"`, " 10.89.", " fd6b:6564:6765:"} {
		if !strings.Contains(both, want) {
			t.Errorf("ranges and addresses of a dual-stack node: %s; want %s", both, want)
		}
	}
	if out := u.must(t, "ls"); strings.Count(out, "running") != 3 || !strings.Contains(out, "two") {
		t.Errorf("kedge ls:\n%s", out)
	}
	if u.ready(t, "kedge-two") != 1 || u.ready(t, "kedge-one") != 2 {
		t.Error("two clusters side by side are not both whole")
	}
	// Keys are of one cluster, although both come from one template.
	key := func(cluster string) string {
		return u.must(t, "node", "shell", "--name="+cluster, "server-1", "--", "cat", "/var/lib/kedge/server/tls/server-ca.crt")
	}
	if key("one") == key("two") {
		t.Error("two clusters have one authority")
	}
	u.refused(t, "cluster one exists already", "up", "--name=one")
}

// nodesComeAndGo adds, stops, starts and removes nodes, and runs commands on them.
func (u *upped) nodesComeAndGo(t *testing.T) {
	if out := u.must(t, "node", "add", "--name=one"); out != "agent-2\n" {
		t.Errorf("kedge node add printed %q", out)
	}
	u.must(t, "node", "stop", "--name=one", "agent-1")
	if out := u.must(t, "ls"); strings.Count(out, " off ") != 1 {
		t.Errorf("kedge ls after a stop:\n%s", out)
	}
	u.must(t, "node", "start", "--name=one", "agent-1")
	if n := u.ready(t, "kedge-one"); n != 3 {
		t.Errorf("%d nodes are Ready, want 3", n)
	}
	u.must(t, "node", "rm", "--name=one", "agent-2")
	if n := u.ready(t, "kedge-one"); n != 2 {
		t.Errorf("%d nodes are Ready, want 2", n)
	}
	if out := u.must(t, "node", "shell", "--name=one", "agent-1", "--", "hostname"); out != "agent-1\n" {
		t.Errorf("hostname on a node: %q", out)
	}
	if out, err := u.kedge("node", "shell", "--name=one", "agent-1", "--", "sh", "-c", "exit 3").CombinedOutput(); exitCode(err) != 3 {
		t.Errorf("the exit code of a command on a node: %v %s", err, out)
	}
	if out := u.must(t, "logs", "--name=one", "agent-1"); !strings.Contains(out, "kedge starts") {
		t.Errorf("kedge logs:\n%s", out)
	}
}

// loadsImages loads an image on all nodes, and names what there is not.
func (u *upped) loadsImages(t *testing.T) {
	second := filepath.Join(filepath.Dir(u.dir), "second.tar")
	u.img.Name = "example.org/web:2"
	image.Write(t, second, image.OCI, u.img)
	u.must(t, "images", "load", "--name=one", second)
	for _, node := range []string{"server-1", "agent-1"} {
		if out := u.must(t, "node", "shell", "--name=one", node, "--", "kedge", "images", "ls"); !strings.Contains(out, "example.org/web:2") {
			t.Errorf("images of %s:\n%s", node, out)
		}
	}
	u.refused(t, "has no node nobody", "node", "stop", "--name=one", "nobody")
	u.refused(t, "no such cluster", "down", "three")
}

// down ends both clusters, and nothing is left of them.
func (u *upped) down(t *testing.T) {
	u.must(t, "down", "one", "two")
	gone(t, u.made)
	if out := u.must(t, "kubectl", "config", "get-contexts", "-o", "name"); out != "theirs\n" {
		t.Errorf("contexts after kedge down: %q", out)
	}
	if out := u.must(t, "ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("kedge ls after kedge down:\n%s", out)
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// TestEphemeral: a cluster for one command, whose exit code is passed on; also when
// kedge or the command is killed, nothing is left.
func TestEphemeral(t *testing.T) {
	t.Parallel()
	c := newClusters(t)
	kubectl := harness.Binary() + " kubectl get nodes --no-headers"
	out, err := c.kedge("up", "--ephemeral", "--", "sh", "-c", kubectl+"; exit 7").Output()
	if exitCode(err) != 7 || strings.Count(string(out), " Ready ") != 1 {
		t.Errorf("%v, %s; want exit code 7 and one node", err, out)
	}
	if _, err := os.Stat(c.kubeconfig); err == nil {
		t.Error("an ephemeral cluster is in the user's kubeconfig")
	}
	if out := c.must(t, "ls"); strings.Count(out, "\n") != 1 {
		t.Errorf("kedge ls:\n%s", out)
	}
	out, err = c.kedge("up", "--ephemeral", "--", "sh", "-c", "kill -9 $$").CombinedOutput()
	if exitCode(err) != 137 {
		t.Errorf("of a command that was killed: %v, %s", err, out)
	}

	marker := filepath.Join(filepath.Dir(c.dir), "marker")
	cmd := c.kedge("up", "--ephemeral", "--", "sh", "-c", "touch "+marker+"; exec sleep 1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the command outlives kedge; it is ended with the group
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	harness.Eventually(t, time.Minute, func() error { _, err := os.Stat(marker); return err })
	ids := c.ids()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// The kernel ends the machines; the next call removes the rest.
	harness.Eventually(t, 20*time.Second, func() error {
		for _, id := range ids {
			procs, _ := filepath.Glob("/sys/fs/cgroup/*/kedge-machines-" + id + "/*/init/cgroup.procs")
			for _, p := range procs {
				if data, _ := os.ReadFile(p); len(data) > 0 {
					return fmt.Errorf("%s has processes %s", p, data)
				}
			}
		}
		return nil
	})
	c.must(t, "ls")
	gone(t, ids)
}

// TestUpIsKilled: what "kedge up" has made when it is killed, the next call removes;
// a cluster that is interrupted removes itself.
func TestUpIsKilled(t *testing.T) {
	t.Parallel()
	c := newClusters(t)
	c.must(t, "up", "--name=first") // and the template
	c.must(t, "down", "first")
	var ids []string
	begun := func() error {
		if len(c.ids()) == 0 {
			return errors.New("it has not made a site")
		}
		return nil
	}
	for i, after := range []time.Duration{20 * time.Millisecond, 150 * time.Millisecond, 600 * time.Millisecond, 0, time.Second} {
		for _, sig := range []os.Signal{syscall.SIGKILL, syscall.SIGTERM} {
			cmd := c.kedge("up", fmt.Sprint("--name=k", i))
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			if i >= 3 { // however slow the machine is
				harness.Eventually(t, 20*time.Second, begun)
			}
			time.Sleep(after)
			ids = append(ids, c.ids()...)
			_ = cmd.Process.Signal(sig)
			if err := cmd.Wait(); err == nil {
				t.Logf("it had ended before signal %d", i)
				c.must(t, "down", fmt.Sprint("k", i))
			}
			if out := c.must(t, "ls"); strings.Count(out, "\n") != 1 {
				t.Errorf("%s after %s: kedge ls:\n%s", sig, after, out)
			}
		}
	}
	gone(t, ids)
	c.must(t, "up", "--name=k0")
}

func TestUpRefuses(t *testing.T) {
	t.Parallel()
	c := newClusters(t)
	for sentence, args := range map[string][]string{
		"invalid cluster name":           {"--name=A_b"},
		"--servers must be 1, 3, 5":      {"--servers=2"},
		"image archive":                  {"--image=/nonexistent"},
		"manifest":                       {"--manifest=/nonexistent"},
		"is not [ADDRESS:]PORT:NODEPORT": {"--port=80"},
		"give the command to run":        {"--ephemeral"},
		"a command is for --ephemeral":   {"--", "true"},
		"unknown flag":                   {"--agent=1"},
		"--wait must be a positive":      {"--wait=0s"},
	} {
		c.refused(t, sentence, append([]string{"up"}, args...)...)
	}
	w := &harness.World{Without: []uintptr{21}} // CAP_SYS_ADMIN
	cmd := w.Command(append(os.Environ(), "KEDGE_CLUSTERS="+c.dir), "up")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "root lacks") || !strings.Contains(string(out), "CAP_SYS_ADMIN") {
		t.Errorf("without CAP_SYS_ADMIN: %v, %s", err, out)
	}
}
