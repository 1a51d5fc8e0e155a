package appliance

import (
	"bufio"
	"bytes"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	goruntime "runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"aead.dev/minisign"

	"kedge/appliance/release"
	"kedge/internal/namespaces"
	"kedge/internal/test/image"
	"kedge/scripts/e2e/harness"
)

// lifeOnDebian runs on a Debian with OpenRC: an installation from a release, an application, and the end. TRACE is a flag of the
// shell: with -x the commands of install.sh are the marks between the steps.
const lifeOnDebian = `#!/bin/bash
set -eu
exec 2>&1
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
export KEDGE_URL=https://example.com CURL_CA_BUNDLE=/kedge/ca.pem
cd /kedge
step() { echo "# $*"; eval "${*/ sh / sh $TRACE }"; }
step 'curl -sfL https://example.com/install.sh | sh -s - server --node-name=debian'
step 'kedge images import hello.tar'
step 'kedge kubectl apply -f hello.yaml'
step 'kedge kubectl rollout status deployment/hello'
step 'kedge kubectl wait service/hello --for=jsonpath={.status.loadBalancer.ingress}'
step 'curl -sf http://192.0.2.1:8088/'
step 'kedge uninstall --purge'
`

// lifeSteps are the steps of that, each with the line of output that begins it.
var lifeSteps = []struct {
	name string
	mark *regexp.Regexp
}{
	{"download: script, list, signature, executable", regexp.MustCompile(`^# curl .*install\.sh`)},
	{"verify: hash, signature, and the executable's own check", regexp.MustCompile(`^\+ check_hash kedge-linux`)},
	{"kedge install: check the machine and the settings", regexp.MustCompile(`^\+ .*/kedge-linux-\w+ install server`)},
	{"write the files", regexp.MustCompile(`^kedge: (create|copy) `)},
	{"start: until the node is Ready", regexp.MustCompile(`^kedge: start the service`)},
	{"import the image", regexp.MustCompile(`^# kedge images import`)},
	{"create the application, until its pods are Ready", regexp.MustCompile(`^# kedge kubectl apply`)},
	{"until its service has an address, and answers", regexp.MustCompile(`^# kedge kubectl wait`)},
	{"uninstall, with all data", regexp.MustCompile(`^# kedge uninstall`)},
}

// serveRelease serves a signed release with the executable under test as https://example.com in a network, and tells a Debian below
// root whom to trust.
func serveRelease(t *testing.T, network *namespaces.Network, root string) {
	t.Helper()
	program, err := os.ReadFile(harness.Binary())
	if err != nil {
		t.Fatal(err)
	}
	script, err := os.ReadFile(harness.InProject("scripts/install.sh"))
	if err != nil {
		t.Fatal(err)
	}
	public, secret, err := minisign.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	const version = "v1.2.3"
	files := map[string][]byte{
		"/channels/stable": []byte(version + "\n"),
		"/install.sh":      bytes.Replace(script, []byte("\nkey=''\n"), []byte("\nkey='"+public.String()+"'\n"), 1),
	}
	var list release.List
	for name, content := range map[string][]byte{release.Executable(goruntime.GOARCH): program, release.VersionName: []byte(version + "\n")} {
		if err := list.Add(name, bytes.NewReader(content)); err != nil {
			t.Fatal(err)
		}
		files["/"+version+"/"+name] = content
	}
	r := minisign.NewReader(bytes.NewReader(list.Text()))
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	files["/"+version+"/"+release.ListName] = list.Text()
	files["/"+version+"/"+release.SignatureName] = r.SignWithComments(secret, "kedge "+version, "signature of the files of kedge "+version)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		content, found := files[r.URL.Path]
		if !found {
			http.NotFound(w, r)
			return
		}
		_, _ = w.Write(content)
	}))
	server.Listener.Close()
	err = network.Do(func() (err error) {
		server.Listener, err = net.Listen("tcp", "127.0.0.1:443")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	server.StartTLS()
	t.Cleanup(server.Close)
	for path, text := range map[string][]byte{
		"etc/kedge/trusted.keys": []byte(public.String() + "\n"),
		"etc/hosts":              []byte("127.0.0.1 localhost example.com\n"),
		"kedge/ca.pem":           pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}),
	} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, path), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// putApplication puts the application of make run, and its image, into a folder.
