package namespaces

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// onFirst is how many of a hundred goroutines, and of a hundred functions of Run, ran on
// the process's first thread.
var onFirst struct{ plain, run int }

func TestNeverTheFirstThread(t *testing.T) {
	if onFirst.plain == 0 {
		t.Error("no goroutine ran on the first thread: this test says nothing")
	}
	if onFirst.run != 0 {
		t.Errorf("%d of 100 functions ran on the first thread", onFirst.run)
	}
}

func TestTheThreadEnds(t *testing.T) {
	want, tid := errors.New("an error"), 0
	err := OnOwnThread(func() error {
		tid = unix.Gettid()
		return want
	})
	if !errors.Is(err, want) {
		t.Errorf("returned %v", err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/self/task/%d", tid)); errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("thread %d goes on after its function", tid)
		}
	}
}
