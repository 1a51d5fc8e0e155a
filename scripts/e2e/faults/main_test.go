// Package faults tests clusters of servers under faults, from outside: cables that are cut, machines that lose power, servers
// that are killed under load. It has figures of that too (`make bench-cluster`). Helpers are in package harness; nothing
// imports the package.
package faults

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
