// Package agent is the node: the kubelet, assembled in this process from its
// upstream packages, and what it needs of the machine around it.
//
// Files called embed_*.go are the only ones that import packages of
// k8s.io/kubernetes. The kubelet's mounter is replaced by one that uses system
// calls, because no program of the host is run.
//
// It is not for the control plane (package server). Only package main may
// import it; it must not import server or datastore.
package agent
