package commandline

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"syscall"
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

// arguments is a node whose components have arguments of the user.
type arguments struct {
	*harness.Node
	issuer *issuer
	files  string // the folder of the files that arguments name
	ns     string
	base   []string // flags, without those that say who is who
}

func newArguments(t *testing.T) *arguments {
	t.Helper()
	a := &arguments{Node: harness.Own(t), issuer: newIssuer(t)}
	a.files = filesOf(t, a.Node, map[string]string{
		"issuer.crt":   a.issuer.authority,
		"audit.yaml":   "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: Metadata, resources: [{resources: [configmaps]}]}]\n",
		"kubelet.yaml": "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ncontainerLogMaxFiles: 3\nimageMaximumGCAge: 5h0m0s\nmaxPods: 9\n",
		"kubelet.d/10.conf": "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n" +
			"containerLogMaxFiles: 4\nevictionHard: {memory.available: 50Mi, nodefs.available: 2%, imagefs.available: 2%, nodefs.inodesFree: 2%, imagefs.inodesFree: 2%}\n",
		"kubelet.d/20.conf":   "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\ncontainerLogMaxFiles: 5\n",
		"kubelet.d/ignored":   "containerLogMaxFiles: 6\n",
		"scheduler.yaml":      "apiVersion: kubescheduler.config.k8s.io/v1\nkind: KubeSchedulerConfiguration\nprofiles: [{schedulerName: default-scheduler}, {schedulerName: second}]\n",
		"authentication.yaml": "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthenticationConfiguration\njwt:\n" + a.issuer.entry(),
		"authorization.yaml":  "apiVersion: apiserver.config.k8s.io/v1\nkind: AuthorizationConfiguration\nauthorizers: [{type: Node, name: node}, {type: RBAC, name: rbac}]\n",
	})
	a.base = append(a.Flags,
		"--kube-apiserver-arg=enable-admission-plugins=AlwaysPullImages", "--kube-apiserver-arg=feature-gates=APIServerIdentity=true",
		"--kube-apiserver-arg=audit-log-path="+filepath.Join(a.files, "audit.log"), "--kube-apiserver-arg=audit-policy-file="+filepath.Join(a.files, "audit.yaml"),
		"--kube-controller-manager-arg=cluster-signing-duration=2h",
		"--kube-scheduler-arg=config="+filepath.Join(a.files, "scheduler.yaml"), "--kube-scheduler-arg=v=2", "--kube-scheduler-arg=feature-gates=MutablePVNodeAffinity=true",
		"--kubelet-arg=config="+filepath.Join(a.files, "kubelet.yaml"), "--kubelet-arg=config-dir="+filepath.Join(a.files, "kubelet.d"), "--kubelet-arg=max-pods=7",
		"--kubelet-arg=feature-gates=KubeletAllocatedPodsEndpoint=true",
		"--kubelet-arg=vmodule=pod_worker*=4")
	a.Flags = append(a.base, "--kube-apiserver-arg=oidc-issuer-url="+a.issuer.url, "--kube-apiserver-arg=oidc-client-id=kedge-test",
		"--kube-apiserver-arg=oidc-ca-file="+filepath.Join(a.files, "issuer.crt"), "--kube-apiserver-arg=oidc-username-prefix=oidc:")
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
	a.ns = a.Namespace(t)
	return a
}

// TestArguments gives arguments to all four components at once, and looks whether each has
// taken effect and nothing has been lost for it that kedge gives them itself.
func TestArguments(t *testing.T) {
	t.Parallel()
	a := newArguments(t)
	t.Run("API server", a.apiServer)
	t.Run("controller manager", a.controllerManager)
	t.Run("scheduler", a.scheduler)
	t.Run("feature gates", a.featureGates)
	t.Run("kubelet", a.kubelet)
	a.clientAuthorities(t)
	t.Run("files", func(t *testing.T) {
		restrictsNodes(t, a.Node)
		knowsOnly(t, a.Node, a.issuer.token(t, "joe"), "file:joe")
	})
}

