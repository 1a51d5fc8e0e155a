// Package node tests the life of a node from outside: its start, its stop, its end by a kill, what its machine lacks, and what
// it leaves behind. Helpers are in package harness; nothing imports the package.
package node

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
