// Package appliance tests "kedge install" and "kedge uninstall" from outside: on a machine whose init system kedge does not
// know, and, on the machines of scripts/systemd-machine.sh, with systemd. Helpers are in package harness; nothing imports
// the package.
package appliance

import (
	"os"
	"testing"

	"kedge/scripts/e2e/harness"
)

// longVar enables tests that take minutes.
const longVar = "KEDGE_TEST_LONG"

func requireLong(t *testing.T) {
	t.Helper()
	if os.Getenv(longVar) == "" {
		t.Skipf("takes long: set %s=1, or run make test-long", longVar)
	}
}

func TestMain(m *testing.M) { os.Exit(harness.Main(m)) }
