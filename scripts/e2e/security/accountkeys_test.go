package security

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"kedge/scripts/e2e/harness"
)

// TestServiceAccountKeyChange replaces the key of service accounts' tokens, which at first is an administrator's own RSA key,
// while a pod runs and without a restart; then once more with kill -9 in the middle. Tokens of the old key are accepted until the
// change is finished, and not after it. That is refused while a Secret has one. A key that an administrator has given for others'
// tokens stays.
func TestServiceAccountKeyChange(t *testing.T) {
	t.Parallel()
	f := harness.NewPreparedFleet(t, func(n *harness.Node) { ownAccountKey(t, n) }, "--kube-apiserver-arg=service-account-key-file=/var/lib/kedge/others.pem")
	ns := f.Namespace(t)
	f.Apply(t, ns, harness.Shell("p", "exec sleep 3600", ""))
	f.WaitPod(t, ns, "p", false)
	inPod := func() string {
		return f.Kubectl(t, "exec", "-n", ns, "p", "--", "cat", "/var/run/secrets/kubernetes.io/serviceaccount/token")
	}
	secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "lasting", Annotations: map[string]string{corev1.ServiceAccountNameKey: "default"}}, Type: corev1.SecretTypeServiceAccountToken}
	if _, err := f.Client.CoreV1().Secrets(ns).Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	lasting := func(other string) (token string) {
		t.Helper()
		harness.Eventually(t, 20*time.Second, func() error {
			s, err := f.Client.CoreV1().Secrets(ns).Get(t.Context(), "lasting", metav1.GetOptions{})
			if err != nil {
				return err
			}
			if token = string(s.Data[corev1.ServiceAccountTokenKey]); token == "" || token == other {
				return fmt.Errorf("it has %q", token)
			}
			return nil
		})
		return token
	}
	if keys := f.PublishedKeys(t); len(keys) != 2 || !slices.Contains(keys, f.AccountKeys(t).Signs) {
		t.Fatalf("published are %v", keys)
	}
	first := f.AccountKeys(t).Signs
	others := slices.DeleteFunc(f.PublishedKeys(t), func(id string) bool { return id == first })[0]
	published := func(own ...string) {
		t.Helper()
		want := append(own, others)
		slices.Sort(want)
		if keys := f.PublishedKeys(t); !slices.Equal(keys, want) {
			t.Errorf("published are %v, want %v", keys, want)
		}
	}
	old := map[string]string{"of a pod": inPod(), "requested": f.NewAccountToken(t, ns), "in a Secret": lasting("")}
	accepted := func(tokens map[string]string, key string) {
		t.Helper()
		for what, token := range tokens {
			if got := harness.KeyOfToken(t, token); got != key {
				t.Errorf("the token %s is signed with %s, want %s", what, got, key)
			}
			if err := f.AcceptsToken(token, ns); err != nil {
				t.Errorf("the token %s: %v", what, err)
			}
		}
	}
	accepted(old, first)

	process := f.Cmd.Process.Pid
	out := f.Kedge(t, "service-account-key", "rotate")
	t.Logf("rotate:\n%s", out)
	second := f.AccountKeys(t).Signs
	if second == first {
		t.Errorf("%s still signs", second)
	}
	published(first, second)
	fresh := map[string]string{"requested": f.NewAccountToken(t, ns)}
	accepted(old, first)
	accepted(fresh, second)
	finish := []string{"service-account-key", "finish"}
	refused := func(want string, args ...string) {
		t.Helper()
		if out, err := f.TryKedge(args...); err == nil || !strings.Contains(out, want) {
			t.Errorf("%v: %v\n%s", args, err, out)
		}
	}
	refused("1 Secrets have tokens of the old key, which would not be accepted any more: "+ns+"/lasting", finish...)
	refused("is being replaced", "service-account-key", "rotate")
	t.Logf("status:\n%s", f.Kedge(t, "service-account-key", "status"))
	f.Kubectl(t, "patch", "secret", "-n", ns, "lasting", "--type=json", `-p=[{"op":"remove","path":"/data/token"}]`)
	fresh["in a Secret"] = lasting(old["in a Secret"])
	refused("pods may have tokens of the old key until", finish...)
	t.Logf("finish:\n%s", f.Kedge(t, append(finish, "--force")...))
	published(second)
	for what, token := range old { // the API server remembers good tokens for ten seconds
		harness.Eventually(t, 20*time.Second, func() error {
			if err := f.AcceptsToken(token, ns); !apierrors.IsUnauthorized(err) {
				return fmt.Errorf("the old token %s: %v", what, err)
			}
			return nil
		})
	}
	accepted(fresh, second)
	if f.Cmd.Process.Pid != process || f.Kubectl(t, "exec", "-n", ns, "p", "--", "echo", "here") != "here\n" {
		t.Error("the server or the pod is another")
	}

	f.Kedge(t, "service-account-key", "rotate", "--no-wait")
	f.Stop(t, syscall.SIGKILL, 10*time.Second)
	if err := f.Start(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, 30*time.Second, func() error {
		if s := f.AccountKeys(t); s.Stage != "keep" || s.Signs == second || len(s.Servers) != 1 || !s.Servers[0].Current {
			return fmt.Errorf("%+v", s)
		}
		return nil
	})
	accepted(fresh, second)
	third := f.AccountKeys(t).Signs
	published(second, third)
	accepted(map[string]string{"after the crash": f.NewAccountToken(t, ns)}, third)
}

// ownAccountKey gives a server that has never started an RSA key for the tokens of service accounts, and the public key of others
// in the file others.pem of its data directory.
func ownAccountKey(t *testing.T, n *harness.Node) {
	t.Helper()
	dir := filepath.Join(n.DataDir(), "server", "tls")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err == nil {
		err = os.MkdirAll(dir, 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "service-account.key"), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	others, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	if der, err = x509.MarshalPKIXPublicKey(&others.PublicKey); err == nil {
		err = os.WriteFile(filepath.Join(n.DataDir(), "others.pem"), pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der}), 0o644)
	}
	if err != nil {
		t.Fatal(err)
	}
}
