// Package tunnels is the server's end of the nodes' tunnels: it takes their
// connections on the API's port, and connects the API server with kubelets, pods and
// services through them.
//
// A kubelet is reached through the session of the node that has its name, and the
// name is that of the session's certificate and key. What a node writes of itself in
// the API decides nothing. The protocol is internal/tunnel's; who a connection is
// from says server/join. It may be imported by server and main.
package tunnels
