package atomicfile

import (
	"os"
	"time"
)

const (
	// step is how many bytes are written before they are synced. The sync of another file, such as the datastore's log, may have
	// to wait for what was written before it (docs/decisions/snapshots.md has what it took with larger steps).
	step = 256 << 10
	// maxRest bounds a rest: on a slow disk, all the rests of a file of 1 GiB take 100 s at most.
	maxRest = 25 * time.Millisecond
)

// StepWriter writes a large file durably while others wait for the same disk and the same processors: in small steps, each of
// which it syncs, and after each of which it rests for as long as the step took, up to a limit.
type StepWriter struct {
	file    *os.File
	after   func() error
	waiting int       // bytes that are not synced
	began   time.Time // the step; zero between steps
}

// NewStepWriter returns a writer to f. It calls after, unless that is nil, after each step, and ends with its error. The caller
// syncs what remains after the last step.
func NewStepWriter(f *os.File, after func() error) *StepWriter {
	return &StepWriter{file: f, after: after}
}

// Write implements io.Writer.
func (w *StepWriter) Write(p []byte) (int, error) {
	if w.began.IsZero() {
		w.began = time.Now()
	}
	n, err := w.file.Write(p)
	if w.waiting += n; err != nil || w.waiting < step {
		return n, err
	}
	if err := w.file.Sync(); err != nil {
		return n, err
	}
	time.Sleep(min(time.Since(w.began), maxRest))
	w.waiting, w.began = 0, time.Time{}
	if w.after != nil {
		err = w.after()
	}
	return n, err
}
