// Package remote is how a server upgrades the kedge of other nodes, and collects their state for support: what a node answers
// ([Node]), the server's questions ([Client]), and the order in which a cluster is upgraded ([Rollout]).
//
// A server reaches a node through the node's tunnel, so that only one machine needs the new executable and no node needs
// an open port:
//
//	GET  /v1/installed        the installed executable: [Installed]
//	GET  /v1/upgrades         the upgrade on trial and earlier ones: appliance.UpgradeStatus
//	PUT  /v1/files/NAME       a file of a release, for the upgrade that follows
//	POST /v1/upgrade          begins the upgrade: [Begin]
//	GET  /v1/support-bundle   what "kedge support-bundle" writes on the node
//
// The node does itself what "kedge upgrade" does there, with the same checks and the same way back. Who may speak is decided
// by the tunnel: only servers of the cluster, which can run anything on a node anyway.
//
// The package links no component. The packages command and assembly may import it.
package remote
