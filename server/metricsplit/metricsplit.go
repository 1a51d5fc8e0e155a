// Package metricsplit divides the metrics of a server's process between its two endpoints, the API server's and
// the kubelet's. Kubernetes' components register their metrics in one registry of the process, because each is
// usually a process of its own. Without the division both endpoints would serve all metrics, and sums over both
// would count metrics twice.
//
// It is imported by package server.
package metricsplit

import (
	"fmt"
	"reflect"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
	"k8s.io/component-base/metrics"
	"k8s.io/component-base/metrics/legacyregistry"
)

// kubelets has the name prefixes of metrics about a node's pods and volumes. The API server's endpoint serves
// all other metrics, including those of the whole process.
var kubelets = []string{
	"kubelet_", "volume_manager_", "plugin_manager_", "csi_operations_", "storage_operation_", "volume_operation_",
	"dra_operations_", "dra_grpc_operations_", "get_token_", "resource_manager_",
}

// Kubelets reports whether a metric belongs to the kubelet.
func Kubelets(name string) bool {
	for _, prefix := range kubelets {
		if strings.HasPrefix(name, prefix) {
			return true
		}
	}
	return false
}

// Split restricts the registry of Kubernetes' components, which the kubelet serves, to the
// kubelet's metrics, and returns all others. It must be called before another goroutine uses the
// registry; a second call is harmless.
func Split() (others prometheus.Gatherer, err error) {
	// DefaultGatherer embeds the registry in a field.
	registry := reflect.Indirect(reflect.ValueOf(legacyregistry.DefaultGatherer))
	field := registry.FieldByName("PromRegistry")
	if !field.IsValid() || !field.CanSet() || field.Type() != reflect.TypeFor[metrics.PromRegistry]() {
		return nil, fmt.Errorf("the registry of Kubernetes' metrics, a %s, has no field PromRegistry", registry.Type())
	}
	now, done := field.Interface().(*filtered)
	if !done {
		all := field.Interface().(metrics.PromRegistry)
		now = &filtered{all, Kubelets}
		field.Set(reflect.ValueOf(now))
	}
	return &filtered{now.PromRegistry, func(name string) bool { return !Kubelets(name) }}, nil
}

// filtered is a registry with only a part of the metrics.
type filtered struct {
	metrics.PromRegistry
	keep func(name string) bool
}

// Gather implements prometheus.Gatherer.
func (p *filtered) Gather() ([]*dto.MetricFamily, error) {
	all, err := p.PromRegistry.Gather()
	kept := all[:0]
	for _, f := range all {
		if p.keep(f.GetName()) {
			kept = append(kept, f)
		}
	}
	return kept, err
}
