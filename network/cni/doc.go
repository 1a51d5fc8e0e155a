// Package cni attaches pods to their node: it answers the container runtime's CNI
// requests, which network/cniclient carries here from the plugin.
//
// A pod gets a routed veth pair (docs/decisions/pod-links.md), its addresses from
// network/ipam, and its host ports in the table of network/nft/pods. All of that is
// written down as one lease before the first kernel object exists and erased after
// the last one is gone, so that Reconcile can finish or undo an attachment that a
// crash interrupted.
//
// The package does not connect nodes with each other, translate services or enforce
// policies. Only package network may import it.
package cni
