package datastore

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
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
	dir    string // of the store
	once   sync.Once
	failed chan struct{} // closed by the first failure
	err    error         // valid once failed is closed
}

func newFailStop(dir string) *failStop { return &failStop{dir: dir, failed: make(chan struct{})} }

// lostEntries is a part of raft's message when the leader knows that this member has acknowledged entries which it does not have.
// The check of the log cannot find this out where the last entries look as if a power cut had torn them.
const lostEntries = "Was the raft log corrupted, truncated, or lost?"

func (f *failStop) fail(err error) {
	f.once.Do(func() {
		if strings.Contains(err.Error(), lostEntries) {
			err = damage(f.dir, fmt.Sprintf("%s has lost entries that this member has acknowledged to the others (%v)", filepath.Join(f.dir, memberDir, "wal"), err))
		}
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
