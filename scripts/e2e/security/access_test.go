package security

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	certificatesv1 "k8s.io/api/certificates/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"kedge/scripts/e2e/harness"
)

func TestAnonymousAccess(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	client := harness.InsecureClient()
	for path, want := range map[string]int{
		"/livez": 200, "/readyz": 200, "/healthz": 200,
		"/": 401, "/version": 401, "/metrics": 401, "/api": 401, "/apis": 401, "/openapi/v2": 401, "/openid/v1/jwks": 401, "/.well-known/openid-configuration": 401,
		"/api/v1/namespaces": 401, "/readyz/ping": 401, "/debug/pprof/": 401, "/api/v1/nodes/" + n.Name + "/proxy/pods": 401,
	} {
		resp, err := client.Get(fmt.Sprintf("https://127.0.0.1:%d%s", n.APIPort, path))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s answers %s, want %d", path, resp.Status, want)
		}
	}
	req, _ := http.NewRequest(http.MethodGet, fmt.Sprintf("https://127.0.0.1:%d/livez", n.APIPort), nil)
	req.Header.Set("Authorization", "Bearer not-a-token")
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("a wrong token is answered with %s", resp.Status)
	}
}

// requestAs makes a CertificateSigningRequest and returns the private key.
func requestAs(t *testing.T, n *harness.Node, name, signer string, subject pkix.Name, usages ...certificatesv1.KeyUsage) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: subject}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := &certificatesv1.CertificateSigningRequest{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: certificatesv1.CertificateSigningRequestSpec{
		Request: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}), SignerName: signer, Usages: usages,
	}}
	if _, err := n.Client.CertificatesV1().CertificateSigningRequests().Create(context.Background(), csr, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { n.TryKubectl(nil, "delete", "csr", name) })
	return key
}

// certified is a client with a certificate that the cluster has issued on request.
func certified(t *testing.T, n *harness.Node, name, signer string, subject pkix.Name) *kubernetes.Clientset {
	t.Helper()
	key := requestAs(t, n, name, signer, subject, certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth)
	n.Kubectl(t, "certificate", "approve", name)
	var cert []byte
	harness.Eventually(t, 20*time.Second, func() error {
		csr, err := n.Client.CertificatesV1().CertificateSigningRequests().Get(context.Background(), name, metav1.GetOptions{})
		if err != nil || len(csr.Status.Certificate) == 0 {
			return fmt.Errorf("no certificate yet: %v", err)
		}
		cert = csr.Status.Certificate
		return nil
	})
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	config := rest.AnonymousClientConfig(n.Config)
	config.CertData, config.KeyData = cert, pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func TestCertificateRequestsAndRBAC(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	ctx := context.Background()
	jane := certified(t, n, ns+"-jane", certificatesv1.KubeAPIServerClientSignerName, pkix.Name{CommonName: "jane-" + ns, Organization: []string{"team"}})
	who, err := jane.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
	if err != nil || who.Status.UserInfo.Username != "jane-"+ns || who.Status.UserInfo.Groups[0] != "team" {
		t.Fatalf("the API takes jane for %+v: %v", who, err)
	}
	if _, err := jane.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("without a role jane gets %v", err)
	}
	can := func(args ...string) string {
		out, _ := n.TryKubectl(nil, append([]string{"auth", "can-i", "-n", ns, "--as=jane-" + ns}, args...)...)
		answer, _, _ := strings.Cut(out, "\n")
		return answer
	}
	if got := can("list", "pods"); got != "no" {
		t.Errorf("can-i without a role: %q", got)
	}
	n.Kubectl(t, "create", "role", "-n", ns, "reader", "--verb=get,list", "--resource=pods")
	n.Kubectl(t, "create", "rolebinding", "-n", ns, "reader", "--role=reader", "--user=jane-"+ns)
	harness.Eventually(t, 10*time.Second, func() error {
		_, err := jane.CoreV1().Pods(ns).List(ctx, metav1.ListOptions{})
		return err
	})
	for question, want := range map[string]string{"list pods": "yes", "delete pods": "no", "get secrets": "no"} {
		if got := can(strings.Fields(question)...); got != want {
			t.Errorf("can-i %s: %q", question, got)
		}
	}
	if err := jane.CoreV1().Pods(ns).Delete(ctx, "x", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("with a reader's role jane deletes: %v", err)
	}
	if _, err := jane.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("in another namespace jane gets %v", err)
	}
	if got := n.Kubectl(t, "auth", "can-i", "*", "*", "--all-namespaces"); got != "yes\n" {
		t.Errorf("the administrator can: %q", got)
	}
	if got := n.Kubectl(t, "auth", "whoami", "-o", "jsonpath={.status.userInfo.username}"); got != "system:admin" {
		t.Errorf("the administrator is %q", got)
	}
	// Denied requests stay without a certificate.
	requestAs(t, n, ns+"-joe", certificatesv1.KubeAPIServerClientSignerName, pkix.Name{CommonName: "joe"}, certificatesv1.UsageClientAuth)
	n.Kubectl(t, "certificate", "deny", ns+"-joe")
	if got := n.Kubectl(t, "get", "csr", ns+"-joe", "-o", "jsonpath={.status.conditions[*].type} {.status.certificate}"); got != "Denied " {
		t.Errorf("the denied request is %q", got)
	}
}

