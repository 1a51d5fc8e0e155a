// Package tunnels is the server's end of the nodes' tunnels: it accepts their connections on the API's port,
// and connects the API server to kubelets, pods and services through them.
//
// A kubelet is reached through the session of the node with its name, and a session's name comes from its
// certificate and key. Values that a node writes into the API have no effect. internal/tunnel has the protocol;
// server/join authenticates connections. The packages server and assembly may import it.
package tunnels
