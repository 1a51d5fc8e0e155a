// Package throwaway tests throwaway clusters from outside (`kedge up`), and a week of a user with kubectl on one of them, whose
// scripts are in testdata/day. Helpers are in package harness; nothing imports the package.
package throwaway

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
