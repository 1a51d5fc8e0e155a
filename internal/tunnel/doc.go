// Package tunnel is the protocol of the connection that a node makes to a server, and through
// which the server then connects to the node. It knows nothing of Kubernetes.
//
// The node connects over TLS and requests an upgrade of the connection ([Upgrade], [Accept]).
// From then on the connection carries yamux streams with flow control, which only the server
// opens. A stream begins with a request frame that has its [Destination] and an answer frame
// with the result; then it is a connection.
//
//	node                                server
//	 │ GET /kedge/v1/tunnel, Upgrade ───▶│ who is it: the certificate of the connection
//	 │◀────────────────────────── 101 ───│
//	 │◀─ stream: kubelet ────────────────│
//	 │── done ──────────────────────────▶│ bytes, both ways
//
// The users of the package, server/tunnels and agent/uplink, authenticate the node and decide
// which destinations are allowed. Besides them only server, agent and main may import it.
package tunnel
