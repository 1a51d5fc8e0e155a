// Package kubeconfigs lets people and programs in: it signs the client certificates of kubeconfigs, records them as Secrets
// of kube-system, authenticates requests that are made with them, and knows which of them were revoked.
//
// What a user may do is decided by the API server's authorization, and requests of revoked kubeconfigs are refused by the
// gate of package join. The packages server, assembly and command may import it.
package kubeconfigs
