// Package storage tests from outside what a node does with its disk: a full disk, one that stalls, files that are damaged or
// missing, and file systems on which images cannot be unpacked as usual. Helpers are in package harness; nothing imports the
// package.
package storage

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
