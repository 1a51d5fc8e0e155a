package importk3s

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
)

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

// ranks returns the ranks of objects, where one that is owned has at least the rank of its owners. So a StatefulSet is not created for
// the sake of a Secret that it owns before the claims of its pods: it would create other claims, without the old volumes.
func (c *choice) ranks(objects []*object) map[*object]int {
	ranks := map[*object]int{}
	var rank func(o *object) int
	rank = func(o *object) int {
		if known, ok := ranks[o]; ok {
			return known
		}
		own := rankOf(o)
		ranks[o] = own // for objects that own each other
		if own < rankConfiguration {
			return own
		}
		for _, ref := range o.GetOwnerReferences() {
			if owner := c.owner(o, ref); owner != nil {
				own = max(own, rank(owner))
			}
		}
		ranks[o] = own
		return own
	}
	for _, o := range objects {
		rank(o)
	}
	return ranks
}

// owner returns the owner of an imported object to which it will refer; nil if that is not imported. A claim will not refer to its
// StatefulSet, which must come later, and whose controller adds the reference again.
func (c *choice) owner(o *object, ref metav1.OwnerReference) *object {
	owner := c.uids[ref.UID]
	if owner == nil || c.left[owner] != "" || o.GetKind() == "PersistentVolumeClaim" && owner.GetKind() == "StatefulSet" {
		return nil
	}
	return owner
}
