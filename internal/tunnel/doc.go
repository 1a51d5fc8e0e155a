// Package tunnel is the connection that a node makes to a server and over which the
// server then calls the node: what both ends say to each other, and nothing of
// Kubernetes.
//
// The node connects over TLS and asks for an upgrade of the connection ([Upgrade],
// [Accept]). From then on it carries streams of yamux, each with flow control of its
// own, and only the server opens them. A stream begins with one small frame that
// says where it is to go ([Destination]) and one that says whether it got there;
// then it is a connection.
//
//	node                                server
//	 │ GET /kedge/v1/tunnel, Upgrade ───▶│ who is it: the certificate of the connection
//	 │◀────────────────────────── 101 ───│
//	 │◀─ stream: kubelet ────────────────│
//	 │── done ──────────────────────────▶│ bytes, both ways
//
// Who the node is, and what it may be asked to reach, is decided by those who use
// this package: server/tunnel and agent. Besides them only main may import it.
package tunnel
