package logging

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// MaxFile is the size at which a log file is rotated, and KeptFiles is the number of older files that stay beside it.
const (
	MaxFile   = 10 << 20
	KeptFiles = 3
)

// File is a log file that rotates itself, on machines whose service manager keeps no log. The process's standard error
// output is redirected to the file, so that a crash is in it too. A rotation renames the file and redirects the output to
// a new one: no line is lost, which a copy that is truncated cannot promise, and no other program is needed.
type File struct {
	path string
	max  int64

	mu   sync.Mutex // guards the fields below
	size int64
}

// OpenFile opens a log file for appending, and redirects the standard outputs to it.
func OpenFile(path string) (*File, error) {
	f := &File{path: path, max: MaxFile}
	return f, f.open()
}

// open opens the file and redirects both standard outputs.
func (f *File) open() error {
	file, err := os.OpenFile(f.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	defer file.Close()
	st, err := file.Stat()
	if err != nil {
		return fmt.Errorf("open the log: %w", err)
	}
	f.size = st.Size()
	for _, fd := range []int{int(os.Stdout.Fd()), int(os.Stderr.Fd())} {
		if err := unix.Dup3(int(file.Fd()), fd, 0); err != nil {
			return fmt.Errorf("redirect the output to the log: %w", err)
		}
	}
	return nil
}

// Write implements io.Writer. A log that cannot be rotated, on a full disk for example, is written on.
func (f *File) Write(line []byte) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.size+int64(len(line)) > f.max && f.size > 0 {
		if err := f.rotate(); err != nil {
			f.size = 0 // the next attempt is one file later
			fmt.Fprintf(os.Stderr, "kedge: the log is not rotated: %v\n", err)
		}
	}
	n, err := os.Stderr.Write(line)
	f.size += int64(n)
	return n, err
}

func (f *File) rotate() error {
	older := func(n int) string {
		if n == 0 {
			return f.path
		}
		return fmt.Sprintf("%s.%d", f.path, n)
	}
	for n := KeptFiles - 1; n >= 0; n-- {
		if err := os.Rename(older(n), older(n+1)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return f.open()
}
