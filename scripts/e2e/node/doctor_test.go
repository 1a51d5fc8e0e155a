package node

import (
	"archive/tar"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"kedge/appliance/doctor"
	"kedge/scripts/e2e/harness"
)

// has fails the test if the report has no finding whose line has all texts in their order.
func has(t *testing.T, r doctor.Report, texts ...string) {
	t.Helper()
	for line := range strings.Lines(r.String()) {
		rest, all := line, true
		for _, text := range texts {
			_, after, ok := strings.Cut(rest, text)
			rest, all = after, all && ok
		}
		if all {
			return
		}
	}
	t.Errorf("no finding has %q:\n%s", texts, r)
}

// expire replaces a certificate by an expired one for a key that nobody has.
func expire(t *testing.T, path string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kube-apiserver"}, NotBefore: time.Now().Add(-9 * day), NotAfter: time.Now().Add(-2 * day)}
	der, err := x509.CreateCertificate(rand.Reader, c, c, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

// bundleWithoutSecrets makes a support bundle of a node with secrets, and looks for them in it.
func bundleWithoutSecrets(t *testing.T, n *harness.Node, ns string) {
	t.Helper()
	const marker = "m4rk3r-of-a-s3cret"
	n.Apply(t, ns, `{apiVersion: v1, kind: Secret, metadata: {name: s}, stringData: {key: `+marker+`}}`)
	n.Apply(t, ns, `{apiVersion: v1, kind: ConfigMap, metadata: {name: c}, data: {key: `+marker+`}}`)
	n.Apply(t, ns, harness.ShellWith("env", "echo $SECRET > /dev/termination-log; exit 1", "", `env: [{name: SECRET, value: `+marker+`}],`))
	n.WaitPod(t, ns, "env", true)
	path := filepath.Join(n.Dir, "bundle")
	if out, err := n.Command("support-bundle", "-o", path); err != nil || !strings.Contains(out, "wrote "+path) {
		t.Fatalf("%v\n%s", err, out)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := zstd.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	key, err := os.ReadFile(filepath.Join(n.DataDir(), "server/tls/client-admin.key"))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for archive := tar.NewReader(z); ; {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		_, name, _ := strings.Cut(h.Name, "/")
		files[name] = string(data)
		for _, secret := range []string{marker, base64.StdEncoding.EncodeToString([]byte(marker)), strings.Split(string(key), "\n")[1], "PRIVATE KEY"} {
			if strings.Contains(string(data), secret) {
				t.Errorf("%s has %q", name, secret)
			}
		}
	}
	for name, want := range map[string]string{
		"objects/pods.json": `"name": "env"`, "objects/secrets.json": `"name": "s"`, "objects/events.json": "FailedScheduling", "doctor.txt": "no node takes the pod", "status.json": `"name": "kubelet"`,
		"settings.txt": "node-name\t" + n.Name + "\tcommand line", "network/nftables.txt": "table kedge-" + n.Name, "profiles/goroutines.txt": "goroutine profile", "kernel/proc-meminfo.txt": "MemTotal",
		"logs/" + strings.Trim(strings.ReplaceAll(n.LogFile(), "/", "-"), "-"): "kedge starts",
	} {
		if !strings.Contains(files[name], want) {
			t.Errorf("%s of the bundle has no %q:\n%.1000s", name, want, files[name])
		}
	}
}

// TestDoctor: the doctor finds nothing on a healthy node; it says why pods do not start; and it names what is wrong with
// a stopped node, and repairs what it may.
func TestDoctor(t *testing.T) {
	t.Parallel()
	n := harness.Own(t)
	n.Network = harness.NewNetwork(t, "198.51.100.12/24")
	if err := os.MkdirAll(n.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.Dir, "config.yaml"), []byte("# of a test\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	r, _ := n.Doctor(t)
	if r.Kedge != doctor.Absent || r.Checks < 8 {
		t.Errorf("before the first start:\n%s", r)
	}
	if err := harness.PrepareImages(n.DataDir()); err != nil {
		t.Fatal(err)
	}
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	ns := n.Namespace(t)
	n.Apply(t, ns, harness.Shell("web", "exec probe serve :8080 web", ""))
	n.WaitPod(t, ns, "web", false)
	if r, code := n.Doctor(t); code != 0 || r.Has(doctor.Problem) || r.Kedge != doctor.Running || r.PID != n.Cmd.Process.Pid || r.Checks < 18 {
		t.Errorf("a healthy node: exit code %d\n%s", code, r)
	}

	n.Apply(t, ns, harness.ShellWith("big", "true", "", `resources: {requests: {memory: 900Gi}},`))
	n.Apply(t, ns, `{apiVersion: v1, kind: Pod, metadata: {name: absent}, spec: {containers: [{name: c, image: "127.0.0.1:1/absent:1"}]}}`)
	harness.Eventually(t, 30*time.Second, func() error {
		r, code := n.Doctor(t)
		if text := r.String(); code != 3 || !strings.Contains(text, "PROBLEM  image 127.0.0.1:1/absent:1: ") || !strings.Contains(text, "/big: no node takes the pod (Unschedulable): ") {
			return fmt.Errorf("exit code %d\n%s", code, text)
		}
		return nil
	})

	bundleWithoutSecrets(t, n, ns)

	n.Stop(t, syscall.SIGTERM, 10*time.Second)
	expire(t, filepath.Join(n.DataDir(), "server/tls/serving-kube-apiserver.crt"))
	err := n.Inside(func() error {
		l, err := net.Listen("tcp", fmt.Sprint(":", n.APIPort))
		if err != nil {
			return err
		}
		t.Cleanup(func() { l.Close() })
		return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("0"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	r, code := n.Doctor(t)
	if code != 3 || r.Kedge != doctor.Stopped {
		t.Errorf("exit code %d, kedge is %s", code, r.Kedge)
	}
	has(t, r, "PROBLEM  kedge: kedge is not running (since ", "; start it with \"kedge server\"")
	has(t, r, "PROBLEM  net.ipv4.ip_forward: ", "sysctl -w net.ipv4.ip_forward=1")
	has(t, r, fmt.Sprintf("PROBLEM  port %d/tcp: the port of the API server is in use by node.test (process %d)", n.APIPort, os.Getpid()), "--https-listen-port")
	has(t, r, "PROBLEM  certificate server/tls/serving-kube-apiserver.crt: the certificate of kube-apiserver has expired (since ", "2 days ago", "start kedge")

	for _, f := range r.Findings {
		if f.Subject == "ranges" || f.Subject == "mtu" || f.Subject == "firewall" {
			t.Errorf("the node's own links are a finding: %+v", f)
		}
	}

	r, _ = n.Doctor(t, "--fix")
	has(t, r, "FIXED    net.ipv4.ip_forward: ", "; set net.ipv4.ip_forward to 1")
	r, _ = n.Doctor(t)
	for _, f := range r.Findings {
		if f.Subject == "net.ipv4.ip_forward" {
			t.Errorf("it was not repaired:\n%s", r)
		}
	}
}
