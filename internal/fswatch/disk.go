// Package fswatch notices two failures of file systems that no system call reports: a disk
// that does not finish a write ([Disk]), and the removal of a file that must stay ([Removed]).
//
// It does not measure the speed of a disk, and does not watch the content of files. Any
// package may import it.
package fswatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"kedge/internal/lifecycle"
)

const (
	// probeInterval is the interval of probes. A node writes more often by itself.
	probeInterval = 30 * time.Second
	// WriteLimit is how long a write of a few bytes may take.
	WriteLimit = 3 * time.Second
	// checkLimit is how long [Disk.Check] waits for a write.
	checkLimit = time.Second
	// repeatInterval is the interval at which a stalled disk is logged.
	repeatInterval = time.Minute
)

// fileName is the file that is written in the watched directory.
const fileName = "disk-probe"

// Disk is the component that probes the disk of a directory. Everything that is stored waits
// for a stalled disk, and each component that waits reports only that it waits.
type Disk struct {
	dir   string
	write func() error
	log   *slog.Logger

	mu    sync.Mutex
	since time.Time     // start of the write in progress; zero for none
	done  chan struct{} // closed when that write has ended
	err   error         // of the latest write
}

// NewDisk makes the component for the disk of dir.
func NewDisk(dir string, log *slog.Logger) *Disk {
	return &Disk{dir: dir, log: log, write: func() error { return write(filepath.Join(dir, fileName)) }}
}

// name is the component's.
const name = "disk"

// Name implements lifecycle.Component.
func (d *Disk) Name() string { return name }

// Excuse reports components that do not answer while the disk stalls as waiting for the
// disk, instead of as problems of their own.
func Excuse(all []lifecycle.Status) []lifecycle.Status {
	stalls := slices.ContainsFunc(all, func(s lifecycle.Status) bool { return s.Name == name && s.Error != "" })
	for i := range all {
		if stalls && all[i].NoAnswer {
			all[i].Error, all[i].Detail = "", "waits for the disk"
		}
	}
	return all
}

// Run implements lifecycle.Component.
func (d *Disk) Run(ctx context.Context, ready func()) error {
	ready()
	tick := time.NewTicker(probeInterval)
	defer tick.Stop()
	for {
		d.try(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// try writes once, and logs a write that takes long.
func (d *Disk) try(ctx context.Context) {
	began, done := d.begin()
	logged := false
	for wait := WriteLimit; ; wait = repeatInterval {
		select {
		case <-ctx.Done():
			return
		case <-done:
			d.mu.Lock()
			err := d.err
			d.mu.Unlock()
			if logged {
				d.log.Warn("the disk has finished a write again", "directory", d.dir, "after", time.Since(began).Round(time.Millisecond))
			}
			if err != nil {
				d.log.Error("the disk cannot be written", "directory", d.dir, "err", err)
			}
			return
		case <-time.After(wait):
			logged = true
			d.log.Error("the disk stalls: it does not finish a write, and everything that is stored waits for it", "directory", d.dir, "for", time.Since(began).Round(time.Second))
		}
	}
}

// begin begins a write, unless a write is in progress.
func (d *Disk) begin() (began time.Time, done <-chan struct{}) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.since.IsZero() {
		d.since, d.done = time.Now(), make(chan struct{})
		go func(done chan struct{}) {
			err := d.write()
			d.mu.Lock()
			defer d.mu.Unlock()
			d.since, d.err = time.Time{}, err
			close(done)
		}(d.done)
	}
	return d.since, d.done
}

// Check implements lifecycle.Checker: it writes, and fails when the disk does not finish.
func (d *Disk) Check(ctx context.Context) error {
	began, done := d.begin()
	limit := time.NewTimer(checkLimit)
	defer limit.Stop()
	select {
	case <-done:
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-limit.C:
		return &StalledError{d.dir, time.Since(began)}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.err
}

// StalledError names a disk that does not finish a write.
type StalledError struct {
	Dir string
	For time.Duration
}

func (e *StalledError) Error() string {
	return fmt.Sprintf("the disk of %s stalls: it has not finished a write for %s", e.Dir, e.For.Round(time.Second/10))
}

func write(file string) (err error) {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.WriteAt([]byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0); err != nil {
		return err
	}
	if err := unix.Fdatasync(int(f.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", file, err)
	}
	return nil
}
