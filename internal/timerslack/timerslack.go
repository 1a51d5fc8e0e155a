// Package timerslack says how late the kernel may wake this process's threads for a timer,
// so that one wake-up serves many timers: an idle node has hundreds of them a second, of
// queues, caches and watches, and none of them is in a hurry. Data that arrives, signals
// and locks wake a thread at once, whatever the slack is.
//
// It knows nothing of what is idle and when. Children inherit the slack, so the shim, from
// which all containers descend, sets the default again. Only footprint and the shim's
// package main import it.
package timerslack

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// Default is Linux's own for a process that nobody has changed, prctl(2), PR_SET_TIMERSLACK.
const Default = 50 * time.Microsecond

// Set gives every thread of this process the slack d; threads that come later have it from
// those that make them. It is for all threads or for none: setting that of another thread
// needs CAP_SYS_NICE, and the error without it wraps [fs.ErrPermission].
func Set(d time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	done := map[int]bool{unix.Gettid(): true}
	for { // a thread that was not done yet may have made another meanwhile
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("find the threads of this process: %w", err)
		}
		before := len(done)
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil || done[tid] {
				continue
			}
			done[tid] = true
			if err := setThread(tid, d); err != nil {
				return fmt.Errorf("set the timer slack: %w", err)
			}
		}
		if len(done) == before {
			break
		}
	}
	// Ours comes last: it needs no permission.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(d.Nanoseconds()), 0, 0, 0); err != nil {
		return fmt.Errorf("set the timer slack: %w", err)
	}
	return nil
}

// Restore gives every thread of this process the default again. Where that is not
// permitted it changes nothing: then neither was what it would undo.
func Restore() error {
	if err := Set(Default); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

// setThread sets the slack of another thread. One that has ended needs none.
func setThread(tid int, d time.Duration) error {
	// The file is not among those below /proc/self/task.
	f, err := os.OpenFile(fmt.Sprintf("/proc/%d/timerslack_ns", tid), os.O_WRONLY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := fmt.Fprint(f, d.Nanoseconds()); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}
