package datastore

import (
	"errors"
	"fmt"
	"sync"

	"go.uber.org/zap/zapcore"
)

// failStop is what etcd's fatal and panic messages end in: the first one fails the store, and the goroutine
// that raised it never runs again.
//
// etcd raises them where going on would be wrong: a log that cannot be written, a commit that failed. Its
// caller counts on not coming back, so returning is out of the question; it would acknowledge what is not on
// disk. Unwinding is no better: the deferred clean-up of the raft loop closes the log, which syncs once more,
// and a sync that is repeated after a failure may succeed without having written anything. So the goroutine
// is parked, the component returns ErrFailed, and the process ends in order around it.
type failStop struct {
	once   sync.Once
	failed chan struct{} // closed by the first failure
	err    error         // good once failed is closed
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

// entryError keeps the error of a log entry, so that callers can still ask errors.Is about the disk.
func entryError(message string, fields []zapcore.Field) error {
	for _, field := range fields {
		if err, ok := field.Interface.(error); ok && field.Type == zapcore.ErrorType {
			return fmt.Errorf("%s: %w", message, err)
		}
	}
	return errors.New(message)
}

func park() { <-make(chan struct{}) }
