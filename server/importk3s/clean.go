package importk3s

import (
	"slices"
	"strings"

	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

// notes are annotations that controllers of the old cluster have written about it, and that would mislead the new one's.
var notes = []string{
	"pv.kubernetes.io/bind-completed", "pv.kubernetes.io/bound-by-controller", "volume.kubernetes.io/selected-node",
	"deployment.kubernetes.io/revision", "deprecated.daemonset.template.generation", "endpoints.kubernetes.io/last-change-trigger-time",
	ownerKind, ownerName, "objectset.rio.cattle.io/owner-namespace", "objectset.rio.cattle.io/applied", "objectset.rio.cattle.io/id",
}

// clean returns an object as it is created in the new cluster: without what a cluster adds to it, and without references to other
// objects by their UIDs.
func clean(o *unstructured.Unstructured) *unstructured.Unstructured {
	u := o.DeepCopy()
	metadata := map[string]any{"name": u.GetName()}
	if u.GetNamespace() != "" {
		metadata["namespace"] = u.GetNamespace()
	}
	u.Object["metadata"] = metadata
	u.SetLabels(without(o.GetLabels(), "objectset.rio.cattle.io/hash"))
	u.SetAnnotations(without(o.GetAnnotations(), notes...))
	var finalizers []string
	for _, f := range o.GetFinalizers() {
		if !isOfCluster(f) {
			finalizers = append(finalizers, f)
		}
	}
	u.SetFinalizers(finalizers)
	if isBuiltIn(u) {
		delete(u.Object, "status")
	}
	switch u.GetKind() {
	case "PersistentVolume":
		// Without the UID the claim of this name is bound, and no other. With that of a claim that does not exist the volume
		// would count as released, and with the policy Delete it would be deleted.
		unstructured.RemoveNestedField(u.Object, "spec", "claimRef", "uid")
		unstructured.RemoveNestedField(u.Object, "spec", "claimRef", "resourceVersion")
	case "ServiceAccount":
		delete(u.Object, "secrets")
	case "ClusterRole":
		if hasField(u, "aggregationRule") {
			delete(u.Object, "rules") // Kubernetes collects them
		}
	case "Job":
		cleanJob(u)
	case "Pod":
		cleanPod(u)
	}
	return u
}

// builtIn are Kubernetes' own API groups whose names have a dot. Others in k8s.io, such as that of volume snapshots, are of custom
// resources.
var builtIn = []string{
	"admissionregistration.k8s.io", "apiextensions.k8s.io", "apiregistration.k8s.io", "flowcontrol.apiserver.k8s.io", "networking.k8s.io",
	"node.k8s.io", "rbac.authorization.k8s.io", "scheduling.k8s.io", "storage.k8s.io", "discovery.k8s.io", "certificates.k8s.io", "resource.k8s.io",
}

// isBuiltIn reports whether an object is of Kubernetes itself, and so never has a status at its creation. That of a custom resource
// may be part of it; the API drops it otherwise.
func isBuiltIn(u *unstructured.Unstructured) bool {
	group := u.GroupVersionKind().Group
	return !strings.Contains(group, ".") || slices.Contains(builtIn, group)
}

// isOfCluster reports whether a controller of the cluster itself removes a finalizer. Those of k3s would never be removed; those of
// Kubernetes are added again.
func isOfCluster(finalizer string) bool {
	return strings.HasPrefix(finalizer, "wrangler.cattle.io/") || strings.HasPrefix(finalizer, "svccontroller.k3s.cattle.io/") ||
		slices.Contains([]string{
			"kubernetes.io/pv-protection", "kubernetes.io/pvc-protection", "service.kubernetes.io/load-balancer-cleanup", "foregroundDeletion", "orphan",
			"customresourcecleanup.apiextensions.k8s.io",
		}, finalizer)
}

// cleanJob removes the selector that a job gets with its UID.
func cleanJob(u *unstructured.Unstructured) {
	if manual, _, _ := unstructured.NestedBool(u.Object, "spec", "manualSelector"); manual {
		return
	}
	unstructured.RemoveNestedField(u.Object, "spec", "selector")
	for _, label := range []string{"controller-uid", "job-name", "batch.kubernetes.io/controller-uid", "batch.kubernetes.io/job-name"} {
		unstructured.RemoveNestedField(u.Object, "spec", "template", "metadata", "labels", label)
		unstructured.RemoveNestedField(u.Object, "metadata", "labels", label)
	}
}

// cleanPod removes what admission and the scheduler have added to a pod.
func cleanPod(u *unstructured.Unstructured) {
	spec, _ := u.Object["spec"].(map[string]any)
	delete(spec, "nodeName")
	delete(spec, "priority") // computed from the class
	delete(spec, "preemptionPolicy")
	isToken := func(v any) bool {
		m, _ := v.(map[string]any)
		name, _ := m["name"].(string)
		return strings.HasPrefix(name, "kube-api-access-")
	}
	drop := func(m map[string]any, field string) {
		if list, ok := m[field].([]any); ok {
			if list = slices.DeleteFunc(list, isToken); len(list) == 0 {
				delete(m, field)
			} else {
				m[field] = list
			}
		}
	}
	drop(spec, "volumes")
	delete(spec, "ephemeralContainers")
	for _, field := range []string{"containers", "initContainers"} {
		all, _ := spec[field].([]any)
		for _, c := range all {
			if m, ok := c.(map[string]any); ok {
				drop(m, "volumeMounts")
			}
		}
	}
}

// without returns a map without some of its keys; nil if nothing is left.
func without(m map[string]string, keys ...string) map[string]string {
	var out map[string]string
	for k, v := range m {
		if !slices.Contains(keys, k) {
			if out == nil {
				out = map[string]string{}
			}
			out[k] = v
		}
	}
	return out
}
