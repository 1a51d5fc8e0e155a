// Package cni joins pods to their node: it answers the container runtime's CNI
// requests, which network/cniclient carries here from the plugin.
//
// A pod gets a routed veth pair (docs/decisions/pod-links.md), its addresses
// from network/ipam, and its host ports through a callback that ends in
// network/nft. What a pod has is written down as one lease before the first
// kernel object exists and erased after the last one is gone, so that Reconcile
// can finish or undo whatever a crash left half done.
//
// It does not connect nodes with each other, translate services or enforce
// policies. Only package network may import it.
package cni
