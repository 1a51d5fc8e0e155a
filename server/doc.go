// Package server is the control plane: the Kubernetes API server, controllers
// and scheduler, assembled in this process from their upstream packages, and how a
// machine becomes a server of a cluster and ends being one. Its parts that need no
// component of Kubernetes are packages below it, which have tests.
//
// Controllers, scheduler and kedge's own code reach the API through
// [loopback.Loopback]: a function call, no socket, no TLS. Files called embed_*.go are the only ones
// that import packages of k8s.io/kubernetes.
//
// It is not for running containers or forwarding packets (package agent), nor
// for storing anything itself (package datastore). Only package main may import
// it; it must not import agent, runtime, network or dns.
package server
