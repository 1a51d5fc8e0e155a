package server

import (
	"fmt"

	"k8s.io/apiserver/pkg/features"
	"k8s.io/apiserver/pkg/util/compatibility"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
)

// ApplyGlobalFlags applies the flags that all components of the process share: feature gates, emulated version and
// verbosity. It must be called after the API server and the kubelet have parsed their flags, and before any component runs.
// The flags of controllers and scheduler are parsed here, because these are created later, in each term of leadership.
func ApplyGlobalFlags(cfg Config) error {
	if _, err := parseControllers(nil, cfg.ControllerArgs); err != nil {
		return err
	}
	if _, err := parseScheduler(nil, cfg.SchedulerArgs); err != nil {
		return err
	}
	// Both features are for API servers of different versions that forward requests to each other. With them,
	// every server would write two objects, and renew a lease, every ten seconds: more than half of the writes
	// of an idle server. The user's --feature-gates take precedence.
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
	// As in upstream's commands, for the metrics kubernetes_feature_enabled and version_info.
	utilfeature.DefaultMutableFeatureGate.AddMetrics()
	compatibility.DefaultComponentGlobalsRegistry.AddMetrics()
	return nil
}
