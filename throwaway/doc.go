// Package throwaway makes clusters of machines on this machine, for a test or an afternoon:
// "kedge up" and the commands beside it.
//
//	ROOT/templates/KEY      data directories that every node starts with
//	ROOT/NAME/cluster.json  the cluster's record, and whether the cluster is complete
//	ROOT/NAME/kubeconfig    for the cluster's administrator
//	ROOT/NAME/site/         its machines: see package machine
//
// A node is "kedge server" or "kedge agent" on a machine of its own, with its
// settings in /etc/kedge/config.yaml there; those programs do not know that the machine is
// simulated. A cluster is complete when cluster.json says so. An incomplete cluster whose
// maker is gone is removed by the next command: see [Root.Sweep].
//
// The clusters do not outlive the host's next reboot. The package knows no flags.
// Packages command and main, and the tests and benchmarks, import it.
package throwaway
