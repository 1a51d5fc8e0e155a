package e2e

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"strings"
	"testing"
	"time"
)

func TestCustomResources(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	group := ns + ".kedge.test"
	n.apply(t, ns, fmt.Sprintf(`{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: boats.%s}, spec: {group: %s, scope: Namespaced, names: {plural: boats, singular: boat, kind: Boat, shortNames: [bt]},
		versions: [{name: v1, served: true, storage: true, subresources: {status: {}, scale: {specReplicasPath: .spec.seats, statusReplicasPath: .status.taken}}, additionalPrinterColumns: [{name: Seats, type: integer, jsonPath: .spec.seats}],
			schema: {openAPIV3Schema: {type: object, properties: {
				spec: {type: object, required: [seats], x-kubernetes-validations: [{rule: "self.crew <= self.seats", message: "more crew than seats"}, {rule: "self.name == oldSelf.name", message: "a boat keeps its name"}],
					properties: {seats: {type: integer, minimum: 1, description: "How many may come along."}, crew: {type: integer, default: 1}, name: {type: string, default: unnamed}}},
				status: {type: object, properties: {taken: {type: integer}}}}}}}]}}`, group, group))
	t.Cleanup(func() { n.tryKubectl(nil, "delete", "crd", "boats."+group, "--wait=false") })
	n.kubectl(t, "wait", "crd/boats."+group, "--for=condition=established", "--timeout=20s")
	boat := func(name, spec string) string {
		return fmt.Sprintf("{apiVersion: %s/v1, kind: Boat, metadata: {name: %s}, spec: {%s}, status: {taken: 7}}", group, name, spec)
	}
	eventually(t, 20*time.Second, func() error { // until discovery knows it
		out, err := n.tryKubectl(strings.NewReader(boat("good", "seats: 2, rudder: big")), "create", "--validate=ignore", "-n", ns, "-f", "-")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if got := n.kubectl(t, "get", "boats."+group, "-n", ns, "good", "-o", "jsonpath={.spec} {.status}"); got != `{"crew":1,"name":"unnamed","seats":2} ` {
		t.Errorf("defaults and pruning made %s", got)
	}
	for spec, want := range map[string]string{"seats: 1, crew: 2": "more crew than seats", "seats: 0": "should be greater than or equal to 1", "crew: 1": "spec.seats: Required value", "seats: many": "must be of type integer"} {
		if out := n.refused(t, ns, boat("bad", spec)); !strings.Contains(out, want) {
			t.Errorf("%s was refused with %s", spec, out)
		}
	}
	if out, err := n.tryKubectl(nil, "patch", "boats."+group, "-n", ns, "good", "--type=merge", "-p", `{"spec":{"name":"renamed"}}`); err == nil || !strings.Contains(out, "a boat keeps its name") {
		t.Errorf("renamed: %v %s", err, out)
	}
	n.kubectl(t, "scale", "boats."+group+"/good", "-n", ns, "--replicas=5")
	n.kubectl(t, "patch", "boats."+group, "-n", ns, "good", "--type=merge", "--subresource=status", "-p", `{"status":{"taken":3}}`)
	if got := strings.Fields(n.kubectl(t, "get", "boats."+group, "-n", ns, "--no-headers")); len(got) != 2 || got[1] != "5" {
		t.Errorf("the table is %v", got)
	}
	if got := n.kubectl(t, "get", "boats."+group, "-n", ns, "good", "-o", "jsonpath={.status.taken}"); got != "3" {
		t.Errorf("status is %s", got)
	}
	eventually(t, 20*time.Second, func() error {
		out, err := n.tryKubectl(nil, "explain", "boats.spec.seats", "--api-version="+group+"/v1")
		if err != nil || !strings.Contains(out, "How many may come along.") {
			return fmt.Errorf("%v: %s", err, out)
		}
		if out := n.kubectl(t, "get", "--raw", "/openapi/v2"); !strings.Contains(out, "/apis/"+group+"/v1/namespaces/{namespace}/boats") || !strings.Contains(out, "/apis/apps/v1/namespaces/{namespace}/deployments") {
			return errors.New("/openapi/v2 lacks the new type or the old ones")
		}
		return nil
	})
}

func TestValidatingAdmissionPolicy(t *testing.T) {
	t.Parallel()
	n := shared(t)
	ns := n.namespace(t)
	n.apply(t, ns, fmt.Sprintf(`
{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicy, metadata: {name: %s}, spec: {failurePolicy: Fail, matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]},
	validations: [{expression: "object.metadata.name.startsWith('ok-')", messageExpression: "'bad name ' + object.metadata.name"}]}}
---
{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicyBinding, metadata: {name: %s}, spec: {policyName: %s, validationActions: [Deny], matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}}}}`, ns, ns, ns, ns))
	t.Cleanup(func() {
		n.tryKubectl(nil, "delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", ns)
	})
	eventually(t, 20*time.Second, func() error {
		out, err := n.tryKubectl(nil, "create", "configmap", "-n", ns, "x", "--dry-run=server")
		if err == nil || !strings.Contains(out, "bad name x") {
			return fmt.Errorf("not refused: %v %s", err, out)
		}
		return nil
	})
	n.kubectl(t, "create", "configmap", "-n", ns, "ok-x")
}

// serving makes a certificate for the service and puts it, with its key, into the
// secret "serving"; it returns the certificate, which is its own authority.
func (n *node) serving(t *testing.T, namespace, service string) (bundle string) {
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
	n.apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Secret, metadata: {name: serving}, type: kubernetes.io/tls, data: {tls.crt: %s, tls.key: %s}}`, bundle, encode("EC PRIVATE KEY", der)))
	n.apply(t, namespace, fmt.Sprintf(`{apiVersion: v1, kind: Service, metadata: {name: %s}, spec: {selector: {app: %s}, ports: [{port: 443, targetPort: 8443}]}}`, service, service))
	return bundle
}

// TestAggregatedAPI has a pod that serves an API group. The API server must reach it
// through the service, show that it is the aggregator, and say on whose behalf it asks.
func TestAggregatedAPI(t *testing.T) {
	t.Parallel()
	shared(t).aggregatedAPI(t, "")
}

// aggregatedAPI is the test with further fields of the pod.
func (n *node) aggregatedAPI(t *testing.T, more string) {
	ns := n.namespace(t)
	group := ns + ".aggregated.test"
	bundle := n.serving(t, ns, "extension")
	n.apply(t, ns, shellWith("extension", "exec probe api :8443 "+group+" /tls/tls.crt /tls/tls.key", more+"volumes: [{name: tls, secret: {secretName: serving}}],",
		"volumeMounts: [{name: tls, mountPath: /tls}], readinessProbe: {tcpSocket: {port: 8443}, periodSeconds: 1},"))
	n.waitPod(t, ns, "extension", false)
	n.apply(t, ns, fmt.Sprintf(`{apiVersion: apiregistration.k8s.io/v1, kind: APIService, metadata: {name: v1.%s}, spec: {group: %s, version: v1, groupPriorityMinimum: 1000, versionPriority: 10, caBundle: %s, service: {name: extension, namespace: %s}}}`, group, group, bundle, ns))
	t.Cleanup(func() { n.tryKubectl(nil, "delete", "apiservice", "v1."+group) })
	n.kubectl(t, "wait", "apiservice/v1."+group, "--for=condition=Available", "--timeout=40s")
	eventually(t, 20*time.Second, func() error {
		out, err := n.tryKubectl(nil, "get", "callers."+group, "-o", "jsonpath={.items[0].metadata.name} {.items[0].user} {.items[0].by} {.items[0].groups}")
		if err != nil || out != `you system:admin system:auth-proxy ["system:masters","system:authenticated"]` {
			return fmt.Errorf("the extension answers %q: %v", out, err)
		}
		return nil
	})
	// The API server authorizes before it asks the extension.
	if out, err := n.tryKubectl(nil, "get", "--raw", "/apis/"+group+"/v1/callers", "--as=nobody-special"); err == nil || !strings.Contains(out, "orbidden") {
		t.Errorf("somebody without a role: %v %s", err, out)
	}
	// Without its pod it is not available; the rest of the API is.
	n.kubectl(t, "delete", "pod", "-n", ns, "extension")
	n.kubectl(t, "wait", "apiservice/v1."+group, "--for=condition=Available=false", "--timeout=60s")
	n.kubectl(t, "get", "pods", "-n", ns)
}

// TestAdmissionWebhooks has upstream's test server in a pod that changes and refuses.
func TestAdmissionWebhooks(t *testing.T) {
	t.Parallel()
	shared(t).admissionWebhooks(t, "")
}

// admissionWebhooks is the test with further fields of the pod.
func (n *node) admissionWebhooks(t *testing.T, more string) {
	ns := n.namespace(t)
	bundle := n.serving(t, ns, "hook")
	n.apply(t, ns, fmt.Sprintf(`{apiVersion: v1, kind: Pod, metadata: {name: hook, labels: {app: hook}}, spec: {terminationGracePeriodSeconds: 1, %s volumes: [{name: tls, secret: {secretName: serving}}],
		containers: [{name: main, image: %q, args: [webhook, --tls-cert-file=/tls/tls.crt, --tls-private-key-file=/tls/tls.key, --port=8443], volumeMounts: [{name: tls, mountPath: /tls}],
			readinessProbe: {httpGet: {scheme: HTTPS, port: 8443, path: /readyz}, periodSeconds: 1}}]}}`, more, agnhost))
	n.waitPod(t, ns, "hook", false)
	hook := func(kind, path string) string {
		return fmt.Sprintf(`{apiVersion: admissionregistration.k8s.io/v1, kind: %sWebhookConfiguration, metadata: {name: %s}, webhooks: [{name: configmaps.kedge.test, admissionReviewVersions: [v1], sideEffects: None, failurePolicy: Fail, timeoutSeconds: 5,
			clientConfig: {caBundle: %s, service: {name: hook, namespace: %s, path: %s}}, namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}, rules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]}]}`, kind, ns, bundle, ns, path, ns)
	}
	n.apply(t, ns, hook("Mutating", "/mutating-configmaps"))
	n.apply(t, ns, hook("Validating", "/configmaps"))
	t.Cleanup(func() {
		n.tryKubectl(nil, "delete", "mutatingwebhookconfiguration,validatingwebhookconfiguration", ns)
	})
	eventually(t, 30*time.Second, func() error {
		out, err := n.tryKubectl(nil, "create", "configmap", "-n", ns, "x", "--dry-run=server", "--from-literal=webhook-e2e-test=webhook-disallow")
		if err == nil || !strings.Contains(out, `admission webhook "configmaps.kedge.test" denied the request: the configmap contains unwanted key and value`) {
			return fmt.Errorf("not refused: %v %s", err, out)
		}
		return nil
	})
	eventually(t, 20*time.Second, func() error {
		got, err := n.tryKubectl(nil, "create", "configmap", "-n", ns, "y", "--dry-run=server", "--from-literal=mutation-start=yes", "-o", "jsonpath={.data}")
		if err != nil || got != `{"mutation-stage-1":"yes","mutation-start":"yes"}` {
			return fmt.Errorf("data is %s: %v", got, err)
		}
		return nil
	})
	n.kubectl(t, "create", "configmap", "-n", ns, "fine")
	// With its pod gone, Fail means refuse.
	n.kubectl(t, "delete", "pod", "-n", ns, "hook")
	if out, err := n.tryKubectl(nil, "create", "configmap", "-n", ns, "z"); err == nil || !strings.Contains(out, "failed calling webhook") {
		t.Errorf("without the webhook: %v %s", err, out)
	}
}
