// Package commandline tests the executable's commands and settings from outside: what they print, what they refuse, and how
// settings take effect. testdata/cli has scripts of commands with their output. Helpers are in package harness; nothing
// imports the package.
package commandline

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
