package throwaway

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kedge/throwaway/kubeconfig"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/clientcmd/api"
)

func valid() Config {
	return Config{Name: "kedge", Servers: 1, Wait: time.Minute}
}

func TestValidate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "a.tar")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := valid().Validate(); err != nil {
		t.Error(err)
	}
	for want, change := range map[string]func(*Config){
		"invalid cluster name":              func(c *Config) { c.Name = "templates" },
		"--servers must be 1, 3, 5, 7 or 9": func(c *Config) { c.Servers = 4 },
		"agents":                            func(c *Config) { c.Agents = -1 },
		"called a.tar":                      func(c *Config) { c.Images = []string{file, filepath.Join(filepath.Dir(file), ".", "a.tar")} },
		"not a file":                        func(c *Config) { c.Images = []string{filepath.Dir(file)} },
		"manifest":                          func(c *Config) { c.Manifests = []string{"/nonexistent"} },
		"wait":                              func(c *Config) { c.Wait = 0 },
	} {
		c := valid()
		change(&c)
		if err := c.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

func TestSubnets(t *testing.T) {
	v4, v6 := subnetOf(7)
	if got := addressOf(v4, 9).String(); got != "10.89.7.9/24" {
		t.Error(got)
	}
	if got := addressOf(v6, 9); got.Bits() != 64 || !v6.Contains(got.Addr()) || !got.Addr().IsPrivate() {
		t.Error(got)
	}
}

// TestKubeconfig: a context is added and removed again, and others stay as they are.
func TestKubeconfig(t *testing.T) {
	root := Root(t.TempDir())
	c := &Cluster{root: root, record: record{Name: "one"}}
	if err := os.Mkdir(c.dir(), 0o755); err != nil {
		t.Fatal(err)
	}
	own := api.NewConfig()
	own.Clusters[c.Context()] = &api.Cluster{Server: "https://192.0.2.1:6443"}
	own.AuthInfos[c.Context()] = &api.AuthInfo{Token: "x"}
	own.Contexts[c.Context()] = &api.Context{Cluster: c.Context(), AuthInfo: c.Context()}
	own.CurrentContext = c.Context()
	if err := clientcmd.WriteToFile(*own, c.Kubeconfig()); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "new", "config")
	theirs := api.NewConfig()
	theirs.Clusters["theirs"] = &api.Cluster{Server: "https://192.0.2.9"}
	theirs.Contexts["theirs"] = &api.Context{Cluster: "theirs"}
	theirs.CurrentContext = "theirs"
	for _, before := range []*api.Config{nil, theirs} {
		if before != nil {
			if err := clientcmd.WriteToFile(*before, file); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.addContext(file); err != nil {
			t.Fatal(err)
		}
		got, err := clientcmd.LoadFromFile(file)
		if err != nil || got.CurrentContext != "kedge-one" || got.Clusters["kedge-one"].Server != "https://192.0.2.1:6443" {
			t.Fatalf("%+v, %v", got, err)
		}
		if st, err := os.Stat(file); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("mode of a file with a secret: %v, %v", st.Mode(), err)
		}
		for range 2 { // the second time there is nothing to remove
			if err := kubeconfig.Drop(file, "kedge-one"); err != nil {
				t.Fatal(err)
			}
		}
		if got, err = clientcmd.LoadFromFile(file); err != nil || len(got.Contexts)+len(got.Clusters)+len(got.AuthInfos) > 0 && before == nil || before != nil && got.Clusters["theirs"] == nil || got.CurrentContext != "" {
			t.Errorf("afterwards: %+v, %v", got, err)
		}
	}
	if err := os.WriteFile(file, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := c.addContext(file); err == nil {
		t.Error("a file that cannot be read was written over")
	}
}

func TestManifests(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"a.yaml": "# a comment\n---\n{apiVersion: v1, kind: Namespace, metadata: {name: a}}\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: ConfigMap, metadata: {name: b}}\n",
		"c.json": `{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "c", "generation": 3}}`,
		"d.txt":  "no manifest",
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	all, err := readManifests([]string{dir})
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range all {
		names = append(names, nameOf(m.object))
	}
	if got := strings.Join(names, " "); got != "namespace/a configmap/b secret/c" {
		t.Error(got)
	}
	for _, bad := range []string{"kind: X", "a: [", "- x"} {
		if _, err := parse([]byte(bad)); err == nil {
			t.Errorf("%q is accepted", bad)
		}
	}
}

func TestWhatIsAvailable(t *testing.T) {
	for text, want := range map[string]string{
		`{kind: ConfigMap}`: "",
		`{kind: Deployment, metadata: {generation: 2}, spec: {replicas: 2}, status: {observedGeneration: 1}}`:                                           "its controller has not observed it yet",
		`{kind: Deployment, metadata: {generation: 1}, spec: {replicas: 2}, status: {observedGeneration: 1, availableReplicas: 2, updatedReplicas: 1}}`: "1 of 2 pods are available",
		`{kind: Deployment, metadata: {generation: 1}, spec: {replicas: 2}, status: {observedGeneration: 1, availableReplicas: 2, updatedReplicas: 2}}`: "",
		`{kind: DaemonSet, metadata: {generation: 1}, status: {observedGeneration: 1, desiredNumberScheduled: 3, numberAvailable: 1}}`:                  "1 of 3 pods are available",
		`{kind: Pod, status: {phase: Succeeded}}`:                                                                                 "",
		`{kind: Pod, status: {phase: Pending}}`:                                                                                   "no condition Ready",
		`{kind: Job, status: {conditions: [{type: Complete, status: "True"}]}}`:                                                   "",
		`{kind: APIService, status: {conditions: [{type: Available, status: "False", reason: MissingEndpoints, message: none}]}}`: "Available: MissingEndpoints none",
	} {
		objects, err := parse([]byte(strings.Replace(text, "{", "{apiVersion: v1, ", 1)))
		if err != nil || len(objects) != 1 {
			t.Fatalf("%s: %v", text, err)
		}
		if got := lacks(objects[0]); got != want {
			t.Errorf("%s: %q, want %q", text, got, want)
		}
	}
}

// TestClone: what never changes is shared, everything else is a copy.
func TestClone(t *testing.T) {
	template, data := filepath.Join(t.TempDir(), "template"), filepath.Join(t.TempDir(), "data")
	shared := []string{"program/1/kedge", "runtime/1/runc", "containerd/io.containerd.content.v1.content/blobs/sha256/abc", "containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/bin/sh"}
	copied := []string{"containerd/imported.json", "containerd/io.containerd.metadata.v1.bolt/meta.db", "containerd/io.containerd.snapshotter.v1.overlayfs/metadata.db"}
	for _, name := range append(append([]string{}, shared...), copied...) {
		path := filepath.Join(template, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o640)); err != nil {
			t.Fatal(err)
		}
	}
	layer := filepath.Join(template, "containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs")
	if err := errors.Join(os.Symlink("sh", filepath.Join(layer, "bin/ash")), os.Mkdir(filepath.Join(layer, "tmp"), 0o755), syscall.Chmod(filepath.Join(layer, "tmp"), 0o1777)); err != nil {
		t.Fatal(err)
	}
	if err := clone(template, data); err != nil {
		t.Fatal(err)
	}
	same := func(name string) bool {
		a, err := os.Stat(filepath.Join(template, name))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.Stat(filepath.Join(data, name))
		if err != nil {
			t.Fatal(err)
		}
		if a.Mode() != b.Mode() || !a.IsDir() && !a.ModTime().Equal(b.ModTime()) {
			t.Errorf("%s: mode %v and time %v, of the copy %v and %v", name, a.Mode(), a.ModTime(), b.Mode(), b.ModTime())
		}
		return os.SameFile(a, b)
	}
	for _, name := range shared {
		if !same(name) {
			t.Errorf("%s is copied", name)
		}
	}
	for _, name := range copied {
		if same(name) {
			t.Errorf("%s is shared: one cluster would write into another", name)
		}
	}
	same("containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/tmp")
	if to, err := os.Readlink(filepath.Join(data, "containerd/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs/bin/ash")); err != nil || to != "sh" {
		t.Errorf("a link: %q, %v", to, err)
	}
}

