// Package workloads tests from outside what users run on a node: pods and their containers, controllers, scheduling, volumes,
// limits, and the API's own ways to watch and extend it. Helpers are in package harness; nothing imports the package.
package workloads

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