// apiServer sees what arguments of the API server do, and its admission plugins.
func (a *arguments) apiServer(t *testing.T) {
	if got := a.Kubectl(t, "run", "x", "-n", a.ns, "--image="+harness.Busybox, "--image-pull-policy=Never", "--dry-run=server", "-o", "jsonpath={.spec.containers[0].imagePullPolicy}"); got != "Always" {
		t.Errorf("with AlwaysPullImages the policy is %q", got)
	}
	a.Kubectl(t, "create", "configmap", "-n", a.ns, "audited")
	if log, err := os.ReadFile(filepath.Join(a.files, "audit.log")); err != nil || !strings.Contains(string(log), `"namespace":"`+a.ns+`","name":"audited"`) {
		t.Errorf("the audit log lacks what was done: %v\n%.2000s", err, log)
	}
	restrictsNodes(t, a.Node)
	knowsOnly(t, a.Node, a.issuer.token(t, "jane"), "oidc:jane")
}

// controllerManager sees what an argument of the controller manager does.
func (a *arguments) controllerManager(t *testing.T) {
	cert := a.SignedCertificate(t, a.ns, certificatesv1.KubeAPIServerClientSignerName, x509.CertificateRequest{Subject: pkix.Name{CommonName: "jane"}}, certificatesv1.UsageDigitalSignature, certificatesv1.UsageClientAuth)
	if life := time.Until(cert.NotAfter); life < time.Hour || life > 2*time.Hour {
		t.Errorf("with cluster-signing-duration=2h a certificate is good for %s", life)
	}
}

// scheduler sees a second profile place a pod, and the verbosity of the log.
func (a *arguments) scheduler(t *testing.T) {
	// It is placed and never runs: each image is pulled now, and this comes from nowhere.
	a.Apply(t, a.ns, `{apiVersion: v1, kind: Pod, metadata: {name: p}, spec: {schedulerName: second, containers: [{name: main, image: "127.0.0.1:1/none"}]}}`)
	harness.Eventually(t, 30*time.Second, func() error {
		pod, err := a.Pod(a.ns, "p")
		if err != nil || pod.Spec.NodeName != a.Name {
			return fmt.Errorf("the second profile has not placed the pod: %v", err)
		}
		return nil
	})
	harness.Eventually(t, 10*time.Second, func() error {
		if len(a.LogLines(t, "Successfully bound pod to node")) == 0 {
			return fmt.Errorf("with v=2 the log lacks what has that verbosity:\n%s", a.Tail(5))
		}
		return nil
	})
	if lines := a.LogLines(t, "About to try and schedule pod"); len(lines) > 0 {
		t.Errorf("with v=2 the log has what has verbosity 4: %q", lines)
	}
}

// featureGates sees gates that arguments of different components have opened: all components of a process have one set of them.
func (a *arguments) featureGates(t *testing.T) {
	if _, err := a.TryKubectl(nil, "get", "lease", "-n", "kube-system", "-l", "apiserver.kubernetes.io/identity=kube-apiserver", "-o", "jsonpath={.items[0].metadata.name}"); err != nil {
		t.Errorf("the API server's APIServerIdentity is off: %v", err)
	}
	volume := func(zone string) string {
		return fmt.Sprintf(`{apiVersion: v1, kind: PersistentVolume, metadata: {name: %s}, spec: {capacity: {storage: 1Mi}, accessModes: [ReadWriteOnce], hostPath: {path: /nowhere}, nodeAffinity: {required: {nodeSelectorTerms: [{matchExpressions: [{key: zone, operator: In, values: [%s]}]}]}}}}`, a.ns, zone)
	}
	a.Apply(t, a.ns, volume("a"))
	t.Cleanup(func() { a.TryKubectl(nil, "delete", "pv", a.ns, "--wait=false") })
	if out, err := a.TryKubectl(strings.NewReader(volume("b")), "apply", "-f", "-"); err != nil {
		t.Errorf("the scheduler's MutablePVNodeAffinity is off: %s", out)
	}
	if out, err := a.TryKubectl(nil, "get", "--raw", "/api/v1/nodes/"+a.Name+"/proxy/allocatedPods"); err != nil {
		t.Errorf("the kubelet's KubeletAllocatedPodsEndpoint is off: %s", out)
	}
}