// TestSweep: what has no complete record goes, unless the lock is taken.
func TestSweep(t *testing.T) {
	root := Root(filepath.Join(t.TempDir(), "clusters"))
	if err := root.Sweep(); err != nil {
		t.Errorf("no folder: %v", err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := errors.Join(os.MkdirAll(root.dir(name), 0o755), os.WriteFile(filepath.Join(root.dir(name), recordName), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	write("whole", `{"complete": true}`)
	write("half", `{}`)
	write("busy", `{}`)
	if err := os.MkdirAll(root.dir("begun"), 0o755); err != nil {
		t.Fatal(err)
	}
	release, err := root.lock(clusterLock("busy"))
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	never, err := root.lock(clusterLock("never"))
	if err != nil {
		t.Fatal(err)
	}
	never() // its holder was killed before it made anything
	if err := root.Sweep(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(root.dir(clusterLock("never"))); err == nil {
		t.Error("a lock of nothing is left")
	}
	for name, want := range map[string]bool{"whole": true, "half": false, "busy": true, "begun": false} {
		if _, err := os.Stat(root.dir(name)); err == nil != want {
			t.Errorf("%s: %v", name, err)
		}
	}
	list, err := root.List()
	if err != nil || len(list) != 1 || list[0].Name() != "whole" {
		t.Errorf("%v, %v", list, err)
	}
	if err := root.Remove("nothing"); !errors.Is(err, ErrUnknown) {
		t.Error(err)
	}
}
