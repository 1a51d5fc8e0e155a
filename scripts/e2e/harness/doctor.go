package harness

import (
	"encoding/json"
	"errors"
	"os/exec"
	"testing"

	"kedge/appliance/doctor"
)

// Doctor runs kedge doctor for the node, and returns the report and the exit code.
func (n *Node) Doctor(t *testing.T, more ...string) (doctor.Report, int) {
	t.Helper()
	out, err := n.Command("doctor", append(more, "-o", "json")...)
	code := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		code = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	var r doctor.Report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("exit code %d, %v\n%s", code, err, out)
	}
	return r, code
}
