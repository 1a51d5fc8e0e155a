// Package policy decides which connections of this node's pods are allowed:
// Kubernetes' NetworkPolicy (networking.k8s.io/v1) and the cluster-wide
// ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2). It follows what the API says
// of policies, pods and namespaces, keeps package nft told in steps of what
// changed, and explains its decisions. DESIGN.md of package network has the
// whole picture.
//
// It neither writes rules itself nor sees a packet, and knows nothing of
// services: connections are judged with the addresses that remain when services
// have been translated. Only package main and packages under network may import it.
package policy
