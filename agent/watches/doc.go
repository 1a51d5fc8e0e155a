// Package watches has the informers that a node's data path shares, for services, endpoints, pods, nodes and
// policies, and derives the list of the cluster's servers from them.
//
// It changes nothing in the API. Packages agent and assembly may import it.
package watches
