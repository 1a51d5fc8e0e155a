package backend_test

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"kedge/internal/test/host"
)

func TestMain(m *testing.M) {
	// The test program is also the process of a node: see machine.start.
	if os.Getenv(nodeVar) != "" {
		if err := nodeMain(); err != nil {
			println(err.Error())
			os.Exit(1)
		}
		os.Exit(0)
	}
	host.Isolate()
	goleak.VerifyTestMain(m)
}
