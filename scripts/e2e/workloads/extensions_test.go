package workloads

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

func TestCustomResources(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	group := ns + ".kedge.test"
	n.Apply(t, ns, fmt.Sprintf(`{apiVersion: apiextensions.k8s.io/v1, kind: CustomResourceDefinition, metadata: {name: boats.%s}, spec: {group: %s, scope: Namespaced, names: {plural: boats, singular: boat, kind: Boat, shortNames: [bt]},
		versions: [{name: v1, served: true, storage: true, subresources: {status: {}, scale: {specReplicasPath: .spec.seats, statusReplicasPath: .status.taken}}, additionalPrinterColumns: [{name: Seats, type: integer, jsonPath: .spec.seats}],
			schema: {openAPIV3Schema: {type: object, properties: {
				spec: {type: object, required: [seats], x-kubernetes-validations: [{rule: "self.crew <= self.seats", message: "more crew than seats"}, {rule: "self.name == oldSelf.name", message: "a boat keeps its name"}],
					properties: {seats: {type: integer, minimum: 1, description: "How many may come along."}, crew: {type: integer, default: 1}, name: {type: string, default: unnamed}}},
				status: {type: object, properties: {taken: {type: integer}}}}}}}]}}`, group, group))
	t.Cleanup(func() { n.TryKubectl(nil, "delete", "crd", "boats."+group, "--wait=false") })
	n.Kubectl(t, "wait", "crd/boats."+group, "--for=condition=established", "--timeout=20s")
	boat := func(name, spec string) string {
		return fmt.Sprintf("{apiVersion: %s/v1, kind: Boat, metadata: {name: %s}, spec: {%s}, status: {taken: 7}}", group, name, spec)
	}
	harness.Eventually(t, 20*time.Second, func() error { // until discovery knows it
		out, err := n.TryKubectl(strings.NewReader(boat("good", "seats: 2, rudder: big")), "create", "--validate=ignore", "-n", ns, "-f", "-")
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	})
	if got := n.Kubectl(t, "get", "boats."+group, "-n", ns, "good", "-o", "jsonpath={.spec} {.status}"); got != `{"crew":1,"name":"unnamed","seats":2} ` {
		t.Errorf("defaults and pruning made %s", got)
	}
	for spec, want := range map[string]string{"seats: 1, crew: 2": "more crew than seats", "seats: 0": "should be greater than or equal to 1", "crew: 1": "spec.seats: Required value", "seats: many": "must be of type integer"} {
		if out := refusalOf(t, n, ns, boat("bad", spec)); !strings.Contains(out, want) {
			t.Errorf("%s was refused with %s", spec, out)
		}
	}
	if out, err := n.TryKubectl(nil, "patch", "boats."+group, "-n", ns, "good", "--type=merge", "-p", `{"spec":{"name":"renamed"}}`); err == nil || !strings.Contains(out, "a boat keeps its name") {
		t.Errorf("renamed: %v %s", err, out)
	}
	n.Kubectl(t, "scale", "boats."+group+"/good", "-n", ns, "--replicas=5")
	n.Kubectl(t, "patch", "boats."+group, "-n", ns, "good", "--type=merge", "--subresource=status", "-p", `{"status":{"taken":3}}`)
	if got := strings.Fields(n.Kubectl(t, "get", "boats."+group, "-n", ns, "--no-headers")); len(got) != 2 || got[1] != "5" {
		t.Errorf("the table is %v", got)
	}
	if got := n.Kubectl(t, "get", "boats."+group, "-n", ns, "good", "-o", "jsonpath={.status.taken}"); got != "3" {
		t.Errorf("status is %s", got)
	}
	harness.Eventually(t, 20*time.Second, func() error {
		out, err := n.TryKubectl(nil, "explain", "boats.spec.seats", "--api-version="+group+"/v1")
		if err != nil || !strings.Contains(out, "How many may come along.") {
			return fmt.Errorf("%v: %s", err, out)
		}
		if out := n.Kubectl(t, "get", "--raw", "/openapi/v2"); !strings.Contains(out, "/apis/"+group+"/v1/namespaces/{namespace}/boats") || !strings.Contains(out, "/apis/apps/v1/namespaces/{namespace}/deployments") {
			return errors.New("/openapi/v2 lacks the new type or the old ones")
		}
		return nil
	})
}

func TestValidatingAdmissionPolicy(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	ns := n.Namespace(t)
	n.Apply(t, ns, fmt.Sprintf(`
{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicy, metadata: {name: %s}, spec: {failurePolicy: Fail, matchConstraints: {resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [configmaps]}]},
	validations: [{expression: "object.metadata.name.startsWith('ok-')", messageExpression: "'bad name ' + object.metadata.name"}]}}
---
{apiVersion: admissionregistration.k8s.io/v1, kind: ValidatingAdmissionPolicyBinding, metadata: {name: %s}, spec: {policyName: %s, validationActions: [Deny], matchResources: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: %s}}}}}`, ns, ns, ns, ns))
	t.Cleanup(func() {
		n.TryKubectl(nil, "delete", "validatingadmissionpolicy,validatingadmissionpolicybinding", ns)
	})
	harness.Eventually(t, 20*time.Second, func() error {
		out, err := n.TryKubectl(nil, "create", "configmap", "-n", ns, "x", "--dry-run=server")
		if err == nil || !strings.Contains(out, "bad name x") {
			return fmt.Errorf("not refused: %v %s", err, out)
		}
		return nil
	})
	n.Kubectl(t, "create", "configmap", "-n", ns, "ok-x")
}

// TestAggregatedAPI has a pod that serves an API group. The API server must reach it
// through the service, show that it is the aggregator, and say on whose behalf it asks.
func TestAggregatedAPI(t *testing.T) {
	t.Parallel()
	harness.Shared(t).CheckAggregatedAPI(t, "")
}

// TestAdmissionWebhooks has upstream's test server in a pod that changes and refuses.
func TestAdmissionWebhooks(t *testing.T) {
	t.Parallel()
	harness.Shared(t).CheckAdmissionWebhooks(t, "")
}
