package importk3s

import "k8s.io/apimachinery/pkg/runtime/schema"

// The order in which objects are created. What others refer to comes first; pods come late, so that they find all of it; and what
// can hinder the creation of others comes last: quotas, webhooks whose pods do not run yet, and APIs of pods.
const (
	rankNamespace = iota
	rankDefinition
	rankCluster
	rankConfiguration
	rankVolume
	rankClaim
	rankLimit
	rankService
	rankOther
	rankWorkload
	rankQuota
	rankHook
)

var ranks = map[schema.GroupKind]int{
	{Kind: "Namespace"}: rankNamespace,
	{Group: "apiextensions.k8s.io", Kind: "CustomResourceDefinition"}: rankDefinition,
	{Group: "scheduling.k8s.io", Kind: "PriorityClass"}:               rankCluster,
	{Group: "storage.k8s.io", Kind: "StorageClass"}:                   rankCluster,
	{Group: "storage.k8s.io", Kind: "CSIDriver"}:                      rankCluster,
	{Group: "node.k8s.io", Kind: "RuntimeClass"}:                      rankCluster,
	{Group: "networking.k8s.io", Kind: "IngressClass"}:                rankCluster,
	{Group: "networking.k8s.io", Kind: "ServiceCIDR"}:                 rankCluster,
	{Group: "rbac.authorization.k8s.io", Kind: "ClusterRole"}:         rankCluster,
	{Group: "rbac.authorization.k8s.io", Kind: "ClusterRoleBinding"}:  rankConfiguration,
	{Group: "rbac.authorization.k8s.io", Kind: "Role"}:                rankCluster,
	{Group: "rbac.authorization.k8s.io", Kind: "RoleBinding"}:         rankConfiguration,
	{Kind: "ServiceAccount"}:                                          rankConfiguration,
	{Kind: "ConfigMap"}:                                               rankConfiguration,
	{Kind: "Secret"}:                                                  rankConfiguration,
	{Kind: "PersistentVolume"}:                                        rankVolume,
	{Kind: "PersistentVolumeClaim"}:                                   rankClaim,
	{Kind: "LimitRange"}:                                              rankLimit,
	{Kind: "Service"}:                                                 rankService,
	{Kind: "Endpoints"}:                                               rankService,
	{Group: "discovery.k8s.io", Kind: "EndpointSlice"}:                rankService,
	{Kind: "Pod"}:                                         rankWorkload,
	{Kind: "ReplicationController"}:                       rankWorkload,
	{Group: "apps", Kind: "Deployment"}:                   rankWorkload,
	{Group: "apps", Kind: "StatefulSet"}:                  rankWorkload,
	{Group: "apps", Kind: "DaemonSet"}:                    rankWorkload,
	{Group: "apps", Kind: "ReplicaSet"}:                   rankWorkload,
	{Group: "batch", Kind: "Job"}:                         rankWorkload,
	{Group: "batch", Kind: "CronJob"}:                     rankWorkload,
	{Kind: "ResourceQuota"}:                               rankQuota,
	{Group: "apiregistration.k8s.io", Kind: "APIService"}: rankHook,
}

func rankOf(o *object) int {
	kind := o.GroupVersionKind().GroupKind()
	if kind.Group == "admissionregistration.k8s.io" {
		return rankHook
	}
	if rank, ok := ranks[kind]; ok {
		return rank
	}
	return rankOther
}
