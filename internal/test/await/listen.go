package await

import (
	"errors"
	"syscall"
	"testing"
	"time"
)

// Listener returns what listen opens, a socket at an address that another one had until a moment ago. The kernel may have that
// one a little longer than the process: a thread that waits for events holds it while it looks which there are, and then the
// last one to let go of it closes it (since Linux 6.9). Other errors fail the test.
func Listener[T any](t testing.TB, listen func() (T, error)) T {
	t.Helper()
	for deadline := time.Now().Add(Limit); ; time.Sleep(time.Millisecond) {
		l, err := listen()
		if err == nil {
			return l
		}
		if !errors.Is(err, syscall.EADDRINUSE) || time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