// kubelet sees which of flags, files and defaults the kubelet follows.
func (a *arguments) kubelet(t *testing.T) {
	config := a.Kubectl(t, "get", "--raw", "/api/v1/nodes/"+a.Name+"/proxy/configz")
	for why, want := range map[string]string{
		"flags win over files":      `"maxPods":7`,
		"the last file wins":        `"containerLogMaxFiles":5`,
		"files win over upstream's": `"imageMaximumGCAge":"5h0m0s"`,
		"and over kedge's":          `"nodefs.available":"2%"`,
		"which stand otherwise":     `"seccompDefault":true`,
	} {
		if !strings.Contains(config, want) {
			t.Errorf("%s, but there is no %s: %s", why, want, config)
		}
	}
	harness.Eventually(t, 10*time.Second, func() error {
		if len(a.LogLines(t, "Pod is being synced for the first time")) == 0 {
			return fmt.Errorf("with vmodule the log lacks what has verbosity 4 in the file that is named:\n%s", a.Tail(5))
		}
		return nil
	})
	node, err := a.Client.CoreV1().Nodes().Get(t.Context(), a.Name, metav1.GetOptions{})
	if err != nil || node.Status.Allocatable.Pods().Value() != 7 {
		t.Errorf("the node has place for %s pods: %v", node.Status.Allocatable.Pods(), err)
	}
}

