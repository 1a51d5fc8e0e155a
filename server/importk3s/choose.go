package importk3s

import (
	"slices"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// Annotations and labels by which k3s knows what it has deployed.
const (
	ownerKind    = "objectset.rio.cattle.io/owner-gvk"
	ownerName    = "objectset.rio.cattle.io/owner-name"
	addonKind    = "k3s.cattle.io/v1, Kind=Addon"
	chartKind    = "helm.cattle.io/v1, Kind=HelmChart"
	balancer     = "svccontroller.k3s.cattle.io/" // of labels
	releaseName  = "meta.helm.sh/release-name"
	releaseSpace = "meta.helm.sh/release-namespace"
	leaderRecord = "control-plane.alpha.kubernetes.io/leader"
)

const system = metav1.NamespaceSystem

// packaged are the names of the manifests that are in k3s. Manifests of other names are the user's.
var packaged = []string{
	"ccm", "coredns", "local-storage", "rolebindings", "runtimes", "traefik", "gateway-api-crd", "metrics-server",
	"aggregated-metrics-reader", "auth-delegator", "auth-reader", "metrics-apiservice", "metrics-server-deployment", "metrics-server-service", "resource-reader",
}

// charts are the names of the charts in k3s's manifest traefik.
var charts = []string{"traefik", "traefik-crd"}

// ownGroups are the API groups of k3s itself.
var ownGroups = []string{"k3s.cattle.io", "helm.cattle.io"}

// ownRoles are k3s's roles and their bindings that old versions created without a manifest.
var ownRoles = []string{"system:k3s-controller", "k3s-cloud-controller-manager", "clustercidrs-node", "kube-apiserver-kubelet-admin"}

// Reasons why an object is left out.
const (
	ofK3s       = "k3s's own"
	ofNewNodes  = "the new cluster's nodes create it"
	ofControl   = "the new cluster creates it itself"
	ofOwner     = "its owner creates it anew"
	isHistory   = "only of the old cluster's past"
	isOver      = "it has ended, and would run again"
	isDeleted   = "it was being deleted"
	isToken     = "its token is signed by k3s's key; create it anew, or use \"kubectl create token\""
	isChart     = "kedge deploys no charts; what the chart has deployed is imported"
	isGone      = "Kubernetes has no such kind any more"
	ofTheSystem = "Kubernetes' own"
)

// leftKinds are the kinds of which nothing is imported, each with the reason.
var leftKinds = map[schema.GroupKind]string{
	{Kind: "Node"}:                                                      ofNewNodes,
	{Kind: "Event"}:                                                     isHistory,
	{Kind: "RangeAllocation"}:                                           ofControl,
	{Group: "events.k8s.io", Kind: "Event"}:                             isHistory,
	{Group: "coordination.k8s.io", Kind: "Lease"}:                       isHistory,
	{Group: "coordination.k8s.io", Kind: "LeaseCandidate"}:              isHistory,
	{Group: "storage.k8s.io", Kind: "CSINode"}:                          ofNewNodes,
	{Group: "storage.k8s.io", Kind: "VolumeAttachment"}:                 ofControl,
	{Group: "storage.k8s.io", Kind: "CSIStorageCapacity"}:               ofControl,
	{Group: "resource.k8s.io", Kind: "ResourceSlice"}:                   ofNewNodes,
	{Group: "apps", Kind: "ControllerRevision"}:                         ofOwner,
	{Group: "networking.k8s.io", Kind: "IPAddress"}:                     ofControl,
	{Group: "certificates.k8s.io", Kind: "CertificateSigningRequest"}:   isHistory,
	{Group: "internal.apiserver.k8s.io", Kind: "StorageVersion"}:        ofControl,
	{Group: "storagemigration.k8s.io", Kind: "StorageVersionMigration"}: isHistory,
	{Group: "policy", Kind: "PodSecurityPolicy"}:                        isGone,
	{Group: "metrics.k8s.io", Kind: "NodeMetrics"}:                      isHistory,
}

// made are kinds that their controlling owner creates.
var made = []schema.GroupKind{
	{Kind: "Pod"}, {Group: "apps", Kind: "ReplicaSet"}, {Group: "batch", Kind: "Job"}, {Group: "discovery.k8s.io", Kind: "EndpointSlice"},
	{Group: "resource.k8s.io", Kind: "ResourceClaim"}, {Kind: "PersistentVolumeClaim"},
}

// id identifies an object without its version.
type id struct {
	schema.GroupKind
	namespace, name string
}

func idOf(u *unstructured.Unstructured) id {
	return id{u.GroupVersionKind().GroupKind(), u.GetNamespace(), u.GetName()}
}

// choice says which objects are imported.
type choice struct {
	all  map[id]*object
	uids map[types.UID]*object
	left map[*object]string // with the reason
}

// choose decides which objects of a snapshot are imported.
func choose(objects []*object) *choice {
	c := &choice{all: map[id]*object{}, uids: map[types.UID]*object{}, left: map[*object]string{}}
	for _, o := range objects {
		c.all[idOf(o.Unstructured)] = o
		c.uids[o.GetUID()] = o
	}
	for _, o := range objects {
		if reason := c.reason(o.Unstructured); reason != "" {
			c.left[o] = reason
		}
	}
	c.keepUsedDefinitions(objects)
	return c
}

// keepUsedDefinitions imports Traefik's definitions if an object of the user needs them: the object would be lost otherwise.
func (c *choice) keepUsedDefinitions(objects []*object) {
	used := map[schema.GroupKind]bool{}
	for _, o := range objects {
		if c.left[o] == "" {
			used[o.GroupVersionKind().GroupKind()] = true
		}
	}
	for o := range c.left {
		if defined, ok := definedBy(o.Unstructured); ok && used[defined] && !slices.Contains(ownGroups, defined.Group) && o.GetDeletionTimestamp() == nil {
			delete(c.left, o)
		}
	}
}

// definedBy returns the kind that a CustomResourceDefinition defines.
func definedBy(u *unstructured.Unstructured) (schema.GroupKind, bool) {
	if u.GetKind() != "CustomResourceDefinition" {
		return schema.GroupKind{}, false
	}
	group, _, _ := unstructured.NestedString(u.Object, "spec", "group")
	kind, _, _ := unstructured.NestedString(u.Object, "spec", "names", "kind")
	return schema.GroupKind{Group: group, Kind: kind}, true
}

// reason returns why an object is left out; empty if it is imported.
func (c *choice) reason(u *unstructured.Unstructured) string {
	kind := u.GroupVersionKind().GroupKind()
	if u.GetDeletionTimestamp() != nil {
		return isDeleted
	}
	if space := c.all[id{schema.GroupKind{Kind: "Namespace"}, "", u.GetNamespace()}]; space != nil && space.GetDeletionTimestamp() != nil {
		return isDeleted
	}
	if reason, ok := leftKinds[kind]; ok {
		return reason
	}
	if reason := c.reasonOfK3s(u, kind); reason != "" {
		return reason
	}
	owner := metav1.GetControllerOf(u)
	switch {
	case owner == nil:
	case kind.Kind == "PersistentVolumeClaim" && owner.Kind != "Pod": // a StatefulSet may own the claims that must not be lost
	case slices.Contains(made, kind):
		return ofOwner
	}
	if kind.Group == "" {
		return c.reasonOfCore(u)
	}
	return c.reasonOfGroups(u, kind)
}

// reasonOfK3s returns why an object is k3s's own.
func (c *choice) reasonOfK3s(u *unstructured.Unstructured, kind schema.GroupKind) string {
	notes, name := u.GetAnnotations(), u.GetName()
	fromK3s := notes[ownerKind] == addonKind && slices.Contains(packaged, notes[ownerName])
	if kind.Group == "helm.cattle.io" && !fromK3s {
		return isChart
	}
	if defined, ok := definedBy(u); ok {
		kind = defined
	}
	switch {
	case fromK3s, slices.Contains(ownGroups, kind.Group),
		notes[ownerKind] == chartKind, // the job that installs the chart, and what it needs
		kind.Kind == "DaemonSet" && isOfBalancer(u),
		u.GetNamespace() == system && isOfSystem(u, kind.Kind),
		kind.Group == "rbac.authorization.k8s.io" && slices.Contains(ownRoles, name),
		c.isOfTraefik(u):
		return ofK3s
	}
	return ""
}

// isOfSystem reports whether an object in kube-system is of k3s.
func isOfSystem(u *unstructured.Unstructured, kind string) bool {
	name := u.GetName()
	switch kind {
	case "Secret":
		return name == "k3s-serving" || strings.HasSuffix(name, ".node-password.k3s")
	case "ConfigMap":
		return name == "k3s-etcd-snapshots" || name == "k3s-etcd-snapshot-extra-metadata"
	case "ServiceAccount":
		return name == "svclb"
	}
	return false
}

// isOfBalancer reports whether k3s's load balancer has created a DaemonSet, for the ports of a service.
func isOfBalancer(u *unstructured.Unstructured) bool {
	for label := range u.GetLabels() {
		if strings.HasPrefix(label, balancer) {
			return true
		}
	}
	return false
}

// isOfTraefik reports whether the chart of Traefik that k3s installs has deployed an object.
func (c *choice) isOfTraefik(u *unstructured.Unstructured) bool {
	release, space := u.GetAnnotations()[releaseName], u.GetAnnotations()[releaseSpace]
	if kind, _, _ := unstructured.NestedString(u.Object, "type"); u.GetKind() == "Secret" && kind == "helm.sh/release.v1" {
		release, space = u.GetLabels()["name"], u.GetNamespace()
	}
	if space != system || !slices.Contains(charts, release) {
		return false
	}
	chart := c.all[id{schema.GroupKind{Group: "helm.cattle.io", Kind: "HelmChart"}, system, release}]
	return chart != nil && chart.GetAnnotations()[ownerKind] == addonKind
}

// reasonOfCore returns why an object of the core's group is left out.
func (c *choice) reasonOfCore(u *unstructured.Unstructured) string {
	name, space := u.GetName(), u.GetNamespace()
	switch u.GetKind() {
	case "Secret":
		switch kind, _, _ := unstructured.NestedString(u.Object, "type"); kind {
		case "kubernetes.io/service-account-token":
			return isToken
		case "bootstrap.kubernetes.io/token":
			return ofK3s
		}
	case "ConfigMap":
		if name == "kube-root-ca.crt" || space == system && (name == "extension-apiserver-authentication" || name == "kube-apiserver-legacy-service-account-token-tracking") {
			return ofControl
		}
		if u.GetAnnotations()[leaderRecord] != "" {
			return isHistory
		}
	case "ServiceAccount":
		binding := "system:controller:" + name
		rbac := "rbac.authorization.k8s.io"
		if space == system && (c.all[id{schema.GroupKind{Group: rbac, Kind: "ClusterRoleBinding"}, "", binding}] != nil || c.all[id{schema.GroupKind{Group: rbac, Kind: "RoleBinding"}, system, binding}] != nil) {
			return ofControl
		}
	case "Service":
		if space == metav1.NamespaceDefault && name == "kubernetes" {
			return ofControl
		}
	case "Endpoints":
		service := c.all[id{schema.GroupKind{Kind: "Service"}, space, name}]
		switch {
		case space == metav1.NamespaceDefault && name == "kubernetes", service != nil && hasField(service.Unstructured, "spec", "selector"):
			return ofControl
		case u.GetAnnotations()[leaderRecord] != "":
			return isHistory
		}
	case "Pod":
		if u.GetAnnotations()["kubernetes.io/config.mirror"] != "" {
			return ofNewNodes
		}
		if phase, _, _ := unstructured.NestedString(u.Object, "status", "phase"); phase == "Succeeded" || phase == "Failed" {
			return isOver
		}
	}
	return ""
}

// reasonOfGroups returns why an object of another group is left out.
func (c *choice) reasonOfGroups(u *unstructured.Unstructured, kind schema.GroupKind) string {
	name := u.GetName()
	switch kind.Group {
	case "rbac.authorization.k8s.io":
		if u.GetLabels()["kubernetes.io/bootstrapping"] == "rbac-defaults" {
			return ofTheSystem
		}
	case "scheduling.k8s.io":
		if strings.HasPrefix(name, "system-") {
			return ofTheSystem
		}
	case "flowcontrol.apiserver.k8s.io":
		if u.GetAnnotations()["apf.kubernetes.io/autoupdate-spec"] != "" {
			return ofTheSystem
		}
	case "networking.k8s.io":
		if kind.Kind == "ServiceCIDR" && name == "kubernetes" {
			return ofControl
		}
	case "apiregistration.k8s.io":
		if !hasField(u, "spec", "service") {
			return ofControl
		}
	case "certificates.k8s.io":
		if strings.HasPrefix(name, "kubernetes.io:") {
			return ofControl
		}
	case "discovery.k8s.io":
		manager := u.GetLabels()["endpointslice.kubernetes.io/managed-by"]
		if u.GetNamespace() == metav1.NamespaceDefault && name == "kubernetes" || strings.HasSuffix(manager, ".k8s.io") {
			return ofControl
		}
	case "batch":
		if kind.Kind == "Job" && hasEnded(u) {
			return isOver
		}
	}
	return ""
}

// hasEnded reports whether a Job is complete or has failed.
func hasEnded(u *unstructured.Unstructured) bool {
	conditions, _, _ := unstructured.NestedSlice(u.Object, "status", "conditions")
	return slices.ContainsFunc(conditions, func(c any) bool {
		m, _ := c.(map[string]any)
		return (m["type"] == "Complete" || m["type"] == "Failed") && m["status"] == "True"
	})
}

// hasField reports whether there is a value that is not empty.
func hasField(u *unstructured.Unstructured, path ...string) bool {
	v, ok, err := unstructured.NestedFieldNoCopy(u.Object, path...)
	return ok && err == nil && !isEmpty(v)
}