func putApplication(t *testing.T, dir string) {
	t.Helper()
	probe, err := harness.BuiltProgram("probe")
	if err != nil {
		t.Fatal(err)
	}
	image.Write(t, filepath.Join(dir, "hello.tar"), image.Docker, image.Image{
		Name: "kedge.local/hello:1", Files: map[string]image.File{"/hello": probe}, Entrypoint: []string{"/hello"}, Cmd: []string{"serve", ":8080", "Hello from kedge!"},
	})
	manifest, err := os.ReadFile(harness.InProject("scripts/demo/hello.yaml"))
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "hello.yaml"), manifest, 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// TestInstallFigures measures the steps from a Debian on which kedge never was to an application that answers.
func TestInstallFigures(t *testing.T) {
	harness.OnlyMeasures(t, "make bench-appliance")
	script := harness.InProject("scripts/openrc-machine.sh")
	out, err := exec.Command(script, "root", "curl,ca-certificates").Output()
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	root := lines[len(lines)-1]
	if err != nil || !filepath.IsAbs(root) {
		t.Fatalf("%s: %v\n%s", script, err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.Command("rm", "-rf", "--one-file-system", root).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	network := harness.NewNetwork(t, "192.0.2.1/24")
	t.Cleanup(func() { network.Close() })
	putApplication(t, filepath.Join(root, "kedge"))
	if err := os.WriteFile(filepath.Join(root, "kedge", "run"), []byte(lifeOnDebian), 0o755); err != nil {
		t.Fatal(err)
	}
	times := make([][]time.Duration, len(lifeSteps))
	var whole []time.Duration
	if !t.Run("life", func(t *testing.T) {
		serveRelease(t, network, root)
		_, text := liveOnDebian(t, script, network, "")
		t.Logf("it prints\n%s", text)
	}) {
		return
	}
	for range 3 {
		if !t.Run("life", func(t *testing.T) {
			serveRelease(t, network, root)
			steps, text := liveOnDebian(t, script, network, "-x")
			if slices.Contains(steps, 0) {
				t.Fatalf("it prints\n%s", text)
			}
			for i, d := range steps {
				times[i] = append(times[i], d)
			}
			var sum time.Duration
			for _, d := range steps[:len(steps)-1] {
				sum += d
			}
			whole = append(whole, sum)
		}) {
			return
		}
	}
	for i, s := range lifeSteps {
		t.Logf("%s: %s", s.name, harness.Figures(times[i]))
	}
	t.Logf("from the command to an answer of the application: %s", harness.Figures(whole))
}

// liveOnDebian runs the life, and returns the time of each of its steps and what it prints.
func liveOnDebian(t *testing.T, script string, network *namespaces.Network, trace string) ([]time.Duration, string) {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--pid", "--fork", "--uts", "--kill-child", script, "inside")
	cmd.Env = append(os.Environ(), "TRACE="+trace)
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = cmd.Stdout
	if err := network.Do(cmd.Start); err != nil {
		t.Fatal(err)
	}
	steps := make([]time.Duration, len(lifeSteps))
	var text strings.Builder
	at, begin := -1, time.Now()
	for lines := bufio.NewScanner(stdout); lines.Scan(); {
		line := lines.Text()
		if at+1 < len(lifeSteps) && lifeSteps[at+1].mark.MatchString(line) {
			if at >= 0 {
				steps[at] = time.Since(begin)
			}
			at, begin = at+1, time.Now()
		}
		fmt.Fprintln(&text, line)
	}
	err = cmd.Wait()
	if at >= 0 {
		steps[at] = time.Since(begin)
	}
	if err != nil {
		t.Fatalf("%v; the last step was %d\n%s", err, at, &text)
	}
	return steps, text.String()
}
