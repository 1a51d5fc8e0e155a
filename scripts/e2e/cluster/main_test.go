// Package cluster tests clusters of several machines from outside: agents and servers that join, move, fail over and leave,
// and the tunnels between them. What happens to a cluster with broken cables is tested in package faults. Helpers are in
// package harness; nothing imports the package.
package cluster

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
