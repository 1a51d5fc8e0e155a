// Package await lets tests wait for what other goroutines do, and never without end: a test that waits for what does not
// happen fails with a message, in place of hanging until the limit of its whole package. Tests whose time can be
// testing/synctest's need no waiting.
//
// Only tests and scripts may import it.
package await

import (
	"testing"
	"time"
)

// Limit is how long [True] waits: much longer than what is waited for takes on a busy machine.
const Limit = 20 * time.Second

// True returns when the condition holds, and fails the test when it does not within [Limit]. what completes the sentence
// "after 20s still not: ".
func True(t testing.TB, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(Limit); !condition(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("after %s still not: %s", Limit, what)
		}
	}
}
