// Package server is the control plane: the Kubernetes API server, controllers and scheduler, assembled in this
// process from their upstream packages. Parts that need no component of Kubernetes are packages below it, which
// have tests.
//
// Controllers, scheduler and kedge's own code call the API through [loopback.Loopback]: by a function call,
// without a socket or TLS. Only the files embed_*.go import packages of k8s.io/kubernetes.
//
// It does not run containers or forward packets (package agent), and stores nothing itself (package datastore).
// Only the packages assembly and main may import it; it must not import agent, runtime, network or dns.
package server
