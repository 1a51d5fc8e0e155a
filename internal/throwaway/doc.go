// Package throwaway makes clusters of machines on this one, for a test or an
// afternoon: "kedge up" and what belongs to it.
//
//	ROOT/templates/KEY      data directories that every node begins with
//	ROOT/NAME/cluster.json  what the cluster is, and whether it is complete
//	ROOT/NAME/kubeconfig    for its administrator
//	ROOT/NAME/site/         its machines: see package machines
//
// A node is "kedge server" or "kedge agent" on a machine of its own, with its
// settings in /etc/kedge/config.yaml there; nothing in those programs knows that the
// machine is none. A cluster is complete when cluster.json says so. One that is not,
// and whose maker is gone, is removed by the next call: see [Root.Sweep].
//
// It is not for machines that live longer than the host's next reboot, and knows
// nothing of flags. Only package main imports it.
package throwaway
