// Package proxy selects the endpoints of services on a node: which endpoints a service has
// here, under which traffic policy, and with which session affinity. Package nft/services
// writes the result as rules; packets never pass this process.
//
// The decisions are Kubernetes' own: its change trackers, its selection of endpoints by
// topology and traffic policy, and its health checks are imported, in embed_trackers.go and
// nowhere else. Rules stay when the process stops.
//
// The package does not assign addresses of load balancers, resolve names or enforce
// policies. Only package main imports it.
package proxy
