package identity

import (
	"net/netip"
	"path/filepath"
	"slices"

	"kedge/internal/atomicfile"
)

// podsCA is the name of the file [Identity.PodsCA]. It is written at each start.
const podsCA = "pods-ca.crt"

// writePodsCA writes ca.crt for pods' service account volumes: the API's authority and the kubelets' authority,
// so that pods that read the metrics of kubelets can verify their certificates. The latter has name
// constraints, so that its certificates are not valid for the API.
func (id *Identity) writePodsCA(cfg Config) error {
	names := []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc"}
	if cfg.ClusterDomain != "" {
		names = append(names, "kubernetes.default.svc."+cfg.ClusterDomain)
	}
	var ranges []netip.Prefix
	if a := cfg.ServiceIP; a.IsValid() {
		ranges = append(ranges, netip.PrefixFrom(a, a.BitLen()))
	}
	kubelets, err := id.KubeletCA.Limited(names, ranges)
	if err != nil {
		return err
	}
	id.PodsCA = filepath.Join(cfg.tlsDir(), podsCA)
	return atomicfile.Write(id.PodsCA, slices.Concat(id.ServerCA.PEM(), kubelets), 0o644)
}
