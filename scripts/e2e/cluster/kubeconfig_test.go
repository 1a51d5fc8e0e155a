package cluster

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"kedge/scripts/e2e/harness"
)

// TestKubeconfigs: a user with a kubeconfig may do what roles allow. A revoked kubeconfig is refused at once by both servers,
// also after a restart, and what was under way ends, also a shell in a container.
func TestKubeconfigs(t *testing.T) {
	t.Parallel()
	f := harness.NewFleet(t, "--write-kubeconfig-name=site-7")
	second := newServer(t, f)
	if err := second.Start(); err != nil {
		t.Fatal(err)
	}
	if admin, err := clientcmd.LoadFromFile(f.Kubeconfig); err != nil || admin.CurrentContext != "site-7" || admin.Clusters["site-7"] == nil || admin.AuthInfos["site-7"] == nil {
		t.Errorf("the administrator's kubeconfig has the context %v, %v", admin, err)
	}
	ns := f.Namespace(t)
	f.Apply(t, ns, harness.Shell("shell", "exec sleep 3600", "nodeName: "+f.Name+","))
	anna, admin := filepath.Join(t.TempDir(), "anna.yaml"), filepath.Join(t.TempDir(), "admin.yaml")
	refusedKubeconfigs(t, f, anna)

	f.Kedge(t, "kubeconfig", "create", "anna", "--group=devs", "--ttl=1h", "--namespace="+ns, "--output="+anna)
	if st, err := os.Stat(anna); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatalf("its mode is %v, %v", st.Mode(), err)
	}
	if out, err := f.TryKedge("kubeconfig", "create", "anna", "--output="+anna); err == nil || !strings.Contains(out, "exists; remove it or choose another name") {
		t.Errorf("over a file: %v, %s", err, out)
	}
	if err := os.WriteFile(admin, []byte(f.Kedge(t, "kubeconfig", "create", "boss", "--group=system:masters")), 0o600); err != nil {
		t.Fatal(err)
	}
	u := user{t, f, anna}
	if out, err := u.kubectl("get", "pods"); err == nil || !strings.Contains(out, `User "anna" cannot list resource "pods"`) {
		t.Errorf("without a role: %v, %s", err, out)
	}
	f.Kubectl(t, "create", "rolebinding", "devs", "-n", ns, "--clusterrole=edit", "--group=devs")
	harness.Eventually(t, 20*time.Second, func() error {
		if out, err := u.kubectl("get", "pods"); err != nil || !strings.Contains(out, "shell") {
			return fmt.Errorf("with a role: %v, %s", err, out)
		}
		return nil
	})
	if out, err := u.kubectl("get", "pods", "-n", "kube-system"); err == nil {
		t.Errorf("in another namespace: %s", out)
	}
	if out, err := (user{t, f, admin}).kubectl("get", "secrets", "-n", "kube-system"); err != nil {
		t.Errorf("of system:masters: %v, %s", err, out)
	}
	listed := listedKubeconfigs(t, second)
	if a := listed["anna"]; len(listed) != 2 || len(a.Groups) != 1 || a.Groups[0] != "devs" || !a.Revoked.IsZero() || a.Ends.Sub(a.Created).Round(time.Minute) != time.Hour {
		t.Errorf("listed are %+v", listed)
	}
	refusedByKubelet(t, f, admin)
	f.WaitPod(t, ns, "shell", false)
	revokeKubeconfig(t, f, second, ns, anna)
	second.Kedge(t, "kubeconfig", "revoke", "boss")
	if out, err := second.TryKedge("kubeconfig", "revoke", "nobody"); err == nil || !strings.Contains(out, "there is no kubeconfig of the user \"nobody\"") {
		t.Errorf("of nobody: %v, %s", err, out)
	}
	if l := listedKubeconfigs(t, f.Node); l["anna"].Revoked.IsZero() || l["boss"].Revoked.IsZero() {
		t.Errorf("after it are listed %+v", l)
	}

	// With new certificates, by which the servers of a cluster know each other too.
	if out, err := f.RunKedge("certificate", "rotate"); err != nil || !strings.Contains(out, "peer\n") {
		t.Fatalf("rotate: %v, %s", err, out)
	}
	f.Stop(t, syscall.SIGTERM, 20*time.Second)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	for file, by := range map[string]*harness.Node{anna: f.Node, admin: second} {
		if _, err := clientOf(t, by, file).CoreV1().Pods(ns).List(context.Background(), metav1.ListOptions{}); !apierrors.IsUnauthorized(err) {
			t.Errorf("%s after a restart: %v", filepath.Base(file), err)
		}
	}
}

// user is one with a kubeconfig.
type user struct {
	t    *testing.T
	f    *harness.Fleet
	file string
}

func (u user) kubectl(args ...string) (string, error) {
	return u.f.TryKubectl(nil, append(args, "--kubeconfig="+u.file)...)
}

