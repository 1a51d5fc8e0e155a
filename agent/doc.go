// Package agent is the node: the kubelet, assembled in this process from its upstream packages, and the
// preparation of the machine for it.
//
// Only the files embed_*.go import packages of k8s.io/kubernetes. The kubelet's mounter is replaced by an
// implementation with system calls, because kedge runs no programs of the host.
//
// It is not for the control plane (package server). Only the packages assembly and main may import it; it must
// not import server or datastore.
package agent
