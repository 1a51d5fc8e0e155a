package footprint

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

// DefaultTimerSlack is Linux's default: prctl(2), PR_SET_TIMERSLACK.
const DefaultTimerSlack = 50 * time.Microsecond

// SetTimerSlack lets the kernel wake every thread of this process up to d late for a timer,
// so that one wake-up serves many timers: an idle node has hundreds a second, of queues,
// caches and watches, and none of them is urgent. Data that arrives, signals and locks wake a
// thread at once, whatever the slack is.
//
// New threads inherit the slack from their makers, and so do child processes: the shim, from
// which all containers descend, calls [RestoreTimerSlack]. The slack is set for all threads or
// for none: setting that of another thread needs CAP_SYS_NICE, and the error without it wraps
// [fs.ErrPermission].
func SetTimerSlack(d time.Duration) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	done := map[int]bool{unix.Gettid(): true}
	for { // a thread that is not done yet may have made another meanwhile
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
			if err := setThreadSlack(tid, d); err != nil {
				return fmt.Errorf("set the timer slack: %w", err)
			}
		}
		if len(done) == before {
			break
		}
	}
	// The calling thread comes last: it needs no permission.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, uintptr(d.Nanoseconds()), 0, 0, 0); err != nil {
		return fmt.Errorf("set the timer slack: %w", err)
	}
	return nil
}

// RestoreTimerSlack gives every thread of this process the default again. It changes nothing
// where that is not permitted: setting the slack was not permitted there either.
func RestoreTimerSlack() error {
	if err := SetTimerSlack(DefaultTimerSlack); err != nil && !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil
}

// setThreadSlack sets the slack of another thread, and ignores a thread that has ended.
func setThreadSlack(tid int, d time.Duration) error {
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
