package nodeaddr

import (
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
)

// PodRanges returns the pod ranges of each node, by its name, and an error for each claimed
// range that is not used. A range must be within the cluster's, and of two nodes whose ranges
// overlap the older one has its range: without an admission plugin, the API lets a node's user
// create its Node object with any ranges.
func PodRanges(nodes []*corev1.Node, cluster []netip.Prefix) (map[string][]netip.Prefix, []error) {
	out := map[string][]netip.Prefix{}
	var errs []error
	type taken struct {
		r    netip.Prefix
		node string
	}
	var all []taken
	for _, n := range slices.SortedFunc(slices.Values(nodes), Older) {
		for _, s := range n.Spec.PodCIDRs {
			r, err := netip.ParsePrefix(s)
			if err != nil {
				errs = append(errs, fmt.Errorf("node %s: pod range: %w", n.Name, err))
				continue
			}
			r = r.Masked()
			if !slices.ContainsFunc(cluster, func(c netip.Prefix) bool { return c.Bits() <= r.Bits() && c.Contains(r.Addr()) }) {
				errs = append(errs, fmt.Errorf("node %s claims the pod range %s, which is outside the cluster's", n.Name, r))
				continue
			}
			if i := slices.IndexFunc(all, func(t taken) bool { return t.node != n.Name && t.r.Overlaps(r) }); i >= 0 {
				errs = append(errs, fmt.Errorf("node %s claims the pod range %s, but %s of the older node %s overlaps it: remove node %s with \"kedge node remove %s\" unless you know better",
					n.Name, r, all[i].r, all[i].node, n.Name, n.Name))
				continue
			}
			all = append(all, taken{r, n.Name})
			out[n.Name] = append(out[n.Name], r)
		}
	}
	return out, errs
}
