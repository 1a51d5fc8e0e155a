// Package security tests from outside who may do what: users, nodes, and nodes that were taken over. The settings of pods that
// have to do with security are tested in package workloads. Helpers are in package harness; nothing imports the package.
package security

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
