package namespaces

import (
	"os"
	"runtime"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// The main goroutine begins on the first thread, which then takes what it starts, as long
// as there is no other to take it.
func TestMain(m *testing.M) {
	was := runtime.GOMAXPROCS(1)
	count := func(n *int) {
		if unix.Gettid() == os.Getpid() {
			*n++
		}
	}
	for range 100 {
		done := make(chan bool)
		go func() {
			count(&onFirst.plain)
			close(done)
		}()
		<-done
	}
	for range 100 {
		_ = OnOwnThread(func() error {
			count(&onFirst.run)
			return nil
		})
	}
	runtime.GOMAXPROCS(was)
	goleak.VerifyTestMain(m)
}