func TestNodeIdentityIsRestricted(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	ctx := context.Background()
	n.FakeNode(t, ns, "other", nil)
	// A certificate of the node's name is worth nothing without the node's key.
	stranger := certified(t, n, ns+"-node", certificatesv1.KubeAPIServerClientKubeletSignerName, pkix.Name{CommonName: "system:node:" + n.Name, Organization: []string{"system:nodes"}})
	if _, err := stranger.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{}); !apierrors.IsUnauthorized(err) {
		t.Errorf("another key under the node's name: %v", err)
	}
	dir := filepath.Join(n.DataDir(), "server", "tls")
	config := rest.CopyConfig(n.Config)
	config.TLSClientConfig = rest.TLSClientConfig{CAFile: filepath.Join(dir, "server-ca.crt"), CertFile: filepath.Join(dir, "client-node.crt"), KeyFile: filepath.Join(dir, "serving-kubelet.key")}
	kubelet, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	nodes := kubelet.CoreV1().Nodes()
	patch := func(name, label string, sub ...string) error {
		_, err := nodes.Patch(ctx, name, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:"x"}}}`, label), metav1.PatchOptions{}, sub...)
		return err
	}
	if err := patch(n.Name, "kedge.test/"+ns); err != nil {
		t.Errorf("its own node: %v", err)
	}
	if err := patch(n.Name, "node-restriction.kubernetes.io/x"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "is not allowed to modify labels") {
		t.Errorf("a reserved label of its own: %v", err)
	}
	if err := patch(ns+"-other", "kedge.test/x"); !apierrors.IsForbidden(err) {
		t.Errorf("another node: %v", err)
	}
	if err := patch(ns+"-other", "kedge.test/x", "status"); !apierrors.IsForbidden(err) {
		t.Errorf("another node's status: %v", err)
	}
	if err := nodes.Delete(ctx, ns+"-other", metav1.DeleteOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("deletion of another node: %v", err)
	}
	// It reads the secrets of its pods, and no others.
	n.Kubectl(t, "create", "secret", "generic", "-n", ns, "mine", "--from-literal=a=b")
	n.Kubectl(t, "create", "secret", "generic", "-n", ns, "foreign", "--from-literal=a=b")
	n.Apply(t, ns, harness.ShellWith("p", "exec sleep 3600", "", "env: [{name: A, valueFrom: {secretKeyRef: {name: mine, key: a}}}],"))
	n.WaitPod(t, ns, "p", false)
	if _, err := kubelet.CoreV1().Secrets(ns).Get(ctx, "mine", metav1.GetOptions{}); err != nil {
		t.Errorf("the secret of its pod: %v", err)
	}
	if _, err := kubelet.CoreV1().Secrets(ns).Get(ctx, "foreign", metav1.GetOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("the secret of no pod of it: %v", err)
	}
	// Somebody who asks for a node's certificate with another subject gets none.
	requestAs(t, n, ns+"-false", certificatesv1.KubeAPIServerClientKubeletSignerName, pkix.Name{CommonName: "admin", Organization: []string{"system:masters"}}, certificatesv1.UsageClientAuth)
	n.Kubectl(t, "certificate", "approve", ns+"-false")
	harness.Eventually(t, 20*time.Second, func() error {
		if got := n.Kubectl(t, "get", "csr", ns+"-false", "-o", "jsonpath={.status.conditions[*].type} {.status.certificate}"); got != "Approved Failed " {
			return fmt.Errorf("the request is %q", got)
		}
		return nil
	})
}

func TestSecretsAreEncryptedAtRest(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	const hidden, open = "canary-5e1f0c-hidden", "canary-5e1f0c-open"
	n.Kubectl(t, "create", "secret", "generic", "-n", ns, "s", "--from-literal=k="+hidden)
	n.Kubectl(t, "create", "configmap", "-n", ns, "c", "--from-literal=k="+open)
	found := map[string]string{}
	harness.Eventually(t, 10*time.Second, func() error {
		err := filepath.WalkDir(filepath.Join(n.DataDir(), "server/store"), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := os.ReadFile(path)
			for _, canary := range []string{hidden, open} {
				if bytes.Contains(data, []byte(canary)) {
					found[canary] = path
				}
			}
			return err
		})
		if err == nil && found[open] == "" {
			err = fmt.Errorf("even what is not secret is not found: this test looks in the wrong place")
		}
		return err
	})
	if found[hidden] != "" {
		t.Errorf("the secret is readable in %s", found[hidden])
	}
	if got := n.Kubectl(t, "get", "secret", "-n", ns, "s", "-o", "jsonpath={.data.k}"); got == "" {
		t.Error("the secret cannot be read back")
	}
	for _, f := range []string{"server/encryption-config.yaml", "server/tls/service-account.key", "server/tls/server-ca.key"} {
		if info, err := os.Stat(filepath.Join(n.DataDir(), f)); err != nil || info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s is readable by others: %v %v", f, info, err)
		}
	}
}
