// Package server is the control plane: the Kubernetes API server, controllers
// and scheduler, assembled in this process from their upstream packages, and
// the credentials that a cluster begins with.
//
// Controllers, scheduler and kedge's own code reach the API through [Loopback]:
// a function call, no socket, no TLS. Files called embed_*.go are the only ones
// that import packages of k8s.io/kubernetes.
//
// It is not for running containers or forwarding packets (package agent), nor
// for storing anything itself (package datastore). Only package main may import
// it; it must not import agent, runtime, network or dns.
package server
