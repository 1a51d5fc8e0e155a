// Package network tests the network of pods from outside: services, network policies, names, load balancers, and the ways
// between nodes. Helpers are in package harness; nothing imports the package.
package network

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