// refusedKubeconfigs asks for what is not made.
func refusedKubeconfigs(t *testing.T, f *harness.Fleet, file string) {
	t.Helper()
	for _, tc := range []struct {
		args []string
		want string
	}{
		{[]string{"system:node:" + f.Name}, "reserved for the cluster"},
		{[]string{"anna", "--group=system:nodes"}, "only system:masters can be given"},
		{[]string{"anna", "--ttl=87600h"}, "--ttl 87600h0m0s is not between"},
		{[]string{"anna", "--server=http://kedge"}, "is not a URL such as"},
		{[]string{"a", "b"}, "give the name of one user"},
	} {
		out, err := f.TryKedge(append([]string{"kubeconfig", "create", "--output=" + file}, tc.args...)...)
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 2 || !strings.Contains(out, tc.want) {
			t.Errorf("create %v: %v, %s", tc.args, err, out)
		}
		if _, err := os.Stat(file); err == nil {
			t.Errorf("create %v made a file", tc.args)
		}
	}
}

// listedKubeconfig is a part of what "kedge kubeconfig ls --output=json" prints.
type listedKubeconfig struct {
	User                   string
	Groups                 []string
	Created, Ends, Revoked time.Time
}

// listedKubeconfigs returns what "kedge kubeconfig ls" prints, by user.
func listedKubeconfigs(t *testing.T, n *harness.Node) map[string]listedKubeconfig {
	t.Helper()
	var all []listedKubeconfig
	if err := json.Unmarshal([]byte(n.Kedge(t, "kubeconfig", "ls", "--output=json")), &all); err != nil {
		t.Fatal(err)
	}
	by := map[string]listedKubeconfig{}
	for _, l := range all {
		by[l.User] = l
	}
	return by
}

// configOf returns the configuration in a kubeconfig, for the API of one server.
func configOf(t *testing.T, by *harness.Node, file string) *rest.Config {
	t.Helper()
	c, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		t.Fatal(err)
	}
	c.Host = fmt.Sprintf("https://%s", net.JoinHostPort(by.Address(t), fmt.Sprint(by.APIPort)))
	c.Dial, c.QPS = by.Config.Dial, -1
	return c
}

func clientOf(t *testing.T, by *harness.Node, file string) *kubernetes.Clientset {
	t.Helper()
	c, err := kubernetes.NewForConfig(configOf(t, by, file))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// refusedByKubelet makes sure that a kubelet does not let in an administrator's kubeconfig: it would not know that it was revoked.
func refusedByKubelet(t *testing.T, f *harness.Fleet, file string) {
	t.Helper()
	c := configOf(t, f.Node, file)
	pair, err := tls.X509KeyPair(c.CertData, c.KeyData)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: &http.Transport{
		DialContext:       c.Dial,
		DisableKeepAlives: true,
		TLSClientConfig:   &tls.Config{Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true},
	}}
	resp, err := client.Get("https://" + net.JoinHostPort(f.Address(t), fmt.Sprint(f.APIPort+1)) + "/pods")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("the kubelet answers %s", resp.Status)
	}
}

// revokeKubeconfig revokes that of anna by another server, while a watch and a shell are open.
func revokeKubeconfig(t *testing.T, f *harness.Fleet, by *harness.Node, ns, file string) {
	t.Helper()
	ctx := context.Background()
	watch, err := clientOf(t, by, file).CoreV1().Pods(ns).Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	w, line := harness.LineWriter(t)
	shell := make(chan error, 1)
	cmd := exec.Command(harness.Binary(), "kubectl", "--kubeconfig="+file, "exec", "shell", "--", "sh", "-c", "echo here; exec sleep 600")
	cmd.Env, cmd.Stdout = os.Environ(), w
	if err := f.Inside(cmd.Start); err != nil {
		t.Fatal(err)
	}
	go func() { shell <- cmd.Wait() }()
	defer func() {
		_ = cmd.Process.Kill()
	}()
	if l, err := line(); err != nil || l != "here" {
		t.Fatalf("the shell prints %q, %v", l, err)
	}
	begin := time.Now()
	if out := by.Kedge(t, "kubeconfig", "revoke", "anna"); !strings.HasPrefix(out, "anna ") {
		t.Errorf("revoke prints %q", out)
	}
	for open := true; open; {
		select {
		case _, open = <-watch.ResultChan():
		case <-time.After(5 * time.Second):
			t.Fatal("the watch goes on")
		}
	}
	t.Logf("its watch ended %s after the command began", time.Since(begin).Round(time.Millisecond))
	select {
	case err := <-shell:
		if err == nil {
			t.Error("its shell ended as if the command had")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("its shell goes on")
	}
	for _, s := range []*harness.Node{f.Node, by} {
		if _, err := clientOf(t, s, file).CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsUnauthorized(err) || !strings.Contains(err.Error(), "was revoked") {
			t.Errorf("%s answers: %v", s.Name, err)
		}
	}
}
