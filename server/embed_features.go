package server

import (
	"fmt"

	"k8s.io/apiserver/pkg/util/compatibility"
)

// ApplyFeatureGates makes the --feature-gates and --emulated-version of all
// components take effect. Upstream keeps them in one registry for the process,
// so this comes once, after all components have parsed their flags and before
// any of them runs.
func ApplyFeatureGates() error {
	if err := compatibility.DefaultComponentGlobalsRegistry.Set(); err != nil {
		return fmt.Errorf("feature-gates: %w", err)
	}
	return nil
}
