package server

import (
	"fmt"

	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
)

// ApplyFeatureGates makes the --feature-gates and --emulated-version of all
// components take effect. Upstream keeps them in one registry for the process,
// so this comes once, after all components have parsed their flags and before
// any of them runs.
func ApplyFeatureGates() error {
	// Both are for API servers of different versions that pass requests on to each
	// other. For that, every server would write twice, and renew a lease of the
	// store's, every ten seconds: more than half of what an idle server writes.
	// Users' --feature-gates win.
	err := utilfeature.DefaultMutableFeatureGate.SetFromMap(map[string]bool{
		string(features.UnknownVersionInteroperabilityProxy): false,
		string(features.APIServerIdentity):                   false,
	})
	if err != nil {
		return fmt.Errorf("feature-gates: %w", err)
	}
	if err := compatibility.DefaultComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("feature-gates: %w", err)
	}
	// Upstream's commands do that, for the metrics kubernetes_feature_enabled and
	// version_info.
	utilfeature.DefaultMutableFeatureGate.AddMetrics()
	compatibility.DefaultComponentGlobalsRegistry.AddMetrics()
	return nil
}
