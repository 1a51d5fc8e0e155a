// Package cniclient is the CNI plugin that a container runtime executes: it
// hands the request to the running kedge over a unix socket and prints the
// answer. The plugin is the kedge executable under the name kedge-cni, started
// once or twice for every pod, so this package does as little as possible and
// imports nothing but a few packages of the standard library; a test keeps it so.
//
// It also defines the messages, which network/cni answers. It knows nothing of
// interfaces and addresses. Package main and network/cni may import it.
package cniclient
