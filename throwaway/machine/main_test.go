package machine

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"kedge/throwaway/machine/supervisor"
)

// The test program is also the supervisor of the machines, the kedge that they run, and
// the tool that is killed.
func TestMain(m *testing.M) {
	if code, was := supervisor.Main(os.Args); was {
		os.Exit(code)
	}
	if os.Args[0] == "kedge" {
		os.Exit(actKedge())
	}
	if dir := os.Getenv(victimVar); dir != "" {
		os.Exit(actVictim(dir))
	}
	goleak.VerifyTestMain(m)
}
