package harness

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

// serving makes a certificate for the service and puts it, with its key, into the
// secret "serving"; it returns the certificate, which is its own authority.
func (n *Node) serving(t *testing.T, namespace, service string) (bundle string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: service}, DNSNames: []string{service + "." + namespace + ".svc"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	cert, err := x509.CreateCertificate(rand.Reader, &template, &template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(kind string, der []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	bundle = encode("CERTIFICATE", cert)
	n.Apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Secret, metadata: {name: serving}, type: kubernetes.io/tls, data: {tls.crt: %s, tls.key: %s}}`, bundle, encode("EC PRIVATE KEY", der)))
	n.Apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, ports: [{port: 443, targetPort: 8443}]}}`, service, service))
	return bundle
}

// CheckAggregatedAPI makes an aggregated API of a pod with these further fields, asks it, and ends it.
func (n *Node) CheckAggregatedAPI(t *testing.T, more string) {
	ns := n.Namespace(t)
	group := ns + ".aggregated.test"
	bundle := n.serving(t, ns, "extension")
	n.Apply(t, ns, ShellWith("extension", "exec probe api :8443 "+group+" /tls/tls.crt /tls/tls.key", more+"volumes: [{name: tls, secret: {secretName: serving}}],",
		"volumeMounts: [{name: tls, mountPath: /tls}], readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1},"))
	n.WaitPod(t, ns, "extension", false)
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apiregistration.k8s.io/v1, kind: APIService, metadata: {name: v1.%s}, spec: {group: %s, version: v1, groupPriorityMinimum: 1000, versionPriority: 10, caBundle: %s, service: {name: extension, namespace: %s}}}`, group, group, bundle, ns))
	t.Cleanup(func() { n.TryKubectl(nil, "delete", "apiservice", "v1."+group) })
	n.Kubectl(t, "wait", "apiservice/v1."+group, "--for=condition=Available", "--timeout=40s")
	Eventually(t, 20*time.Second, func() error {
		out, err := n.TryKubectl(nil, "get", "callers."+group, "-o", "jsonpath={.items[0].metadata.name} {.items[0].user} {.items[0].by} {.items[0].groups}")
		if err != nil || out != `you system:admin system:auth-proxy ["system:masters","system:authenticated"]` {
			return fmt.Errorf("the extension answers %q: %v", out, err)
		}
		return nil
	})
	// The API server authorizes before it asks the extension.
	if out, err := n.TryKubectl(nil, "get", "--raw", "/apis/"+group+"/v1/callers", "--as=nobody-special"); err == nil || !strings.Contains(out, "orbidden") {
		t.Errorf("somebody without a role: %v %s", err, out)
	}
	// Without its pod it is not available; the rest of the API is.
	n.Kubectl(t, "delete", "pod", "-n", ns, "extension")
	n.Kubectl(t, "wait", "apiservice/v1."+group, "--for=condition=Available=false", "--timeout=60s")
	n.Kubectl(t, "get", "pods", "-n", ns)
}

// CheckAdmissionWebhooks makes webhooks of a pod with these further fields, sees them work, and ends them.
func (n *Node) CheckAdmissionWebhooks(t *testing.T, more string) {
	ns := n.Namespace(t)
	bundle := n.serving(t, ns, "hook")
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: hook, labels: {app: hook}}, spec: {terminationGracePeriodSeconds: 1, %s volumes: [{name: tls, secret: {secretName: serving}}],
		containers: [{name: main, image: %q, args: [webhook, --tls-cert-file=/tls/tls.crt, --tls-private-key-file=/tls/tls.key, --port=8443], volumeMounts: [{name: tls, mountPath: /tls}],
			readinessProbe: {httpGet: {scheme: HTTPS, port: 8443, path: /readyz}, periodSeconds: 1}}]}}`, more, Agnhost))
	n.WaitPod(t, ns, "hook", false)
	hook := func(kind, path string) string {
		return fmt.Sprintf(`{apiVersion: admissionregistration.k8s.io/v1, kind: %sWebhookConfiguration, metadata: {name: %s}, webhooks: [{name: configmaps.kedge.test, admissionReviewVersions: [v1], sideEffects: None, failurePolicy: Fail, timeoutSeconds: 5,
			clientConfig: {caBundle: %s, service: {name: hook, namespace: %s, path: %s}}, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}, rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]}]}`, kind, ns, bundle, ns, path, ns)
	}
	n.Apply(t, ns, hook("Mutating", "/mutating-configmaps"))
	n.Apply(t, ns, hook("Validating", "/configmaps"))
	t.Cleanup(func() {
		n.TryKubectl(nil, "delete", "mutatingwebhookconfiguration,validatingwebhookconfiguration", ns)
	})
	Eventually(t, 30*time.Second, func() error {
		out, err := n.TryKubectl(nil, "create", "configmap", "-n", ns, "x", "--dry-run=server", "--from-literal=webhook-e2e-test=webhook-disallow")
		if err == nil || !strings.Contains(out, `admission webhook "configmaps.kedge.test" denied the request: the configmap contains unwanted key and value`) {
			return fmt.Errorf("not refused: %v %s", err, out)
		}
		return nil
	})
	Eventually(t, 20*time.Second, func() error {
		got, err := n.TryKubectl(nil, "create", "configmap", "-n", ns, "y", "--dry-run=server", "--from-literal=mutation-start=yes", "-o", "jsonpath={.data}")
		if err != nil || got != `{"mutation-stage-1":"yes","mutation-start":"yes"}` {
			return fmt.Errorf("data is %s: %v", got, err)
		}
		return nil
	})
	n.Kubectl(t, "create", "configmap", "-n", ns, "fine")
	// With its pod gone, Fail means refuse.
	n.Kubectl(t, "delete", "pod", "-n", ns, "hook")
	if out, err := n.TryKubectl(nil, "create", "configmap", "-n", ns, "z"); err == nil || !strings.Contains(out, "failed calling webhook") {
		t.Errorf("without the webhook: %v %s", err, out)
	}
}