// clientAuthorities starts the node with files in place of flags for who is who, and who may do what. Two of them are refused.
func (a *arguments) clientAuthorities(t *testing.T) {
	if err := a.Signal(syscall.SIGTERM, 20*time.Second); err != nil {
		t.Fatal(err)
	}
	a.Flags = append(a.base, "--kube-apiserver-arg=client-ca-file="+filepath.Join(a.files, "issuer.crt"))
	if err := a.Start(); err == nil || !strings.Contains(err.Error(), "lacks the authority that signs for nodes and administrators; append ") {
		t.Fatalf("without the authority of its clients it starts: %v", err)
	}
	refused := filesOf(t, a.Node, map[string]string{"refused.yaml": "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n" +
		"containerRuntimeEndpoint: unix:///x\nimageServiceEndpoint: unix:///x\nport: 1\ncgroupRoot: /x\ncgroupDriver: none\nserverTLSBootstrap: true\n" +
		"tlsCertFile: /x\ntlsPrivateKeyFile: /x\nauthentication: {x509: {clientCAFile: /x}}\nlogging: {format: json}\n"})
	a.Flags = append(a.base, "--kubelet-arg=config="+filepath.Join(refused, "refused.yaml"))
	if err := a.Start(); err == nil || strings.Count(err.Error(), "--kubelet-arg=config: ") != 10 {
		t.Fatalf("with ten settings that are kedge's: %v", err)
	}
	ours, err := os.ReadFile(filepath.Join(a.DataDir(), "server/tls/client-ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	filesOf(t, a.Node, map[string]string{"clients.crt": a.issuer.authority + string(ours)})
	a.Flags = append(a.base, "--kube-apiserver-arg=client-ca-file="+filepath.Join(a.files, "clients.crt"), "--kube-apiserver-arg=authentication-config="+filepath.Join(a.files, "authentication.yaml"),
		"--kube-apiserver-arg=authorization-config="+filepath.Join(a.files, "authorization.yaml"))
	if err := a.Start(); err != nil {
		t.Fatal(err)
	}
}

// filesOf writes some for the node and returns their folder.
func filesOf(t *testing.T, n *harness.Node, files map[string]string) string {
	t.Helper()
	dir := filepath.Join(n.Dir, "files")
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// restrictsNodes tries what NodeRestriction alone refuses to a node.
func restrictsNodes(t *testing.T, n *harness.Node) {
	t.Helper()
	tls := filepath.Join(n.DataDir(), "server", "tls")
	config := rest.CopyConfig(n.Config)
	config.TLSClientConfig = rest.TLSClientConfig{CAFile: filepath.Join(tls, "server-ca.crt"), CertFile: filepath.Join(tls, "client-node.crt"), KeyFile: filepath.Join(tls, "serving-kubelet.key")}
	kubelet, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	label := func(key string) error {
		_, err := kubelet.CoreV1().Nodes().Patch(context.Background(), n.Name, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:"x"}}}`, key), metav1.PatchOptions{})
		return err
	}
	harness.Eventually(t, 10*time.Second, func() error { return label("kedge.test/x") }) // after a restart connections are to be made anew
	if err := label("node-restriction.kubernetes.io/x"); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "is not allowed to modify labels") {
		t.Errorf("a label that no node may set: %v", err)
	}
}

// knowsOnly: who shows the token is known by that name, may do nothing, and who shows none
// may ask for the node's health and nothing else.
func knowsOnly(t *testing.T, n *harness.Node, token, name string) {
	t.Helper()
	config := rest.AnonymousClientConfig(n.Config)
	config.BearerToken = token
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	harness.Eventually(t, 30*time.Second, func() error { // the issuer's keys are fetched when the API serves already
		who, err := client.AuthenticationV1().SelfSubjectReviews().Create(ctx, &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil || who.Status.UserInfo.Username != name {
			return fmt.Errorf("the API takes %s for %+v: %v", name, who, err)
		}
		return nil
	})
	if _, err := client.CoreV1().Pods("kube-system").List(ctx, metav1.ListOptions{}); !apierrors.IsForbidden(err) {
		t.Errorf("%s has no role and gets %v", name, err)
	}
	for path, want := range map[string]int{"/livez": 200, "/readyz": 200, "/healthz": 200, "/version": 401, "/api": 401, "/metrics": 401} {
		resp, err := harness.InsecureClient().Get(fmt.Sprintf("https://127.0.0.1:%d%s", n.APIPort, path))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != want {
			t.Errorf("%s answers a stranger with %s, want %d", path, resp.Status, want)
		}
	}
}

// issuer is an OpenID provider on this machine.
type issuer struct {
	url, authority string
	key            *rsa.PrivateKey
}

func newIssuer(t *testing.T) *issuer {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	i := &issuer{key: key}
	mux := http.NewServeMux()
	answer := func(path string, body func() any) {
		mux.HandleFunc(path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			_ = json.NewEncoder(w).Encode(body())
		})
	}
	answer("/.well-known/openid-configuration", func() any {
		return map[string]any{"issuer": i.url, "jwks_uri": i.url + "/keys", "id_token_signing_alg_values_supported": []string{"RS256"}}
	})
	answer("/keys", func() any {
		return map[string]any{"keys": []map[string]string{{
			"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "1", "n": base64.RawURLEncoding.EncodeToString(key.N.Bytes()), "e": base64.RawURLEncoding.EncodeToString(big.NewInt(int64(key.E)).Bytes()),
		}}}
	})
	server := httptest.NewTLSServer(mux)
	t.Cleanup(server.Close)
	i.url = server.URL
	i.authority = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))
	return i
}

// entry is the issuer in a file for authentication-config.
func (i *issuer) entry() string {
	return "- issuer:\n    url: " + i.url + "\n    audiences: [kedge-test]\n    certificateAuthority: |\n      " + strings.ReplaceAll(strings.TrimSpace(i.authority), "\n", "\n      ") +
		"\n  claimMappings: {username: {claim: sub, prefix: \"file:\"}}\n"
}

// token says who somebody is.
func (i *issuer) token(t *testing.T, subject string) string {
	t.Helper()
	part := func(v any) string {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return base64.RawURLEncoding.EncodeToString(data)
	}
	text := part(map[string]string{"alg": "RS256", "kid": "1", "typ": "JWT"}) + "." +
		part(map[string]any{"iss": i.url, "aud": "kedge-test", "sub": subject, "iat": time.Now().Unix(), "exp": time.Now().Add(time.Hour).Unix()})
	sum := sha256.Sum256([]byte(text))
	signature, err := rsa.SignPKCS1v15(rand.Reader, i.key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return text + "." + base64.RawURLEncoding.EncodeToString(signature)
}
