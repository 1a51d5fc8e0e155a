package footprint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Every thread has the slack, threads that are made afterwards have it too, and so have children.
func TestTimerSlack(t *testing.T) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer func() {
		if err := RestoreTimerSlack(); err != nil {
			t.Error(err)
		}
		defaultHere(t)
	}()
	hold(t)
	const want = 7 * time.Millisecond
	if err := SetTimerSlack(want); errors.Is(err, fs.ErrPermission) {
		defaultHere(t) // refused is refused for all
		t.Skip("needs CAP_SYS_NICE")
	} else if err != nil {
		t.Fatal(err)
	}
	for before := len(slacks(t)); len(slacks(t)) == before; {
		hold(t)
	}
	for tid, got := range slacks(t) {
		if got != fmt.Sprint(want.Nanoseconds()) {
			t.Errorf("thread %s has %s", tid, got)
		}
	}
	if out, err := exec.Command("cat", "/proc/self/timerslack_ns").Output(); err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(want.Nanoseconds()) {
		t.Errorf("a child has %q, %v", out, err)
	}
}

// defaultHere fails unless this thread has the default.
func defaultHere(t *testing.T) {
	t.Helper()
	if got, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0); err != nil || got != int(DefaultTimerSlack.Nanoseconds()) {
		t.Errorf("this thread has %d ns, %v", got, err)
	}
}

// hold has a goroutine keep a thread for itself until the test ends.
func hold(t *testing.T) {
	end, holds := make(chan struct{}), make(chan struct{})
	t.Cleanup(func() { close(end) })
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		close(holds)
		<-end
	}()
	<-holds
}

func slacks(t *testing.T) map[string]string {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	of := map[string]string{}
	for _, task := range tasks {
		data, err := os.ReadFile(filepath.Join("/proc", task.Name(), "timerslack_ns"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		of[task.Name()] = strings.TrimSpace(string(data))
	}
	return of
}
