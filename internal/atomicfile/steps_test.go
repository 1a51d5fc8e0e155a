package atomicfile

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// Everything is written, in order, and the caller is asked after each full step.
func TestStepWriter(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	steps := 0
	w := NewStepWriter(f, func() error { steps++; return nil })
	var want []byte
	for i := 0; len(want) < 2*step+100; i++ {
		piece := bytes.Repeat([]byte{byte(i)}, 64<<10)
		if n, err := w.Write(piece); n != len(piece) || err != nil {
			t.Fatal(n, err)
		}
		want = append(want, piece...)
	}
	if got, err := os.ReadFile(f.Name()); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%d bytes written, %d found, or they differ: %v", len(want), len(got), err)
	}
	if steps != 2 {
		t.Errorf("asked %d times, want 2", steps)
	}
}

// The writer stops when the caller says so, or when the file cannot be written.
func TestStepWriterEnds(t *testing.T) {
	f, err := os.Create(filepath.Join(t.TempDir(), "f"))
	if err != nil {
		t.Fatal(err)
	}
	full := errors.New("full")
	w := NewStepWriter(f, func() error { return full })
	if _, err := w.Write(make([]byte, step-1)); err != nil {
		t.Errorf("%v before the end of a step", err)
	}
	if _, err := w.Write(make([]byte, 1)); !errors.Is(err, full) {
		t.Errorf("%v at the end of a step, want %v", err, full)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := NewStepWriter(f, nil).Write([]byte{1}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v of a closed file, want %v", err, os.ErrClosed)
	}
}
