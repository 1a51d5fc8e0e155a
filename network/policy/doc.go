// Package policy enforces Kubernetes' NetworkPolicy (networking.k8s.io/v1) and the
// cluster-wide ClusterNetworkPolicy (policy.networking.k8s.io/v1alpha2) for this node's
// pods. It watches policies, pods and namespaces, compiles them into the table of
// nft/policies, and explains its decisions. DESIGN.md of package network has the whole
// picture.
//
// The package neither writes rules itself nor sees packets, and knows no services: it works
// with the addresses of connections after the translation of services. Only package main
// and packages below network may import it.
package policy
