package appliance

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

	"aead.dev/minisign"

	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// bundled is a machine without a network, and without a service manager, on which bundles are installed.
type bundled struct {
	*harness.Node
	bin, config string
}

func newBundled(t *testing.T) *bundled {
	t.Helper()
	for _, dir := range []string{"/run/systemd/system", "/sbin/openrc-run"} {
		if _, err := os.Stat(dir); err == nil {
			harness.SkipLacking(t, "this machine has a service manager: %s", dir)
		}
	}
	n := harness.Own(t)
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n.Network = harness.NewNetwork(t, "192.0.2.1/24")
	n.World = &harness.World{Changes: filepath.Join(n.Dir, "changes"), Keep: n.Dir}
	t.Cleanup(func() { n.World, n.Env = nil, harness.BareEnv() })
	return &bundled{n, filepath.Join(n.Dir, "bin"), filepath.Join(n.Dir, "config.yaml")}
}

// file writes a file of the test and returns its path.
func (b *bundled) file(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(b.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a program, that of a bundle say, in place of kedge, and returns what it prints.
func (b *bundled) run(t *testing.T, program string, want int, args ...string) string {
	t.Helper()
	b.Env = append(harness.BareEnv(), "KEDGE_BIN="+program)
	out, err := b.RunKedge(args...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code, err = exit.ExitCode(), nil
	}
	if err != nil || code != want {
		t.Fatalf("%s %s: exit code %d in place of %d, %v\n%s", filepath.Base(program), strings.Join(args, " "), code, want, err, out)
	}
	return out
}

func (b *bundled) install(flags ...string) []string {
	return append(append([]string{"install", "server", "--bin-dir=" + b.bin}, b.Args()...), flags...)
}

// outside makes kedge see the machine as it is, until the returned function is called.
func (b *bundled) outside() (back func()) {
	world := b.World
	b.World = &harness.World{Cgroups: world.Cgroups}
	return func() { b.World = world }
}

// start starts the installed kedge. It sees the machine as it is: in a mount namespace of its own the network namespaces of
// the pods of an earlier start would be missing.
func (b *bundled) start(t *testing.T) {
	t.Helper()
	b.Env = append(harness.BareEnv(), "KEDGE_BIN="+b.bin+"/kedge")
	defer b.outside()()
	if err := b.Launch(); err != nil {
		t.Fatal(err)
	}
	if err := b.WaitReady(time.Minute); err != nil {
		t.Fatalf("%v\n%s", err, b.Tail(20))
	}
}

// application is a pod that answers with a text over HTTP, and an object in a namespace that is created only after it.
func application(text string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: ConfigMap
metadata: {name: early, namespace: late}
data: {k: v}
---
apiVersion: v1
kind: Namespace
metadata: {name: late}
---
apiVersion: v1
kind: Pod
metadata: {name: app, namespace: default}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: main, image: %q, command: [sh, -c, "mkdir /www; echo %s > /www/index.html; httpd -f -p 80 -h /www"]}
`, harness.Busybox, text)
}

// answer is what the application answers.
func (b *bundled) answer(t *testing.T) string {
	t.Helper()
	pod := b.WaitPod(t, "default", "app", false)
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		Dial:              func(network, address string) (net.Conn, error) { return b.Dial(network, address) },
	}, Timeout: harness.Patient(10 * time.Second)}
	var text []byte
	harness.Eventually(t, 20*time.Second, func() error {
		resp, err := client.Get("http://" + pod.Status.PodIP + "/")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		text, err = io.ReadAll(resp.Body)
		return err
	})
	return strings.TrimSpace(string(text))
}

// TestBundle: a bundle with an application is installed on a machine without a network, and the application answers; what is
// not to be trusted, damaged or for another machine is refused and changes nothing; a newer bundle brings an image, by its
// difference only, without a restart of a container.
func TestBundle(t *testing.T) {
	b := newBundled(t)
	if err := harness.PrepareImages(filepath.Join(b.Dir, "from")); err != nil {
		t.Fatal(err)
	}
	b.file(t, "app.yaml", application("first"))
	b.file(t, "bundle.yaml", "images: [./from/images/images.tar]\nmanifests: [app.yaml]\nconfig:\n  node-label: [made-by=bundle, of=bundle]\n  write-kubeconfig-mode: \"640\"\n")
	first, newer, delta := filepath.Join(b.Dir, "first"), filepath.Join(b.Dir, "newer"), filepath.Join(b.Dir, "delta")
	if out := b.run(t, harness.Binary(), 0, "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", first); !strings.Contains(out, "with 2 images, 1 manifest and 0 charts") || strings.Contains(out, "warning") {
		t.Errorf("it prints\n%s", out)
	}
	b.refusals(t, first)

	out := b.run(t, first, 0, b.install("--write-kubeconfig-mode=600")...)
	for _, text := range []string{"used without a check of its origin: it is not signed", "start at boot, as root:\n"} {
		if !strings.Contains(out, text) {
			t.Errorf("it prints\n%s", out)
		}
	}
	if out := b.run(t, first, 0, b.install("--write-kubeconfig-mode=600", "--dry-run")...); !strings.Contains(out, "nothing to change") {
		t.Errorf("a second time it prints\n%s", out)
	}
	// Only the executable is in the folder of programs.
	small, err := os.Stat(b.bin + "/kedge")
	if whole, err2 := os.Stat(harness.Binary()); err != nil || err2 != nil || small.Size() != whole.Size() {
		t.Errorf("the installed program: %v, %v, %v", small, err, err2)
	}
	b.start(t)
	if text := b.answer(t); text != "first" {
		t.Errorf("the application answers %q", text)
	}
	// What the user has given takes precedence over the bundle's settings.
	if out := b.Kubectl(t, "get", "node", b.Name, "-o", "jsonpath={.metadata.labels.made-by}"); out != "bundle" {
		t.Errorf("label %q", out)
	}
	if st, err := os.Stat(b.Kubeconfig); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("kubeconfig %v, %v", st, err)
	}
	if out := b.Kubectl(t, "get", "configmap", "-n", "late", "early", "-o", "jsonpath={.data.k}"); out != "v" {
		t.Errorf("the object in a namespace that came later: %q", out)
	}
	if out := b.run(t, b.bin+"/kedge", 0, "images", "ls", "--run-dir="+b.RunDir()); !strings.Contains(pinnedLine(out, harness.Busybox), "pinned") {
		t.Errorf("the image is not pinned:\n%s", out)
	}
	b.newer(t, first, newer, delta)

	// The node that runs is a source of images too.
	b.file(t, "bundle.yaml", "images: [{node: example.org/small:1}]\n")
	again := filepath.Join(b.Dir, "again")
	if out := b.run(t, harness.Binary(), 0, "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", again, "--run-dir="+b.RunDir()); !strings.Contains(out, "added image example.org/small:1") {
		t.Errorf("it prints\n%s", out)
	}
	if out := b.run(t, harness.Binary(), 0, "bundle", "verify", again); !strings.Contains(out, "every byte is as it was written") {
		t.Errorf("it prints\n%s", out)
	}

	if err := b.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	back := b.outside()
	b.run(t, b.bin+"/kedge", 0, append([]string{"killall"}, b.Args()...)...)
	back()
	b.run(t, b.bin+"/kedge", 0, "uninstall", "--purge", "--config="+b.config)
	if _, err := os.Stat(b.DataDir()); err == nil {
		t.Error("the data directory is left")
	}
}

// refusals tries bundles that must not be installed. Nothing of the machine may change.
func (b *bundled) refusals(t *testing.T, good string) {
	t.Helper()
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what, file string, want int, text string) {
		t.Helper()
		if out := b.run(t, file, want, b.install()...); !strings.Contains(out, text) {
			t.Errorf("%s: it prints\n%s", what, out)
		}
		for _, path := range []string{b.DataDir(), b.bin, b.config} {
			if _, err := os.Lstat(path); err == nil {
				t.Errorf("%s: %s was written", what, path)
			}
		}
	}
	// A bit of a layer.
	i := bytes.Index(data, []byte("root:x:0:0:root:/root:/bin/sh\n"))
	if i < 0 {
		t.Fatal("no layer in the bundle")
	}
	data[i] ^= 1
	bad := b.file(t, "bad", string(data))
	refused("a flipped bit", bad, 1, "is damaged: the part sha256:")
	data[i] ^= 1
	bad = b.file(t, "bad", string(data[:len(data)-1000]))
	refused("a bundle that is cut off", bad, 1, "its end is missing")

	// A machine that was told whom to trust.
	trusted := filepath.Join(b.World.Changes, "upper/etc/kedge")
	if err := os.MkdirAll(trusted, 0o755); err != nil {
		t.Fatal(err)
	}
	public, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(trusted+"/trusted.keys", []byte(public.String()+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	refused("an unsigned bundle", good, 78, "it is not signed; sign it with a key of /etc/kedge/trusted.keys")
	_, stranger, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	signed := filepath.Join(b.Dir, "signed")
	sign := func(key minisign.PrivateKey) {
		t.Helper()
		text, err := key.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		b.run(t, harness.Binary(), 0, "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", signed, "--sign-key="+b.file(t, "key", string(text)))
	}
	sign(stranger)
	refused("a bundle that somebody else has signed", signed, 78, "which is unknown")
	sign(secret)
	if out := b.run(t, signed, 0, b.install("--dry-run")...); strings.Contains(out, "origin") {
		t.Errorf("a signed bundle: it prints\n%s", out)
	}
	if out := b.run(t, harness.Binary(), 0, "bundle", "verify", signed); !strings.Contains(out, "is right, and every byte") {
		t.Errorf("verify prints\n%s", out)
	}
	if err := os.RemoveAll(trusted); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(bad); err != nil {
		t.Fatal(err)
	}
}

// newer installs the difference to a newer bundle with another image and another manifest.
func (b *bundled) newer(t *testing.T, first, newer, delta string) {
	t.Helper()
	image.Write(t, filepath.Join(b.Dir, "from/small.tar.gz"), image.OCI,
		image.Image{Name: "example.org/small:1", Files: map[string]image.File{"/content": {Data: []byte("small")}}})
	b.file(t, "more.yaml", "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: more}\n")
	b.file(t, "bundle.yaml", "images: [./from/images/images.tar, ./from/small.tar.gz]\nmanifests: [app.yaml, more.yaml]\n")
	b.run(t, harness.Binary(), 0, "bundle", "create", "-f", b.Dir+"/bundle.yaml", "-o", newer)
	b.run(t, harness.Binary(), 0, "bundle", "diff", first, newer, "-o", delta)
	if st, err := os.Stat(delta); err != nil || st.Size() > 1<<20 {
		t.Errorf("the difference: %v, %v", st, err)
	}
	before := b.WaitPod(t, "default", "app", false).Status.ContainerStatuses[0].ContainerID

	// Without the bundle before it, it is refused.
	empty := filepath.Join(b.Dir, "empty")
	out := b.run(t, b.bin+"/kedge", 1, "install", "server", "--bundle="+delta, "--config="+b.Dir+"/empty.yaml", "--data-dir="+empty, "--bin-dir="+b.bin, "--dry-run=false", "--force")
	if !strings.Contains(out, "has only what is new, and this machine lacks") {
		t.Errorf("on another machine it prints\n%s", out)
	}
	if _, err := os.Lstat(empty); err == nil {
		t.Error("the refused difference has left something")
	}
	b.run(t, b.bin+"/kedge", 0, "install", "server", "--bundle="+delta, "--bin-dir="+b.bin, "--config="+b.config)
	b.Stop(t, syscall.SIGTERM, 20*time.Second)
	b.start(t)
	harness.Eventually(t, 30*time.Second, func() error {
		if out, err := b.Run("images", "ls", "--run-dir="+b.RunDir()); err != nil || !strings.Contains(pinnedLine(out, "example.org/small:1"), "pinned") {
			return fmt.Errorf("%w\n%s", err, out)
		}
		return nil
	})
	b.Kubectl(t, "get", "configmap", "more")
	if after := b.WaitPod(t, "default", "app", false).Status.ContainerStatuses[0].ContainerID; after != before {
		t.Errorf("container %s has become %s", before, after)
	}
	if text := b.answer(t); text != "first" {
		t.Errorf("the application answers %q", text)
	}
}

// pinnedLine returns the line of an image in what "kedge images ls" prints.
func pinnedLine(list, name string) string {
	for line := range strings.Lines(list) {
		if strings.HasPrefix(line, name+" ") {
			return line
		}
	}
	return ""
}

// TestBundleUpgrades: a bundle with another version of kedge upgrades the node on the way that goes back by itself, and a
// damaged one upgrades nothing.
func TestBundleUpgrades(t *testing.T) {
	s := newUpgradeSite(t)
	dir := t.TempDir()
	program, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	image.Write(t, filepath.Join(dir, "small.tar.gz"), image.OCI,
		image.Image{Name: "example.org/small:1", Files: map[string]image.File{"/content": {Data: []byte("small")}}})
	for name, data := range map[string][]byte{
		"newer":       otherVersion(program, "bundled"),
		"bundle.yaml": []byte("images: [./small.tar.gz]\nmanifests: [more.yaml]\nconfig: {node-label: [of=bundle]}\n"),
		"more.yaml":   []byte("apiVersion: v1\nkind: ConfigMap\nmetadata: {name: of-bundle, namespace: default}\n"),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.Command(harness.Binary(), "bundle", "create", "-f", dir+"/bundle.yaml", "--executable", dir+"/newer", "-o", dir+"/site.run")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("create: %v\n%s", err, out)
	}
	whole, err := os.ReadFile(dir + "/site.run")
	if err != nil {
		t.Fatal(err)
	}
	site := s.place("site.run", whole)
	if out, err := s.RunKedge("upgrade", "--file="+site); err == nil || !strings.Contains(out, "is a bundle; install it with") {
		t.Errorf("upgrade: %v\n%s", err, out)
	}
	i := bytes.LastIndex(whole, []byte("name: of-bundle"))
	whole[i] ^= 1
	out, err := s.Machine.Output(t.Context(), s.place("bad.run", whole), "install", "server", "--observe=2s")
	if st := s.status(); err == nil || st.Trial != nil || len(st.History) > 0 {
		t.Errorf("a damaged bundle: %v, %+v\n%s", err, st, out)
	}
	out, err = s.Machine.Output(t.Context(), site, "install", "server", "--observe=2s")
	if err != nil || !strings.Contains(out, "The new version is ready.") {
		t.Fatalf("install: %v\n%s", err, out)
	}
	s.stop()
	if o := s.supervise(nil); o.Result != "upgraded" || !s.isAt(installedProgram, dir+"/newer") {
		t.Errorf("install: %+v", o)
	}
	s.write("after")
	s.healthy("after")
	harness.Eventually(t, 30*time.Second, func() error {
		out, err := s.RunKedge("images", "ls")
		if err == nil && !strings.Contains(pinnedLine(out, "example.org/small:1"), "pinned") {
			err = fmt.Errorf("the image is not there:\n%s", out)
		}
		return err
	})
	s.Kubectl(t, "get", "configmap", "-n", "default", "of-bundle")
	if config, err := os.ReadFile(s.Machine.Disk("/etc/kedge/config.yaml")); err != nil || !strings.Contains(string(config), "node-label:\n  - of=bundle\n") {
		t.Errorf("the configuration is %v\n%s", err, config)
	}
}
