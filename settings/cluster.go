package settings

import (
	"net/netip"
	"reflect"
	"slices"

	"kedge/internal/errorkind"
	"kedge/internal/joining"
)

// Default ranges of a cluster, the same as k3s's.
const (
	defaultClusterCIDR = "10.42.0.0/16"
	defaultServiceCIDR = "10.43.0.0/16"
)

// clusterWide marks a setting that is equal on all nodes of a cluster. put stores the value in the cluster's
// settings, which other servers and agents receive when they join; show returns it from there, for messages.
func clusterWide[T any](o Of[T], put func(c *joining.Cluster, value T), show func(c joining.Cluster) any) Of[T] {
	o.shared = &shared{
		put: func(c *joining.Cluster, value any) {
			v, _ := value.(T)
			put(c, v)
		},
		show: show,
	}
	return o
}

// putDisabled stores the disabled components.
func putDisabled(c *joining.Cluster, disabled []string) {
	c.NoDNS, c.NoBalancer = slices.Contains(disabled, ComponentDNS), slices.Contains(disabled, ComponentServiceLB)
}

// Cluster returns the cluster's settings according to the values of its first server, without the addresses of
// its servers.
func (v Values) Cluster() joining.Cluster {
	var c joining.Cluster
	for _, row := range v.rows {
		if row.shared != nil {
			row.shared.put(&c, v.parsed[row.Name])
		}
	}
	if len(c.ClusterCIDRs) == 0 {
		c.ClusterCIDRs = []netip.Prefix{netip.MustParsePrefix(defaultClusterCIDR)}
	}
	if len(c.ServiceCIDRs) == 0 {
		c.ServiceCIDRs = []netip.Prefix{netip.MustParsePrefix(defaultServiceCIDR)}
	}
	if len(c.ClusterDNS) == 0 {
		c.ClusterDNS = tenthAddresses(c.ServiceCIDRs)
	}
	return c
}

// DefaultCluster returns the settings of a cluster whose first server has only default values. It is used while
// the cluster's settings are not known yet.
func DefaultCluster() joining.Cluster {
	v, _ := Resolve(For(Server), Sources{}) // defaults are valid: TestDefaults
	return v.Cluster()
}

// Contradictions returns an error for each setting that differs from the settings of the cluster that this
// server has joined.
func (v Values) Contradictions(have joining.Cluster) (errs []error) {
	for _, row := range v.rows {
		if row.shared == nil || !v.IsSet(row.Name) {
			continue
		}
		given := have
		row.shared.put(&given, v.parsed[row.Name])
		switch {
		case reflect.DeepEqual(given, have):
		case row.shared.show == nil:
			errs = append(errs, errorkind.BadSetting(row.Name, " differs from the components that the cluster's first server has disabled; leave it out"))
		default:
			errs = append(errs, errorkind.BadSetting(row.Name, " %v differs from the cluster's %v; leave it out", row.shared.show(given), row.shared.show(have)))
		}
	}
	return errs
}

// Absent returns the components of k3s in --disable that kedge does not have.
func (v Values) Absent() (names []string) {
	for _, name := range Disable.In(v) {
		if slices.Contains(k3sComponents(), name) {
			names = append(names, name)
		}
	}
	return names
}

// tenthAddresses returns the tenth address of each range.
func tenthAddresses(ranges []netip.Prefix) []netip.Addr {
	var out []netip.Addr
	for _, r := range ranges {
		a := r.Masked().Addr()
		for range 10 {
			a = a.Next()
		}
		out = append(out, a)
	}
	return out
}
