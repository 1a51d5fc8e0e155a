package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"kedge/scripts/e2e/harness"
)

// TestLogForPrograms: with --log-format=json each line is an object that says when,
// how bad, what and of which component; and an idle node says next to nothing.
func TestLogForPrograms(t *testing.T) {
	t.Parallel()
	n := harness.Own(t, "--log-format=json")
	if err := n.Start(); err != nil {
		t.Fatal(err)
	}
	started := func() int { return len(n.LogLines(t, `"msg":"started"`)) }
	harness.Eventually(t, 10*time.Second, func() error { // kedge status is content a moment before
		if started() == 0 {
			return errors.New("no component has a record of its start")
		}
		return nil
	})
	if got := started(); got < 15 {
		t.Errorf("%d components have a record of their start", got)
	}
	harness.Eventually(t, 20*time.Second, func() error { return n.NodeIsReady(n.Name) })
	// What a node says when it has nothing to do is seen by letting it do nothing; the
	// first seconds belong to the start.
	idle := time.Now().Add(5 * time.Second)
	time.Sleep(35 * time.Second)
	log, err := os.ReadFile(n.LogFile())
	if err != nil {
		t.Fatal(err)
	}
	var said []string
	for line := range bytes.Lines(log) {
		var record struct {
			Time      time.Time
			Level     string
			Msg       string
			Component string
		}
		if err := json.Unmarshal(line, &record); err != nil {
			t.Errorf("%v: %s", err, line)
		} else if record.Time.IsZero() || record.Level == "" || record.Msg == "" || record.Component == "" {
			t.Errorf("it lacks something: %s", line)
		}
		if record.Time.After(idle) {
			said = append(said, string(line))
		}
	}
	if len(said) > 2 {
		t.Errorf("an idle node says\n%s", strings.Join(said, ""))
	}
}
