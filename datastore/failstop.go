package datastore

import (
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap/zapcore"
)

// failStop handles etcd's fatal and panic messages: the first one fails the store, and the goroutine that logged it never
// runs again.
//
// etcd logs them where it must not go on: the log cannot be written, or a commit has failed. The code after such a message
// relies on never being reached; if the hook returned, etcd would acknowledge writes that are not on disk. Unwinding the
// goroutine is no better: the deferred clean-up of the raft loop closes the log, which syncs again, and a sync after a
// failed one may succeed without having written anything. So the goroutine is parked, the component returns ErrFailed, and
// the rest of the process stops in order.
type failStop struct {
	once   sync.Once
	failed chan struct{} // closed by the first failure
	err    error         // valid once failed is closed
}

func newFailStop() *failStop { return &failStop{failed: make(chan struct{})} }

func (f *failStop) fail(err error) {
	f.once.Do(func() {
		f.err = fmt.Errorf("%w: %w", ErrFailed, err)
		close(f.failed)
	})
}

// OnWrite implements zapcore.CheckWriteHook.
func (f *failStop) OnWrite(entry *zapcore.CheckedEntry, fields []zapcore.Field) {
	f.fail(entryError(entry.Message, fields))
	park()
}

// entryError wraps the error of a log entry, so that callers can use errors.Is on it.
func entryError(message string, fields []zapcore.Field) error {
	for _, field := range fields {
		if err, ok := field.Interface.(error); ok && field.Type == zapcore.ErrorType {
			return fmt.Errorf("%s: %w", message, err)
		}
	}
	return errors.New(message)
}

func park() { <-make(chan struct{}) }
