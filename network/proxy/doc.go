// Package proxy decides what happens to connections to services on a node: which
// endpoints a service has here, under which policy, and for how long a client
// stays with one. What is decided is written as rules by package nft; packets
// never pass this process.
//
// The decisions are Kubernetes' own: its change trackers, its choice of
// endpoints by topology and traffic policy, and its health checks are imported,
// in embed_trackers.go and nowhere else. Rules stay when the process stops.
//
// It does not hand out addresses of load balancers, answer names or judge
// policies. Only package main imports it.
package proxy
