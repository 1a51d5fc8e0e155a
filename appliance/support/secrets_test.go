package support

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/appliance/doctor"
	"kedge/internal/control"
	"kedge/internal/lifecycle"
	"kedge/internal/test/host"
)

// marker is a part of each secret of the test.
const marker = "MARK3R"

// secret returns a secret that no other place of the test has.
func secret(place string) string { return "zq" + marker + "-" + place + "-x9" }

// unpack returns the files of a bundle by their path below its folder.
func unpack(t *testing.T, bundle []byte) map[string]string {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(bundle))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	files := map[string]string{}
	for archive := tar.NewReader(z); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		if binary(data) {
			if plain, err := gzip.NewReader(bytes.NewReader(data)); err == nil {
				more, _ := io.ReadAll(plain)
				data = append(data, more...)
			}
		}
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(data)
	}
}

// plant writes files below dir.
func plant(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// object is an object of every kind, with a secret in every place that may have one.
func object() string {
	env := `[{"name":"PASSWORD","value":"` + secret("env") + `"}]`
	container := `[{"name":"main","image":"busybox","command":["` + secret("command") + `"],"args":["--x=` + secret("args") + `"],"env":` + env + `,"livenessProbe":{"httpGet":{"httpHeaders":[{"name":"A","value":"` + secret("probe") + `"}]}}}]`
	spec := `{"nodeName":"edge","containers":` + container + `,"initContainers":` + container + `,"volumes":[{"name":"v","csi":{"volumeAttributes":{"key":"` + secret("volume") + `"}}}],
		"template":{"metadata":{"annotations":{"a":"` + secret("template") + `"}},"spec":{"containers":` + container + `}},"csi":{"driver":"d","volumeHandle":"` + secret("handle") + `"},"providerID":"` + secret("provider") + `",
		"caBundle":"` + secret("bundle") + `","rules":[{"host":"h","http":{"paths":[{"path":"` + secret("path") + `"}]}}]}`
	status := `{"phase":"Running","conditions":[{"type":"Ready","status":"True","message":"all is well"}],
		"containerStatuses":[{"name":"main","image":"busybox","ready":true,"restartCount":3,"state":{"waiting":{"reason":"CrashLoopBackOff"}},"lastState":{"terminated":{"exitCode":1,"reason":"Error","message":"` + secret("termination") + `"}}}],
		"custom":"` + secret("status") + `"}`
	return `{"kind":"Any","apiVersion":"v1","metadata":{"name":"thing","namespace":"shop","labels":{"app":"web"},"annotations":{"kubectl.kubernetes.io/last-applied-configuration":"` + secret("applied") + `"},
		"managedFields":[{"manager":"` + secret("managed") + `"}]},"spec":` + spec + `,"status":` + status + `,"type":"Opaque","data":{"key":"` + secret("data") + `"},"stringData":{"key":"` + secret("string") + `"},
		"binaryData":{"key":"` + base64.StdEncoding.EncodeToString([]byte(secret("binary"))) + `"},"secrets":[{"name":"` + secret("reference") + `"}],"parameters":{"key":"` + secret("parameter") + `"},
		"webhooks":[{"name":"hook","clientConfig":{"url":"https://` + secret("hook") + `/","caBundle":"` + secret("hookca") + `"}}],"reason":"Pulled","message":"pulled the image"}`
}

// nodeWithSecrets is a node that has a secret in every place.
func nodeWithSecrets(t *testing.T) Config {
	dir := t.TempDir()
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"kind":"List","apiVersion":"v1","metadata":{},"items":[%s]}`, object())
	}))
	t.Cleanup(api.Close)
	key := "-----BEGIN EC PRIVATE KEY-----\n" + base64.StdEncoding.EncodeToString([]byte(secret("key")+strings.Repeat("k", 30))) + "\n-----END EC PRIVATE KEY-----\n"
	keyLine := strings.Split(key, "\n")[1]
	token := "K1" + strings.Repeat("ab", 32) + "::0123456789." + secret("join")
	plant(t, dir, map[string]string{
		"data/kedge.json": `{"format":1,"nodeName":"edge"}`, "data/server/token": secret("derived"), "data/server/server-token": secret("server-derived"),
		"data/server/encryption-config.yaml": "kind: EncryptionConfiguration\nresources: [{providers: [{secretbox: {keys: [{name: a,\n secret: " + secret("rest") + "\n}]}}]}]\n",
		"data/server/tls/ca.key":             key, "data/agent/client.key": key, "data/agent/kubeconfig": "token: " + secret("agent"), "run/wireguard.key": secret("wireguard"),
		"kubeconfig": "apiVersion: v1\nkind: Config\ncurrent-context: c\ncontexts: [{name: c, context: {cluster: c, user: u}}]\nclusters: [{name: c, cluster: {server: \"" + api.URL + "\"}}]\nusers:\n- name: u\n  user:\n    token: " + secret("kubeconfig") + "\n",
		"kedge.log": "a line of the log\nthe token is " + secret("token") + " and " + token + "\n" + key + "Authorization: Bearer " + secret("bearer") + "\npull https://user:" + secret("registry") + "@registry.example/v2\npassword=" + secret("password") +
			"\nderived " + secret("derived") + " key " + keyLine + " rest " + secret("rest") + " kubeconfig " + secret("kubeconfig") + "\n{\"client_secret\": \"" + secret("json") + "\"}\nthe last line\n",
	})
	for _, name := range []string{"KEDGE_TOKEN", "HTTPS_PROXY", "AWS_SECRET_ACCESS_KEY"} {
		t.Setenv(name, secret(name))
	}
	serve(t, filepath.Join(dir, "run"), secret("token"))
	return Config{
		Node: "edge", Version: "kedge v1\n", DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "run"), Kubeconfig: filepath.Join(dir, "kubeconfig"),
		LogFiles: []string{filepath.Join(dir, "kedge.log"), filepath.Join(dir, "none.log")}, CgroupRoots: []string{"/"},
		Settings: []Setting{
			{"node-name", []string{"edge"}, "command line"}, {"token", []string{secret("token")}, "KEDGE_TOKEN"}, {"server-token", []string{secret("server")}, "/etc/kedge/config.yaml:3"},
			{"kube-apiserver-arg", []string{"oidc-client-secret=" + secret("oidc"), "v=3"}, "command line"}, {"of-a-later-version", []string{secret("later")}, "command line"}, {"log-level", []string{"info"}, "default"},
		},
		Secrets: []string{secret("given"), ""},
		Doctor: func(context.Context) doctor.Report {
			return doctor.Report{Kedge: doctor.Running, Findings: []doctor.Finding{{Level: doctor.Problem, Subject: "settings", What: "bad " + secret("given"), Remedy: "mend"}}}
		},
	}
}

// serve answers for a kedge with the run directory until the test is over.
func serve(t *testing.T, dir, problem string) {
	s := control.NewServer(dir, func(context.Context) control.Report {
		return control.Report{Version: "v1", Node: "edge", PID: 7, Components: []lifecycle.Status{{Name: "dns", State: lifecycle.Ready, Error: "refused " + problem}}}
	})
	ctx, cancel := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// TestNoSecrets: no file of a bundle has a secret, and the files have what they are for.
func TestNoSecrets(t *testing.T) {
	host.RequireIsolation(t)
	c := nodeWithSecrets(t)
	var bundle bytes.Buffer
	summary, err := Write(t.Context(), c, &bundle, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	files := unpack(t, bundle.Bytes())
	forbidden := []string{marker, base64.StdEncoding.EncodeToString([]byte(secret("binary"))), base64.StdEncoding.EncodeToString([]byte(secret("key")))[:20]}
	for name, content := range files {
		for _, f := range forbidden {
			if i := strings.Index(content, f); i >= 0 || strings.Contains(name, f) {
				t.Errorf("%s has a secret: ...%s...", name, content[max(0, i-60):min(len(content), i+60)])
			}
		}
	}
	for name, wants := range map[string][]string{
		"version.txt":             {"kedge v1\n"},
		"settings.txt":            {"node-name\tedge\tcommand line\ntoken\t***\tKEDGE_TOKEN\nserver-token\t***\t/etc/kedge/config.yaml:3\nkube-apiserver-arg\t*** for oidc-client-secret, v\tcommand line\nof-a-later-version\t***\tcommand line\nlog-level\tinfo\tdefault\n"},
		"status.json":             {`"name": "dns"`, "refused ***"},
		"doctor.txt":              {"PROBLEM  settings: bad ***; mend\n"},
		"doctor.json":             {`"level": "problem"`},
		"profiles/goroutines.txt": {"goroutine profile: total", "control"},
		"profiles/heap.pb.gz":     {"support"},
		"logs/" + strings.Trim(strings.ReplaceAll(c.LogFiles[0], "/", "-"), "-"): {"a line of the log\nthe token is *** and ***\n***\nAuthorization: Bearer ***\npull https://user:***@registry.example/v2\npassword=***\nderived *** key *** rest *** kubeconfig ***\n", "the last line\n"},
		"files.txt":                 {"/data/server/tls/ca.key\n", "/run/kedge.sock\n"},
		"objects/pods.json":         {`"name": "thing"`, `"image": "busybox"`, `"restartCount": 3`, `"reason": "CrashLoopBackOff"`, `"exitCode": 1`, `"message": "all is well"`, `"app": "web"`},
		"objects/nodes.json":        {`"type": "Ready"`},
		"objects/secrets.json":      {`"name": "thing"`},
		"objects/configmaps.json":   {`"name": "thing"`},
		"objects/deployments.json":  {`"image": "busybox"`},
		"objects/events.json":       {`"message": "pulled the image"`},
		"kernel/proc-meminfo.txt":   {"MemTotal:"},
		"kernel/sysctls.txt":        {"net/ipv4/ip_forward = "},
		"kernel/mounts.txt":         {" / "},
		"kernel/cgroups.txt":        {""},
		"network/links.txt":         {": lo type device mtu"},
		"network/routes.txt":        {"127.0.0.0/8"},
		"network/rules.txt":         {"from all"},
		"network/nftables.txt":      {""},
		"missing.txt":               {"journal: systemd has no unit for kedge\n"},
		"objects/apiservices.json":  {"thing"},
		"objects/leases.json":       {"thing"},
		"objects/csinodes.json":     {"thing"},
		"objects/namespaces.json":   {"Running"},
		"objects/replicasets.json":  {"busybox"},
		"objects/daemonsets.json":   {"busybox"},
		"objects/statefulsets.json": {"busybox"},
	} {
		content, ok := files[name]
		if !ok {
			t.Errorf("there is no %s", name)
		}
		for _, want := range wants {
			if !strings.Contains(content, want) {
				t.Errorf("%s has no %q:\n%.2000s", name, want, content)
			}
		}
	}
	if len(summary.Missing) != 1 || len(summary.Files) != len(files) {
		t.Errorf("missing %q, %d files of %d", summary.Missing, len(summary.Files), len(files))
	}
}
