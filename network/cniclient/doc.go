// Package cniclient is the CNI plugin that a container runtime executes: it sends the
// request to the running kedge over a unix socket and prints the answer. The plugin is the
// kedge executable under the name kedge-cni, started once or twice for every pod; therefore
// the package does as little as possible and imports only a few packages of the standard
// library, which a test checks.
//
// The package also defines the messages, which network/cni answers. It knows no interfaces
// and no addresses. Package main and network/cni may import it.
package cniclient
