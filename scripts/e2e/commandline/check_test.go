package commandline

import (
	"fmt"
	"strings"
	"testing"

	"kedge/scripts/e2e/harness"
)

// TestCheckBesideRunningKedge: the node's own ports and routes are no faults of the machine.
func TestCheckBesideRunningKedge(t *testing.T) {
	t.Parallel()
	n := harness.Shared(t)
	out, err := n.Command("check")
	if err != nil || !strings.Contains(out, fmt.Sprintf("ok       ports: in use by this node's kedge, process %d\n", n.Cmd.Process.Pid)) {
		t.Errorf("%v\n%s", err, out)
	}
}
